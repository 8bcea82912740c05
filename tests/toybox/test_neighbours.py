"""Heads of a FLUX that begin by looking at a token's neighbours."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from toybox.neighbours import ACROSS, BESIDE, query_and_key
from toybox.train_flux import build_transformer

SIDE = 8  # tokens
AXES = (4, 14, 14)


@pytest.mark.parametrize("offset", [*BESIDE, *ACROSS])
def test_a_token_looks_most_at_the_one_that_lies_there(offset: tuple[int, int]) -> None:
    places = FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32)
    rotary = FluxPosEmbed(theta=10000, axes_dim=list(AXES))(places)
    turned = [
        apply_rotary_emb(one.expand(1, SIDE**2, 1, -1), rotary, sequence_dim=1) for one in query_and_key(offset, AXES)
    ]
    looked_at = torch.einsum("bqhd,bkhd->qk", *turned).argmax(dim=1)
    for token in range(SIDE**2):
        row, column = token // SIDE + offset[0], token % SIDE + offset[1]
        if 0 <= row < SIDE and 0 <= column < SIDE:
            assert looked_at[token] == row * SIDE + column


def test_queries_and_keys_are_as_long_as_their_norm_leaves_them() -> None:
    for one in query_and_key((1, -1), AXES):
        assert one.norm() == pytest.approx(sum(AXES) ** 0.5)


def test_every_block_keeps_heads_that_begin_by_what_tokens_hold() -> None:
    transformer = build_transformer()
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        by_place = block.attn.to_q.bias.view(6, 32).abs().sum(dim=1) > 0
        assert by_place.tolist() == [True] * 4 + [False] * 2
