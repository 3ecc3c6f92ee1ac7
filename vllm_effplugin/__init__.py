"""vllm-effplugin: less work per token in a stock `vllm serve`."""

import logging
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-effplugin")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

logger = logging.getLogger(f"vllm.{__name__}")  # below `vllm`, so that its log settings apply


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it in every process, perhaps repeatedly.

    Outside the supported window of versions nothing is registered and the log says so: an error
    raised here would end vLLM, and stock models have to run as ever.
    """
    from vllm_effplugin.engine.compat import check_vllm_version

    try:
        check_vllm_version()
    except RuntimeError as error:
        logger.error("%s Until then its models are unknown to vLLM.", error)
        return
    from vllm_effplugin.engine.registration import register_models

    register_models()


def endpoints() -> object:
    """Entry point of `vllm.endpoint_plugins`, which loads where `VLLM_PLUGINS` names it."""
    from vllm_effplugin.engine.endpoint import Endpoints

    return Endpoints()


def classify_io_processor() -> str:
    """Entry point of `vllm.io_processor_plugins`: where its class is."""
    return "vllm_effplugin.engine.io_processor.ClassifyProcessor"
