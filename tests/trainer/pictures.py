"""Pictures as arrays, drawn by our Generator and by stock pipelines with the same settings, to compare."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.drawing import DrawSettings
from trainer.generate import Generator

PROMPT = "TOK on a hill"
CALL = {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 32, "height": 32}


def drawn(generator: Generator, prompt: str = PROMPT, **changes: Any) -> np.ndarray:
    """What our Generator draws of a prompt with seed 4."""
    settings = DrawSettings(**({"prompt": prompt, "token_scale": 1.0} | CALL | changes))
    return pixels(generator.draw_prompts([prompt], [4], settings)[0])


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int16)


def stock_picture(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    """What a pipeline of diffusers draws of it."""
    pipe.set_progress_bar_config(disable=True)
    return pixels(pipe(prompt, generator=torch.Generator().manual_seed(4), **call_of(pipe)).images[0])


def call_of(pipe: Any) -> dict[str, Any]:
    """`CALL` for a stock pipeline; FLUX's pads T5's text to 512 tokens, whatever the tokenizer says."""
    if "max_sequence_length" not in signature(pipe.__call__).parameters:
        return CALL
    return CALL | {"max_sequence_length": pipe.tokenizer_2.model_max_length}
