"""Which device and which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from preprocessing.errors import UserError


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, else the first accelerator, else the CPU."""
    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def drawing_dtype(device: torch.device, on_accelerators: torch.dtype) -> torch.dtype:
    """The base model's choice on accelerators, fp32 on the CPU."""
    return torch.float32 if device.type == "cpu" else on_accelerators


def training_precision(wanted: str, device: torch.device) -> str:
    """accelerate's name of the precision to train in: `wanted`, or for "auto" the fastest safe one."""
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision fp16 does not train on a CPU: use bf16, no or auto.")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "no"


def training_attention(device: torch.device) -> AbstractContextManager:
    """A context in which attention is computed the way that trains fastest on the device.

    On a CPU the fused kernel's backward pass takes twice the time of the plain one at small sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
