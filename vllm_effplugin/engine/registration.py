"""Makes our architectures known to vLLM."""

from __future__ import annotations

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry

from vllm_effplugin.config import CLASSIFIERS, LANGUAGE_MODELS, STATE_SPACE_MODELS
from vllm_effplugin.engine.admission import EfficiencyAdmission, StateSpaceAdmission

MODULES = (
    ("families", LANGUAGE_MODELS, EfficiencyAdmission),
    ("mamba", STATE_SPACE_MODELS, StateSpaceAdmission),
    ("classifiers", CLASSIFIERS, EfficiencyAdmission),
)
"""Of `models`, with the architectures in each and what admits them."""


def register_models() -> None:
    """Register each architecture by a lazy string, and its start-up checks. Re-entrant.

    The checks need vLLM's per-architecture hook `VerifyAndUpdateConfig`, which runs while the
    configuration is built, in the process that the user started. vLLM has no registration call
    for it, so its table `MODELS_CONFIG_MAP` gets an entry under our own names, and nothing else
    is touched (patches/README.md, "architecture hook").
    """
    known = ModelRegistry.get_supported_archs()
    for module, names, admission in MODULES:
        for name in names.values():
            if name not in known:
                ModelRegistry.register_model(name, f"vllm_effplugin.models.{module}:{name}")
            MODELS_CONFIG_MAP[name] = admission
