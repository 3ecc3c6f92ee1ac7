"""What Ray Serve and Kubernetes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from vllm_effplugin.deployment import ray_serve
from vllm_effplugin.deployment.ray_serve import NOT_HERE, Settings, build, refuse
from vllm_effplugin.engine.api_server import parse
from vllm_effplugin.errors import ConfigError, UnsupportedError

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay" / "rayservice.yaml").read_text(encoding="utf-8"))


def test_the_manifests_pods_are_kubernetes(manifest):
    """KubeRay's own fields have no schema in a package."""
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)
        pod["spec"]["containers"][0]["no_such_field"] = 1
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, "1.34", strict=True)


def test_the_manifest_serves_the_application(manifest):
    written = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(written)
    assert config.model_dump(exclude_unset=True) == written, "Ray passes over what it does not know"
    [application] = config.applications
    module, name = application.import_path.split(":")
    assert (module, name) == (ray_serve.__name__, build.__name__)
    settings = Settings.model_validate(application.args)
    [workers] = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert settings.replicas == workers["replicas"]
    [container] = workers["template"]["spec"]["containers"]
    assert settings.gpus == int(container["resources"]["limits"]["nvidia.com/gpu"])
    for each in workers["template"]["spec"]["containers"]:
        assert any(settings.model.startswith(at["mountPath"]) for at in each["volumeMounts"])
    assert parse([settings.model, *settings.vllm_args]).served_model_name == ["model"]


def test_words_of_a_command_line():
    """`serve run ... name=value` gives strings."""
    words = {"model": "OUT", "replicas": "2", "vllm_args": "--dtype float32 --seed 1"}
    settings = Settings.model_validate(words)
    assert settings.replicas == 2
    assert settings.vllm_args == ["--dtype", "float32", "--seed", "1"]
    deployment = build(words)._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests == 512


@pytest.mark.parametrize(
    "wrong", [{}, {"model": "OUT", "replica": 2}, {"model": "OUT", "replicas": 0}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ValidationError):
        build(wrong)


def test_vllm_arguments_that_vllm_refuses():
    with pytest.raises(ConfigError, match="--no-such-option"):
        parse(["OUT", "--no-such-option"])
    with pytest.raises(ConfigError, match="requires --tool-call-parser"):
        parse(["OUT", "--enable-auto-tool-choice"])


VALUES = {
    "headless": [], "grpc": [], "data_parallel_size": ["2"], "api_server_count": ["2"],
    "port": ["9000"],
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_HERE)
def test_options_that_are_ray_serves(name):
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UnsupportedError, match=f"{option} is not supported under Ray Serve: "):
        refuse(parse(["OUT", option, *VALUES.get(name, ["any"])]))


def test_other_options_are_a_replicas_own():
    refuse(parse(["OUT", "--tensor-parallel-size", "2", "--api-key", "secret"]))
