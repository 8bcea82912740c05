"""Prompt tuning: a few trained vectors before what the text encoders read, and nothing else.

See trainer.methods.soft_prefix. After Lester et al. 2021 (arXiv:2104.08691) and, for the dropout, Li & Liang 2021
(arXiv:2101.00190). Every prompt is read behind the prefix, with the trigger word or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from preprocessing.errors import UserError
from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import Drawable, Family, TextTower
from trainer.methods.base import Method, ParameterGroup, scheduled
from trainer.methods.soft_prefix import SoftPrefix, initial_rows

PREFIX = "prefix"
KEY = "prompt_embeddings"  # peft's name of such a tensor


class Prefix(Method):
    """The prefix of every text encoder that the family has."""

    name: ClassVar[str] = "prefix"
    needs_text_grad = True
    changes_text = True
    in_stock_pipelines: ClassVar[bool] = False

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self.changes_null = settings.prefix_on_negative
        self._prefixes: list[SoftPrefix] = []
        self._first: list[Tensor] = []  # the vectors before training
        self._start: Path | None = None

    def begin_from(self, folder: Path) -> None:
        self._start = folder

    def attach(self, family: Family) -> list[ParameterGroup]:
        settings = self.settings
        stored = None if self._start is None else _stored(self._start)
        for tower in family.text:
            if stored is None:
                rows = initial_rows(tower, settings.num_prefix_tokens, settings.prefix_init_text, settings.seed)
            else:
                rows = _fitting(stored, tower)
            self._prefixes.append(SoftPrefix(tower, rows, settings.prefix_dropout))
        self._first = [prefix.rows.detach().clone() for prefix in self._prefixes]
        # no decay: it would pull the vectors to zero, away from the vocabulary that they stand beside
        parameters = [prefix.rows for prefix in self._prefixes]
        return [ParameterGroup(PREFIX, parameters, settings.optimizer, settings.learning_rate)]

    def schedule(self, progress: float) -> dict[str, float]:
        return {PREFIX: scheduled(self.settings, progress)}

    def figures(self) -> dict[str, float]:
        """The vectors' mean length, and how far they have come from where they began."""
        rows = [prefix.rows.detach() for prefix in self._prefixes]
        moved = [now - before.to(now.device) for now, before in zip(rows, self._first, strict=True)]
        found = {"prefix/length": rows, "prefix/moved": moved}
        return {name: sum(one.norm(dim=1).mean().item() for one in parts) / len(parts) for name, parts in found.items()}

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        with ExitStack() as stack:
            for prefix in self._prefixes:
                stack.enter_context(prefix.weighing(0.0))
            yield

    @contextmanager
    def reading_negatives(self, family: Drawable) -> Iterator[None]:
        if self.settings.prefix_on_negative:
            yield
        else:
            with self.disabled(family):
                yield

    def reserved(self, tower: TextTower) -> int:
        longest = tower.tokenizer.model_max_length + self.settings.num_prefix_tokens
        return 0 if tower.positions is None else max(0, longest - tower.positions)

    def save(self, folder: Path, manifest: Manifest) -> None:
        tensors = {f"{one.tower.name}.{KEY}": one.rows.detach().float().cpu() for one in self._prefixes}
        artifact.save_tensors(folder / artifact.PREFIX, tensors, artifact.adapter_header(tensors, manifest))

    def load(self, folder: Path, family: Drawable) -> None:
        stored = _stored(folder)
        for tower in family.text:
            self._prefixes.append(SoftPrefix(tower, _fitting(stored, tower)))
            self._prefixes[-1].rows.requires_grad_(False)

    def detach(self, family: Drawable) -> None:
        for prefix in self._prefixes:
            prefix.remove()
        self._prefixes, self._first = [], []

    def set_strength(self, family: Drawable, strength: float) -> None:
        for prefix in self._prefixes:
            prefix.strength = strength


def _stored(folder: Path) -> dict[str, Tensor]:
    """The vectors in the folder of an archive; UserError where there are none."""
    path = folder / artifact.PREFIX
    tensors = artifact.load_tensors(path)[0] if path.is_file() else {}
    if not any(key.endswith(f".{KEY}") for key in tensors):
        raise UserError(
            "No prefix token parameters found: make sure that you load the weights of a job with method prefix "
            f"({artifact.PREFIX} is missing or holds none)."
        )
    return tensors


def _fitting(stored: dict[str, Tensor], tower: TextTower) -> Tensor:
    """The rows for one text encoder, checked: fp32 [P, D]."""
    rows, width = stored.get(f"{tower.name}.{KEY}"), tower.encoder.get_input_embeddings().weight.shape[1]
    if rows is None or rows.ndim != 2 or rows.shape[1] != width:
        found = "missing" if rows is None else f"of shape {tuple(rows.shape)}"
        raise UserError(
            f"The prefix for the {tower.name} is {found}, and its vectors are of {width} numbers: use the base that "
            "the weights were made on."
        )
    return rows.float()
