"""vLLM still offers what this package relies on; each failure names the interface."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_effplugin
from vllm_effplugin.engine.contract import CONTRACT, Interface


@pytest.mark.parametrize("interface", CONTRACT, ids=lambda interface: interface.name)
def test_interface(interface):
    assert interface.violation() is None


def test_the_gpu_worker_leaves_cuda_alone():
    """vLLM's CPU worker, once imported, replaces CUDA's streams and events in its process."""
    code = (
        "import sys, vllm_effplugin.engine.worker, vllm_effplugin.models.families, "
        "vllm_effplugin.models.mamba, "
        "vllm_effplugin.models.classifiers, vllm_effplugin.engine.registration as here\n"
        "assert 'vllm.v1.worker.cpu_worker' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_change_is_named():
    gone = Interface("vllm.config", "ModelConfig.no_such_method", "nothing")
    assert gone.violation() == "vllm.config.ModelConfig.no_such_method is gone (used for nothing)"
    changed = Interface("vllm.sequence", "IntermediateTensors", "nothing", ("no_such_parameter",))
    assert "no longer takes no_such_parameter" in changed.violation()


def test_every_import_from_vllm_is_in_the_contract():
    """Whatever our code imports from vLLM has an entry, so that none is relied on in silence."""
    listed = {f"{i.module}.{i.attribute.split('.')[0]}" for i in CONTRACT}
    # Types for annotations, and classes whose constructors have entries of their own.
    # Types for annotations; and modules of which an entry names the attribute.
    known = listed | {"vllm.config.VllmConfig", "vllm.config.ModelConfig", "vllm.envs"}
    package = Path(vllm_effplugin.__file__).parent
    missing = {name for file in package.rglob("*.py") for name in _vllm_imports(file)} - known
    assert not missing


def _vllm_imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mamba2"])
def test_a_trunk_does_to_its_layers_what_ours_does(family):
    """Our trunk replaces the loop over layers; what surrounds it must still be what it was."""
    module = importlib.import_module(f"vllm.model_executor.models.{family}")
    trunk = {"mistral": "LlamaModel", "qwen3": "Qwen2Model"}.get(
        family, f"{family.capitalize()}Model"
    )
    source = inspect.getsource(getattr(module, trunk).forward)
    norm = "norm_f" if family == "mamba2" else "norm"
    for step in (
        "self.embed_input_ids(input_ids)",
        "hidden_states, residual = layer(",
        f"hidden_states, _ = self.{norm}(hidden_states, residual)",
    ):
        assert step in source, f"{module.__name__}.{trunk}.forward no longer has `{step}`"
