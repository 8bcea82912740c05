"""New tokens that stand for the trigger word (textual inversion, Gal et al. 2022, arXiv:2208.01618).

Only the new rows exist as parameters, in fp32; every other row of the vocabulary stays bit-identical.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import TrainableTokensConfig
from torch import Tensor, nn
from transformers import AddedToken

from preprocessing.concepts import trigger_pattern
from preprocessing.errors import UserError
from trainer.artifact import Word
from trainer.config import JobSettings
from trainer.draws import generator
from trainer.families.base import Family, TextTower
from trainer.methods.adapters import inject, remove


@dataclass
class _Tower:
    """One text encoder's new rows, and what is needed to take them out."""

    tower: TextTower
    rows: nn.Parameter | None  # [n, d]; None until they are in place
    vocabulary_std: float
    vocabulary_size: int  # of the tokenizer: the rows behind are padding
    original_weight: Tensor  # the vocabulary as it was: [V, d]
    original_tokenizer: Any


class NewTokens:
    """New tokens in each of a family's tokenizers and text encoders: for each trigger word those that it stands for."""

    def __init__(self, words: Mapping[str, Sequence[str]]):
        self.by_trigger = {trigger: tuple(names) for trigger, names in words.items()}
        self.names = [name for names in self.by_trigger.values() for name in names]
        self._pattern = trigger_pattern(*words)
        self._towers: list[_Tower] = []

    def attach(
        self, family: Family, class_words: Mapping[str, str], seed: int, values: dict[str, Tensor] | None = None
    ) -> None:
        """Add the tokens. They start at `values` (embedding key -> [n, d], n being all tokens in order), else near
        their trigger's class word, else at random.
        """
        for tower in family.text:
            self._attach_one(family, tower, class_words, seed, values)

    def _attach_one(
        self, family: Family, tower: TextTower, class_words: Mapping[str, str], seed: int, values: dict | None
    ) -> None:
        tokenizer = copy.deepcopy(tower.tokenizer)
        if tokenizer.add_tokens(self.names) != len(self.names):
            raise UserError(f"Some of the tokens {self.names} are already words of the base model: choose another one.")
        # without its Parameter, whose data is replaced when the vocabulary grows
        original, size = tower.encoder.get_input_embeddings().weight.detach(), len(tower.tokenizer)
        if values is None:
            source = generator(seed, tower.name)
            starts = ((class_words.get(trigger, ""), len(names)) for trigger, names in self.by_trigger.items())
            rows = torch.cat([_initial_rows(tower, original[:size], word, (n, source)) for word, n in starts])
        else:
            rows = self._fitting(values, tower.embedding_key, original.shape[1])
        std = original[:size].float().std(dim=1).mean().item()
        # before the first change: what is stopped halfway (a request may be cancelled) can be taken out again
        self._towers.append(part := _Tower(tower, None, std, size, original, tower.tokenizer))
        tower.encoder.resize_token_embeddings(max(len(tokenizer), len(original)), mean_resizing=False)
        ids = tokenizer.convert_tokens_to_ids(self.names)
        config = TrainableTokensConfig(
            token_indices=ids, target_modules=[_embedding_name(tower.encoder)], init_weights=True
        )
        (part.rows,) = inject(tower.encoder, config)
        with torch.no_grad():
            part.rows.copy_(rows)
        family.replace_tokenizer(tower.name, tokenizer)

    def _fitting(self, values: dict[str, Tensor], key: str, width: int) -> Tensor:
        """The rows for one text encoder, checked: fp32 [n, width]."""
        wanted = (len(self.names), width)
        if key not in values or tuple(values[key].shape) != wanted:
            found = tuple(values[key].shape) if key in values else "missing"
            raise UserError(f"The token embeddings {key} of the weights are {found}, not {wanted}: use their own base.")
        return values[key].float()

    def detach(self, family: Family) -> None:
        """Take the tokens out; vocabulary, weights and tokenizers are what they were."""
        for part in self._towers:
            encoder = part.tower.encoder
            remove(encoder)
            embedding = encoder.get_input_embeddings()
            embedding.weight.data = part.original_weight
            embedding.num_embeddings = encoder.config.vocab_size = len(part.original_weight)
            family.replace_tokenizer(part.tower.name, part.original_tokenizer)
        self._towers = []

    def merge(self, family: Family) -> list[str]:
        """Make the rows part of the vocabularies for good, under names by which stock diffusers finds them.

        A pipeline of diffusers replaces a token `TOK` by `TOK TOK_1 TOK_2` where its tokenizer has these, so that the
        trigger alone is the prompt's word. Returns each trigger's: `<trigger>` where it is a token already.
        """
        vocabularies = [part.original_tokenizer.get_vocab() for part in self._towers]
        known = [any(trigger in one for one in vocabularies) for trigger in self.by_trigger]
        words = [f"<{one}>" if is_known else one for one, is_known in zip(self.by_trigger, known, strict=True)]
        counts = [len(names) for names in self.by_trigger.values()]
        names = [
            name
            for word, count in zip(words, counts, strict=True)
            for name in (word, *(f"{word}_{i}" for i in range(1, count)))
        ]
        for part in self._towers:
            encoder, tokenizer, rows = part.tower.encoder, copy.deepcopy(part.original_tokenizer), part.rows.detach()
            exact = [AddedToken(name, single_word=True, normalized=False) for name in names]
            if tokenizer.add_tokens(exact) != len(names):
                raise UserError(f"Some of the tokens {names} are already words of the base model: train with another.")
            remove(encoder)
            weight = encoder.get_input_embeddings().weight
            with torch.no_grad():
                weight[tokenizer.convert_tokens_to_ids(names)] = rows.to(weight)
            # configs of old say 2 and pool the text at its largest id, which is now a new token's
            encoder.config.eos_token_id = tokenizer.eos_token_id
            family.replace_tokenizer(part.tower.name, tokenizer)
        self._towers = []
        return words

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [part.rows for part in self._towers]

    def words(self, captions: list[str]) -> list[str]:
        """Captions with each trigger word replaced by its tokens, at word boundaries, exactly spelt.

        All in one pass, so that a trigger is not found in what another one was replaced by.
        """
        put = {trigger: "".join(names) for trigger, names in self.by_trigger.items()}
        return [self._pattern.sub(lambda found: put[found.group()], caption) for caption in captions]

    def spread_penalty(self) -> Tensor:
        """Mean squared relative distance of each row's standard deviation to the vocabulary's; fine for n = 1."""
        terms = [((part.rows.std(dim=1) / part.vocabulary_std - 1) ** 2).mean() for part in self._towers]
        return torch.stack(terms).mean()

    def vocabularies(self) -> list[Tensor]:
        """Each text encoder's own words: [V, d]."""
        return [part.original_weight[: part.vocabulary_size] for part in self._towers]

    def rows(self) -> dict[str, Tensor]:
        """The new rows by embedding key: fp32 [n, d]."""
        return {part.tower.embedding_key: part.rows.detach().float().cpu() for part in self._towers}


def _embedding_name(encoder: nn.Module) -> str:
    """The last part of the vocabulary's name in a text encoder."""
    vocabulary = encoder.get_input_embeddings()
    return next(name for name, module in encoder.named_modules() if module is vocabulary).rsplit(".", 1)[-1]


def token_names(settings: JobSettings) -> dict[str, tuple[str, ...]]:
    """<s0>, <s1>, ... by trigger, numbered on from one to the next."""
    number = itertools.count()
    return {
        one.trigger_word: tuple(f"<s{next(number)}>" for _ in range(one.n_tokens or settings.n_tokens))
        for one in settings.taught
    }


def words_of(settings: JobSettings, tokens: Sequence[str]) -> dict[str, Any]:
    """Fields of a Manifest that say which word stands for what; `tokens` are all that the method has, perhaps none."""
    names = token_names(settings) if tokens else {}
    words = tuple(
        Word(trigger_word=one.trigger_word, tokens=names.get(one.trigger_word, ()), class_word=one.class_word)
        for one in settings.taught
    )
    first = {"trigger_word": words[0].trigger_word, "class_word": words[0].class_word, "tokens": tuple(tokens)}
    return first | {"concepts": words if settings.concepts else ()}


def _initial_rows(tower: TextTower, vocabulary: Tensor, class_word: str, draw: tuple[int, torch.Generator]) -> Tensor:
    """[n, d] random rows of the vocabulary's mean spread, around the class word's mean row where there is one."""
    count, source = draw
    vocabulary = vocabulary.detach().float().cpu()
    rows = torch.randn(count, vocabulary.shape[1], generator=source)
    rows = rows / rows.std(dim=1, keepdim=True) * vocabulary.std(dim=1).mean()
    if not class_word:
        return rows
    ids = tower.tokenizer(class_word, add_special_tokens=False).input_ids
    centre = vocabulary[ids].mean(dim=0)
    # a little noise only: equal rows would stay equal, having equal gradients but for their positions
    return centre + 0.1 * rows
