"""The text encoder and its tokenizers: words of the captions, or any tokenizer of transformers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError

PAD, UNKNOWN, END, BEGIN = "<pad>", "<unk>", "<eos>", "<bos>"
NO_TOKEN = -1  # fills the ids of a batch up to one length


def vocabulary_tokenizer(captions: Iterable[str], vocab_size: int) -> Any:
    """A tokenizer of the captions' own words, lower case: the `vocab_size` most frequent, with the special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normaliser = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    counts = Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(caption))
    )
    special = [PAD, UNKNOWN, END, BEGIN]
    if vocab_size < len(special):
        raise UserError(f"vocab_size {vocab_size} leaves no room for the special tokens: give {len(special)} or more.")
    # ties in the order of the alphabet, so that the same captions make the same vocabulary in any order
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(special)]
    words = {word: index for index, word in enumerate([*special, *(w for w in frequent if w not in special)])}
    inner = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    inner.normalizer, inner.pre_tokenizer = normaliser, splitter
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, words[BEGIN]), (END, words[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, bos_token=BEGIN
    )


def pretrained_tokenizer(name: str) -> Any:
    """A tokenizer by its Hub id or folder (gpt2, bert-base-uncased); UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name!r} could not be loaded ({type(error).__name__}): give a Hub id or a folder of a "
            f"transformers tokenizer, or leave it out for a vocabulary of the captions' words."
        ) from error


def token_ids(tokenizer: Any, captions: list[str], longest: int) -> Tensor:
    """Ids [B, longest] of the captions, cut to `longest`, NO_TOKEN after them.

    A caption without a token (GPT-2 puts none around "") is the tokenizer's end, so that there is a word to look at.
    """
    ids = torch.full((len(captions), longest), NO_TOKEN, dtype=torch.int32)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    for row, caption in enumerate(captions):
        own = tokenizer(caption, truncation=True, max_length=longest).input_ids or [end or 0]
        ids[row, : len(own)] = torch.tensor(own)
    return ids


def sinusoids(length: int, channels: int) -> Tensor:
    """Sines and cosines of the positions (Vaswani et al. 2017, arXiv:1706.03762, 3.5): [length, channels]."""
    rates = torch.exp(torch.arange(0, channels, 2, dtype=torch.float64) * (-math.log(10000.0) / channels))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :channels].float()


class TextEncoder(nn.Module):
    """Token embeddings and sinusoids through pre-norm transformer layers; every word sees every other."""

    def __init__(self, vocab_size: int, channels: int, layers: int, heads: int, longest: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, channels)
        self.register_buffer("positions", sinusoids(longest, channels), persistent=False)
        layer = nn.TransformerEncoderLayer(
            channels, heads, 4 * channels, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(channels), enable_nested_tensor=False, mask_check=False
        )
        self.pool = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, L] -> states [B, L', D], mask [B, L'] that is true at words, and pooled [B, D]; L' the longest."""
        ids = ids[:, : int((ids != NO_TOKEN).sum(dim=1).max())]
        mask = ids != NO_TOKEN
        embedded = self.embedding(ids.clamp(min=0))
        embedded = embedded + self.positions[: ids.shape[1]].to(embedded.dtype)
        states = self.layers(embedded, src_key_padding_mask=~mask)
        share = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True)
        return states, mask, self.pool((states * share[..., None]).sum(dim=1))
