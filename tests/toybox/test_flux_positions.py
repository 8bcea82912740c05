"""The toybox's FLUX is told where its tokens lie."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from toybox.captions import caption
from toybox.diffusion import build_clip_tokenizer
from toybox.flux_positions import END, REGISTERS
from toybox.train_flux import T5_TOKENS, FluxLearner, build_t5_tokenizer
from toybox.world import random_scene

rng = random.Random(3)
CAPTIONS = [caption(random_scene(rng), rng) for _ in range(160)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_t5_tokenizer(CAPTIONS)


def told_places(learner: FluxLearner) -> float:
    """How often a linear probe of what the first single block writes names a token's place, on unseen noise."""
    kept = []
    block = learner.transformer.single_transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, given, out: kept.append(out[1].float()))
    with torch.no_grad():
        learner(torch.randn(96, 4, 16, 16), CAPTIONS[:96])
    hook.remove()
    inputs = torch.cat([kept[0], torch.ones(96, 64, 1)], dim=-1)
    places = torch.eye(64).repeat(64, 1)
    probe = torch.linalg.lstsq(inputs[:64].flatten(0, 1), places).solution
    return ((inputs[64:] @ probe).argmax(dim=-1) == torch.arange(64)).float().mean().item()


def test_one_block_tells_each_token_its_place(tokenizer):
    torch.manual_seed(0)
    learner = FluxLearner((build_clip_tokenizer(CAPTIONS), tokenizer), shift=0.0, scale=1.0)
    assert told_places(learner) < 0.2
    learner.tell_positions(CAPTIONS[96:])
    assert told_places(learner) > 0.9


def test_every_text_ends_in_the_registers_also_after_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    registers = [f"<register_{index}>" for index in range(REGISTERS)]
    for text in ("", "a red star", "red " * 100):
        ids = AutoTokenizer.from_pretrained(tmp_path)(
            text, padding="max_length", truncation=True, max_length=T5_TOKENS
        ).input_ids
        tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token != tokenizer.pad_token]
        assert len(ids) == T5_TOKENS
        assert tokens[-1 - REGISTERS :] == [END, *registers]
