"""Trained vectors before the input of a frozen text encoder (prompt tuning: Lester et al. 2021, arXiv:2104.08691).

    ids of L tokens             b  t0 t1 ...           b: what the tokenizer puts before every text, if anything
    with a place for P more     b  ?  ?  ?  t0 t1 ...  placeholder ids, whose embeddings are replaced by the vectors
    hidden states               b  -  -  -  t0 t1 ...  the P are taken out again: L states of the text, as without

Mask and positions grow with the ids, and all of the encoder's layers run over all of them. An encoder with a fixed
number of positions (CLIP) reads P tokens less of a long text; its last state is repeated, so that L states come out.
What reads the states, and the text's mask, are as without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.draws import generator
from trainer.families.base import TextTower

NAME = "soft_prefix"  # of the module in the text encoder


class PromptEmbeddings(nn.Module):
    """The P vectors, fp32 [P, D], as a part of their text encoder, with which they move."""

    def __init__(self, rows: Tensor, dropout: float):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(rows)
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        """[P, D]; in training some numbers are dropped and the others grow to make up for them."""
        return self.dropout(self.prompt_embeddings)


class SoftPrefix:
    """A prefix in one text encoder, from the moment it is made until `remove`."""

    def __init__(self, tower: TextTower, rows: Tensor, dropout: float = 0.0):
        """`rows` are its first values, [P, D]. UserError where the encoder is left with no place for a text."""
        encoder = tower.encoder
        if tower.positions is not None and len(rows) + tower.begin + 2 > tower.positions:
            raise UserError(
                f"num_prefix_tokens {len(rows)} leaves no place for words: the {tower.name} reads {tower.positions} "
                "tokens in all."
            )
        self.tower, self.strength = tower, 1.0
        self.vectors = PromptEmbeddings(rows.to(encoder.device, torch.float32), dropout).train(encoder.training)
        self._keys: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None
        encoder.add_module(NAME, self.vectors)
        encoder.forward = partial(self._forward, encoder.forward)

    @property
    def rows(self) -> nn.Parameter:
        return self.vectors.prompt_embeddings

    def remove(self) -> None:
        """Leave the encoder as it was."""
        encoder = self.tower.encoder
        if NAME in encoder._modules:
            del encoder.forward, encoder._modules[NAME]

    @contextmanager
    def weighing(self, strength: float) -> Iterator[None]:
        """Inside, the states lie `strength` of the way from those without the prefix to those with it."""
        before, self.strength = self.strength, strength
        try:
            yield
        finally:
            self.strength = before

    def _forward(
        self, plain: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        """What stands for the encoder's own `forward`, which is `plain`."""
        if self.strength == 0:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **options)
        if self._continues(plain):
            found = self._continued(plain, input_ids, attention_mask, options)
        else:
            found = self._whole(plain, input_ids, attention_mask, options)
        if self.strength == 1:
            return found
        without = iter(_states(plain(input_ids=input_ids, attention_mask=attention_mask, **options)))
        return _changed(found, lambda one: torch.lerp(next(without), one, self.strength))

    def _whole(self, plain: Any, ids: Tensor, mask: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
        """Prefix and text in one pass."""
        count, begin, length = len(self.rows), self.tower.begin, ids.shape[1]
        kept = self._shortened(ids)
        # an id that is no end of the text, by which it is pooled
        placeholders = ids.new_full((len(ids), count), self.tower.tokenizer.bos_token_id or 0)
        longer = torch.cat([kept[:, :begin], placeholders, kept[:, begin:]], dim=1)
        if mask is not None:
            mask = torch.cat([mask[:, :begin], torch.ones_like(placeholders), mask[:, begin : kept.shape[1]]], dim=1)
        with self._inserted():
            output = plain(input_ids=longer, attention_mask=mask, **options)

        def text(states: Tensor) -> Tensor:
            if states.ndim != 3:  # pooled
                return states
            states = torch.cat([states[:, :begin], states[:, begin + count :]], dim=1)
            return torch.cat([states, states[:, -1:].expand(-1, length - states.shape[1], -1)], dim=1)

        return _changed(output, text)

    def _shortened(self, ids: Tensor) -> Tensor:
        """The ids of what there is room for beside the prefix, ending as they did."""
        room = ids.shape[1] if self.tower.positions is None else self.tower.positions - len(self.rows)
        kept = ids[:, :room]
        end = self.tower.tokenizer.eos_token_id
        cut = (ids == end).any(dim=1) & ~(kept == end).any(dim=1)
        last = torch.where(cut, torch.full_like(kept[:, -1], end), kept[:, -1])
        return torch.cat([kept[:, :-1], last[:, None]], dim=1)

    @contextmanager
    def _inserted(self) -> Iterator[None]:
        """Inside, the vocabulary's embeddings of the placeholders are the prefix, in their precision."""
        encoder, begin = self.tower.encoder, self.tower.begin
        vocabulary = encoder.get_input_embeddings().weight

        def replaced(module: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
            rows = self.vectors().to(embedded.dtype).expand(len(embedded), -1, -1)
            return torch.cat([embedded[:, :begin], rows, embedded[:, begin + rows.shape[1] :]], dim=1)

        with ExitStack() as stack:
            for module in encoder.modules():  # T5's lies under two names
                if isinstance(module, nn.Embedding) and module.weight is vocabulary:
                    stack.callback(module.register_forward_hook(replaced).remove)
            yield

    def _continues(self, plain: Any) -> bool:
        """Whether nothing trains and the encoder is causal from its first token on, and keeps keys and values."""
        learns = torch.is_grad_enabled() and self.rows.requires_grad
        return not learns and not self.tower.begin and "past_key_values" in signature(plain).parameters

    @torch.no_grad()
    def _continued(self, plain: Any, ids: Tensor, mask: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
        """The text alone, behind the prefix's keys and values, which are computed once. Exactly the same."""
        from transformers import DynamicCache

        count = len(self.rows)
        if self._keys is None or not torch.equal(self._keys[0], self.rows):
            rows = self.rows.detach()
            first = self.tower.encoder.get_input_embeddings().weight
            past = plain(inputs_embeds=rows.to(first.dtype)[None], use_cache=True).past_key_values
            self._keys = (rows.clone(), [(layer.keys, layer.values) for layer in past.layers])
        pairs = [tuple(one.expand(len(ids), -1, -1, -1) for one in pair) for pair in self._keys[1]]
        mask = torch.ones_like(ids) if mask is None else mask
        mask = torch.cat([mask.new_ones(len(ids), count), mask], dim=1)
        options = options | {"past_key_values": DynamicCache(pairs), "use_cache": True}
        output = plain(input_ids=ids, attention_mask=mask, **options)
        output["past_key_values"] = None
        return output


def _changed(output: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A model's output with `change` of each of its tensors of states."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            output[name] = change(value)
        elif name == "hidden_states" and value is not None:
            output[name] = tuple(change(one) for one in value)
    return output


def _states(output: dict[str, Any]) -> list[Tensor]:
    """The tensors that `_changed` changes, in its order."""
    found: list[Tensor] = []
    _changed(dict(output), lambda one: found.append(one) or one)
    return found


def initial_rows(tower: TextTower, count: int, text: str, seed: int) -> Tensor:
    """`count` rows of the vocabulary, fp32 [count, D]: those of a text's tokens, repeated or cut, or without one a
    random choice, as peft starts a prompt. UserError for a text without tokens.
    """
    words = tower.encoder.get_input_embeddings().weight.detach()[: len(tower.tokenizer)]
    if text:
        ids = tower.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"prefix_init_text {text!r} has no token that the {tower.name} knows: give a few words.")
        chosen = torch.tensor(ids).repeat(-(-count // len(ids)))[:count]
    else:
        chosen = torch.randperm(len(words), generator=generator(seed, "prefix", tower.name))[:count]
        chosen = chosen.repeat(-(-count // len(chosen)))[:count]
    return words[chosen.to(words.device)].float().cpu().clone()
