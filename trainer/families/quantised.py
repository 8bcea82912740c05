"""Frozen weights in 8 or 4 bits by bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), and NF4 whose
scales lie in 8 bits, too (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The layers are those that diffusers' BitsAndBytesConfig puts in, and peft knows them by the same marks. They are put in
after loading, so that any source of weights will do, and quantise when they are moved to the device.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from preprocessing.errors import UserError

INT8, NF4 = "int8", "nf4"
OUTLIERS = 6.0  # inputs beyond this are multiplied in 16 bits (LLM.int8(), section 3.2)
MARKS = {INT8: "is_loaded_in_8bit", NF4: "is_loaded_in_4bit"}  # by which peft and diffusers know such a net


def check_installed(precision: str) -> None:
    """Raise UserError where a precision needs a package that is missing."""
    if precision in MARKS and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"base_precision {precision} needs the package bitsandbytes: pip install bitsandbytes, or choose another."
        )


def quantise(net: nn.Module, precision: str, kept: Sequence[str], compute_dtype: torch.dtype) -> None:
    """Put layers of that precision (INT8 or NF4) in the place of a net's linear ones, but for those whose whole names
    match one of the regular expressions `kept` anywhere. Call `net.to(device)` afterwards, which quantises.

    Raises UserError where bitsandbytes is missing.
    """
    check_installed(precision)
    linear = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in linear:
        if not any(re.search(pattern, name) for pattern in kept):
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, _layer(layer, precision, compute_dtype))
    setattr(net, MARKS[precision], True)


def _layer(linear: nn.Linear, precision: str, compute_dtype: torch.dtype) -> nn.Module:
    """A layer with the weights of `linear`, which are rounded when it is moved."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    given: dict[str, Any] = {"device": "meta"}
    weight = linear.weight.detach()
    if precision == NF4:
        layer = Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True, **given)
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
        layer.support_avx512bf16_for_cpu = False  # it would repack the weights for drawing, their scales in bf16
    else:
        layer = Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS, **given)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.train(linear.training)
