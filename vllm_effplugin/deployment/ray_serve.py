"""A Ray Serve application: replicas of `vllm serve` behind one address (docs/ray-serve.md).

    serve run vllm_effplugin.deployment.ray_serve:build model=OUT replicas=2

Each replica is a whole vLLM engine with all of its routes. What a client says under one
`X-Session-ID` goes to one replica, as long as that lives and has room.
"""

from __future__ import annotations

import logging
import random
import shlex
import threading
from argparse import Namespace
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from vllm_effplugin.errors import ConfigError, UnsupportedError

logger = logging.getLogger("ray.serve")

NOT_HERE = {
    "headless": "it is for data parallelism: set `replicas` instead",
    "data_parallel_size": "set `replicas` instead",
    "api_server_count": "set `replicas` instead",
    "grpc": "replicas speak HTTP",
    "uds": "Ray Serve listens: give `serve run` or the config file its HTTP options",
    "host": "Ray Serve listens: set `http_options` in the config file",
    "port": "Ray Serve listens: set `http_options` in the config file",
    "ssl_keyfile": "Ray Serve listens: put a proxy with TLS in front of it",
    "ssl_certfile": "Ray Serve listens: put a proxy with TLS in front of it",
    "root_path": "set `route_prefix` in the config file",
}
"""Options of `vllm serve` that a replica cannot heed, and what to do instead."""

ANSWER_S = 0.2
"""For a replica's last answers, which say that its engine is dead, to go out. No longer: a replica
that answers at once seems to be the idlest one."""

DRAIN_S = 600.0
"""For what a replica generates when Ray Serve ends it; its own 20 s would cut long answers."""


class Settings(BaseModel):
    """What `build` takes: words `name=value` of `serve run`, or `args` in a config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="Checkpoint, at the same path on every node.")
    replicas: int = Field(1, ge=1)
    vllm_args: list[str] = Field([], description="What follows `vllm serve MODEL`.")
    cpus: float = Field(1, ge=0, description="Of each replica, for Ray to place it.")
    gpus: float = Field(0, ge=0, description="Of each replica: as many as its engine has ranks.")
    max_ongoing_requests: int = Field(
        512, ge=1, description="At one replica; others go elsewhere, or wait."
    )

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _as_words(cls, value: Any) -> Any:
        return shlex.split(value) if isinstance(value, str) else value


class SessionRouter(ConsistentHashRouter):
    """Requests with a session go where its others went; those without, where fewer wait."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; of the first rank with room, the one with the shortest queue."""
        if pending_request is None or pending_request.metadata.session_id:
            return await super().choose_replicas(candidate_replicas, pending_request)
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


@serve.ingress()
class Replica:
    """One engine, and vLLM's routes."""

    def __init__(self, model: str, vllm_args: list[str]) -> None:
        # vLLM, which the process that builds the application need not have.
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        from vllm_effplugin.engine.api_server import application, parse

        arguments = parse([model, *vllm_args])
        refuse(arguments)
        self._context = application(arguments, _end_soon, [RayPrometheusStatLogger])

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve, once."""
        self._app = await self._context.__aenter__()
        _check_routes(self._app)
        _show_totals()
        return self._app

    async def check_health(self) -> None:
        """Raises where the engine is dead; Ray Serve then replaces the replica."""
        await self._app.state.engine_client.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_app"):
            await self._context.__aexit__(None, None, None)


def refuse(arguments: Namespace) -> None:
    """Check what `vllm_args` ask for.

    Raises:
        UnsupportedError: naming an option that a replica cannot heed, and what to do instead.
    """
    from vllm_effplugin.engine.api_server import parse

    usual = parse([])
    for name, way_out in NOT_HERE.items():
        if getattr(arguments, name) != getattr(usual, name):
            option = name.replace("_", "-")
            raise UnsupportedError(f"--{option} is not supported under Ray Serve: {way_out}")


def _check_routes(app: FastAPI) -> None:
    """A split model's cloud without its routes would answer its edges 404."""
    from vllm_effplugin.engine.settings import efficiency_of
    from vllm_effplugin.techniques.edge_cloud.config import CloudConfig

    config = efficiency_of(app.state.vllm_config.model_config.hf_config).edge_cloud
    if isinstance(config, CloudConfig) and getattr(app.state, "effplugin_cloud", None) is None:
        raise ConfigError(
            "the cloud of a split model needs VLLM_PLUGINS=effplugin in the replicas' environment: "
            "set it under `runtime_env: {env_vars: ...}`"
        )


def _show_totals() -> None:
    """The techniques' totals where Ray has all its metrics: an agent per node."""
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper

    from vllm_effplugin.engine.metrics import COLLECTOR, Copies

    Copies(
        COLLECTOR,
        lambda family, labels: RayCounterWrapper(family.name, family.documentation, labels),
        lambda family, labels: RayGaugeWrapper(family.name, family.documentation, labels),
    ).keep()


def _end_soon() -> None:
    """End this replica: a new one is there sooner than three checks of its health would fail."""
    logger.error("The engine is dead; this replica ends.")
    actor = ray.get_runtime_context().current_actor
    threading.Timer(ANSWER_S, ray.kill, [actor]).start()


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `serve.run`.

    Args:
        arguments: fields of `Settings`.

    `deployments` in a config file may set all else of the deployment `Replica`, such as its
    `autoscaling_config`.
    """
    settings = Settings.model_validate(arguments)
    deployment = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
    )
    return deployment.bind(settings.model, settings.vllm_args)
