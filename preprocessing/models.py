"""Models that preprocessing borrows: loaded for a while, their memory given back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from preprocessing.errors import UserError

Model = TypeVar("Model")


@contextmanager
def loaded(load: Callable[[], Model], name: str, remedy: str) -> Iterator[Model]:
    """What `load` gives, for the block; UserError where transformers finds it neither here nor on the Hub.

    `name` says which setting and model that is, `remedy` what else to do than to check the network. What wraps this
    should return it: a generator around it would hold the model while its memory is given back.
    """
    try:
        model = load()
    except OSError as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"{name} cannot be loaded ({reason}): check the network, {remedy}.") from error
    try:
        yield model
    finally:
        del model
        free_memory()


def free_memory() -> None:
    """Give back what is no longer used, the accelerator's too."""
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
