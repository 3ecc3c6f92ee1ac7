"""The application behind `vllm serve`, for a web server other than vLLM's own."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import NoReturn

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import watchdog_loop
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerFactory

from vllm_effplugin.errors import ConfigError


class _Parser(FlexibleArgumentParser):
    """vLLM's would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"vllm serve: {message}")


class _Server:
    """Stands where vLLM expects the web server, which it tells to end when its engine is dead."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    @property
    def should_exit(self) -> bool:
        return self._end is None

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value and self._end is not None:
            end, self._end = self._end, None
            end()


@cache
def _parser() -> FlexibleArgumentParser:
    """With vLLM's hundreds of options: made once."""
    cli_env_setup()
    return make_arg_parser(_Parser())


def parse(arguments: Sequence[str]) -> Namespace:
    """What follows `vllm serve` on a command line.

    Raises:
        ConfigError: when vLLM does not take it.
    """
    found = _parser().parse_args(list(arguments))
    found.model = found.model_tag or found.model
    try:
        validate_parsed_serve_args(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vllm serve: {error}") from None
    return found


@asynccontextmanager
async def application(
    arguments: Namespace,
    end: Callable[[], None],
    stat_loggers: list[StatLoggerFactory] | None = None,
) -> AsyncIterator[FastAPI]:
    """vLLM's engine and all of its routes; the engine is at `state.engine_client`.

    The steps of vLLM's own `run_server_worker`, which cannot be had without its web server.

    Args:
        arguments: as `parse` gives them.
        end: called once, when the engine is dead: what is asked from then on fails.
        stat_loggers: those of vLLM's statistics in place of the ones for `/metrics`.
    """
    for plugin, manager in (
        (arguments.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (arguments.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if plugin:
            manager(plugin)
    options = AsyncEngineArgs.from_cli_args(arguments)
    propagate_flash_late_interaction(arguments, options)
    config = options.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    engine = AsyncLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=stat_loggers,
        enable_log_requests=options.enable_log_requests,
        aggregate_engine_logging=options.aggregate_engine_logging,
        disable_log_stats=options.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()
        tasks = await engine.get_supported_tasks()
        app = build_app(arguments, tasks, config.model_config)
        await init_app_state(engine, app.state, arguments, tasks)
        app.state.server = _Server(end)
        watchdog = asyncio.create_task(watchdog_loop(app.state.server, engine))
        try:
            yield app
        finally:
            watchdog.cancel()
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
