"""What a checkpoint does: the validated `efficiency` block of its `config.json`.

This package imports neither vLLM nor torch.
"""

from vllm_effplugin.config.efficiency import (
    ARCHITECTURES,
    CLASSIFIERS,
    LANGUAGE_MODELS,
    STATE_SPACE_MODELS,
    EfficiencyConfig,
    efficient_architecture,
    parse_efficiency,
)

__all__ = [
    "ARCHITECTURES",
    "CLASSIFIERS",
    "LANGUAGE_MODELS",
    "STATE_SPACE_MODELS",
    "EfficiencyConfig",
    "efficient_architecture",
    "parse_efficiency",
]
