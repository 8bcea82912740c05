"""Perfusion: new tokens, and one rank-one edit of each layer that reads the text (Tewel et al. 2023, arXiv:2305.01644).

Where the picture looks at the concept is that of the class word (its keys are locked to the class word's), what it
finds there is learned (the values). Some hundred kB for Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.draws import generator
from trainer.families.base import DENOISER, Drawable, Family
from trainer.methods import adapters
from trainer.methods.base import Method, ParameterGroup, scheduled
from trainer.methods.rank_one import Concept, RankOne, inverse_covariance
from trainer.methods.textual_inversion import TextualInversion
from trainer.samples import Batch

VALUES, CONCEPT = "values", "concept"
CONTEXT = "context"  # the conditioning that those layers read
SAMPLED_PER_NUMBER = 8  # encodings that the covariance is taken over, for each number of one
WORDS, PROMPTS = 12, 16  # words of a sampled prompt, prompts encoded at once
DIRECTION, KEY, OUTPUT = "perfusion.direction", "perfusion.key", "rank_one"


class Perfusion(Method):
    """Textual inversion and the edits, for base models with a UNet that reads text by cross-attention."""

    name: ClassVar[str] = "perfusion"
    needs_text_grad = True
    in_stock_pipelines: ClassVar[bool] = False

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self._tokens = TextualInversion(settings)
        self._net = ""
        self._concept: Concept | None = None
        self._edits: dict[str, RankOne] = {}  # by layer

    def attach(self, family: Family) -> list[ParameterGroup]:
        settings = self.settings
        layers = self._layers(family)
        with torch.no_grad():
            inverse = inverse_covariance(_sampled_encodings(family, settings.seed))
            of_class = _last_word(family, f"a photo of {settings.class_word}")
            groups = self._tokens.attach(family)
            concept = Concept(self._concept_in(family, [settings.trigger_word])[0], inverse)
            outputs = {
                name: nn.functional.linear(of_class.to(layer.weight), layer.weight) for name, layer in layers.items()
            }
        self._put_in(family, concept, outputs, trained=True)
        values = [edit.output for edit in self._edits.values() if edit.output.requires_grad]
        return [
            *groups,
            ParameterGroup(VALUES, values, settings.optimizer, settings.learning_rate),
        ]

    def _layers(self, family: Drawable) -> dict[str, nn.Linear]:
        """The layers that make keys and values of the text, by name; UserError for a model that has none."""
        if family.text_layers is None:
            raise UserError("method perfusion edits the cross-attention of a UNet: use it with Stable Diffusion or XL.")
        (self._net,) = (net.name for net in family.nets if net.part == DENOISER)
        modules = family.module(self._net).named_modules()
        return {name: module for name, module in modules if name.endswith(family.text_layers)}

    def _put_in(self, family: Drawable, concept: Concept, outputs: dict[str, Tensor], trained: bool) -> None:
        net = family.module(self._net)
        keys, _ = family.text_layers
        self._concept = concept.to(family.device)
        net.add_module(CONCEPT, concept)
        for name, output in outputs.items():
            layer = net.get_submodule(name)
            self._edits[name] = edit = RankOne(
                layer, concept, output.to(family.device), trained and not name.endswith(keys)
            )
            layer.add_module(OUTPUT, edit)  # where several processes find its gradients

    def _concept_in(self, family: Drawable, captions: list[str]) -> Tensor:
        """What the last of the new tokens is encoded to in each caption that has it: [N, D]."""
        words = self.words(captions)
        _, last = family.attended(words, self.tokens()[-1:])
        return family.encode_text(words)[CONTEXT][last]

    def schedule(self, progress: float) -> dict[str, float]:
        return self._tokens.schedule(progress) | {VALUES: scheduled(self.settings, progress)}

    def penalty(self) -> Tensor | float:
        return self._tokens.penalty()

    def words(self, captions: list[str]) -> list[str]:
        return self._tokens.words(captions)

    def prepared(self, family: Family, batch: Batch, dropout: bool = True) -> Batch:
        """In training, i* follows the concept's encoding in the step's captions."""
        if dropout:
            with torch.no_grad():
                self._concept.follow(self._concept_in(family, batch.captions))
        return batch

    def state(self) -> dict[str, Tensor]:
        return {DIRECTION: self._concept.direction.cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._concept.direction.copy_(state[DIRECTION])

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        before, self._concept.strength = self._concept.strength, 0.0
        try:
            yield
        finally:
            self._concept.strength = before

    def tokens(self) -> tuple[str, ...]:
        return self._tokens.tokens()

    def save(self, folder: Path, manifest: Manifest) -> None:
        tensors = {f"{self._net}.{name}.{OUTPUT}": edit.output for name, edit in self._edits.items()}
        tensors |= {f"{self._net}.{DIRECTION}": self._concept.direction, f"{self._net}.{KEY}": self._concept.key()}
        tensors = {name: value.detach().float().cpu() for name, value in tensors.items()}
        artifact.save_tensors(folder / artifact.ADAPTER, tensors, artifact.adapter_header(tensors, manifest))
        self._tokens.save(folder, manifest)

    def load(self, folder: Path, family: Drawable) -> None:
        layers = self._layers(family)
        stored, _ = artifact.load_tensors(folder / artifact.ADAPTER)
        width = next(iter(layers.values())).in_features
        sizes = {f"{self._net}.{name}.{OUTPUT}": layer.out_features for name, layer in layers.items()}
        sizes |= {f"{self._net}.{name}": width for name in (DIRECTION, KEY)}
        adapters.check_fit(self._net, stored, {name: torch.empty(size) for name, size in sizes.items()})
        concept = Concept(stored[f"{self._net}.{DIRECTION}"], key=stored[f"{self._net}.{KEY}"])
        outputs = {name: stored[f"{self._net}.{name}.{OUTPUT}"] for name in layers}
        self._put_in(family, concept, outputs, trained=False)
        self._tokens.load(folder, family)

    def detach(self, family: Drawable) -> None:
        self._tokens.detach(family)
        for name, edit in self._edits.items():
            edit.remove()
            delattr(family.module(self._net).get_submodule(name), OUTPUT)
        if self._concept is not None:
            delattr(family.module(self._net), CONCEPT)
        self._edits, self._concept = {}, None

    def set_strength(self, family: Drawable, strength: float) -> None:
        self._concept.strength = strength


def _sampled_encodings(family: Family, seed: int) -> Tensor:
    """Encodings of words of the vocabulary in random company: [N, D], more of them than they have numbers."""
    tokenizer, random = family.text[0].tokenizer, generator(seed, "covariance")
    special = set(tokenizer.all_special_ids)
    known = [id for id in range(len(tokenizer)) if id not in special]
    found: list[Tensor] = []
    while not found or sum(map(len, found)) < SAMPLED_PER_NUMBER * found[0].shape[1]:
        drawn = torch.randint(len(known), (PROMPTS, WORDS), generator=random).tolist()
        prompts = [" ".join(tokenizer.decode([known[i]]).strip() for i in row) for row in drawn]
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        words = ~torch.isin(ids, torch.tensor(sorted(special)))
        found.append(family.encode_text(prompts)[CONTEXT][words.to(family.device)].float())
    return torch.cat(found)


def _last_word(family: Family, prompt: str) -> Tensor:
    """What the last token of a prompt is encoded to: [D]."""
    place = len(family.text[0].tokenizer(prompt, truncation=True).input_ids) - 2  # before the end's
    return family.encode_text([prompt])[CONTEXT][0, place]
