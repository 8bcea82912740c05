"""The protocol of a captioner, and what those have in common that run in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

LONGEST_CAPTION = 40  # tokens, of the captioners that say one plain line
LONGEST_DESCRIPTION = 120  # tokens, of those that describe

Lines = list[str | None]
OnProgress = Callable[[Lines], None]


class Captioner(Protocol):
    """Describes pictures. Its words are raw: what is done to them is `preprocessing.rules`."""

    def caption(self, pictures: Sequence[Image.Image], on_progress: OnProgress) -> Lines:
        """One line for each RGB picture, in order; None where one could not be described.

        The pictures may differ in size and are taken from the sequence a batch at a time, each once unless a batch has
        to be repeated. `on_progress` is called with the lines of each batch, in order.
        """
        ...


class Batched(ABC):
    """A captioner that works by batches, and by smaller ones where the accelerator's memory is too small."""

    batch_size = 16

    @abstractmethod
    def say(self, pictures: list[Image.Image]) -> list[str]:
        """One line for each picture of a batch."""

    def caption(self, pictures: Sequence[Image.Image], on_progress: OnProgress) -> Lines:
        import torch

        lines: Lines = []
        while len(lines) < len(pictures):
            last = min(len(lines) + self.batch_size, len(pictures))
            try:
                said = self.say([pictures[index] for index in range(len(lines), last)])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.accelerator.empty_cache()
                continue
            lines += said
            on_progress(list(said))
        return lines


def device() -> Any:
    """The accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def large_model_dtype() -> Any:
    """bf16 on accelerators; fp32 on a CPU, where half precision is slow."""
    import torch

    return torch.float32 if device().type == "cpu" else torch.bfloat16
