"""In what precision models are prepared."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

Precision = Literal["bf16", "fp32"]

_BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16")  # the last is ARM's


def default_precision() -> Precision:
    """`bf16` where the CPU or GPU multiplies bf16 matrices in hardware, else `fp32`."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in _BF16_CAPABILITIES) else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Matrix products in `precision` on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
