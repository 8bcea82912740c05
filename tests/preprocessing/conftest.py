"""Captioners small enough to be taught within a test run, in the stock formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "green", "blue", "square", "there", "is"]
LESSONS = {"red": "a red square", "lime": "a green square", "blue": "there is a blue square"}
SIZE = 32
POSITIONS = 16  # fewer than the longest caption
QUESTION = "what is in the image ?"


def lesson_pictures() -> list[Image.Image]:
    return [Image.new("RGB", (SIZE, SIZE), colour) for colour in LESSONS]


def teach(model: Any, inputs: dict[str, Any], steps: int, rate: float = 1e-2) -> None:
    """Learn `inputs`, their labels among them, by heart; without dropout, which would only take longer."""
    import torch

    optimiser = torch.optim.AdamW(model.eval().parameters(), lr=rate)
    for _ in range(steps):
        loss = model(**inputs).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _untaught(folder: Path):
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=shape
        | {
            "vocab_size": len(WORDS),
            "encoder_hidden_size": 32,
            "projection_dim": 32,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": WORDS.index("[PAD]"),
            "bos_token_id": WORDS.index("[DEC]"),
            "sep_token_id": WORDS.index("[SEP]"),
            "eos_token_id": WORDS.index("[SEP]"),
        },
        vision_config=shape | {"image_size": SIZE, "patch_size": 16, "projection_dim": 32, "initializer_range": 0.1},
        projection_dim=32,
        image_text_hidden_size=32,
    )
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer)
    processor.save_pretrained(folder)
    return BlipForConditionalGeneration(config), processor


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock BLIP folder that tells a red, a green and a blue square apart."""
    import torch

    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    model, processor = _untaught(folder)
    # The lines begin as the model is asked to: with its own token for the start, which the tokenizer does not write.
    tokens = processor(text=list(LESSONS.values()), padding=True, return_tensors="pt").input_ids
    tokens[:, 0] = WORDS.index("[DEC]")
    labels = tokens.masked_fill(tokens == 0, -100)
    inputs = processor(images=lesson_pictures(), return_tensors="pt")
    teach(model, dict(inputs, input_ids=tokens, labels=labels), 80, 5e-3)
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", name="word_tokenizer")
def word_tokenizer_maker():
    """Makes tokenizers of whole words."""
    return word_tokenizer


def word_tokenizer(specials: list[str], **options: Any):
    """A tokenizer of whole words: `specials` first, then what the lessons and questions hold."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(" ".join([*LESSONS.values(), QUESTION, "describe detail what shown user assistant"]).split())
    vocabulary = {word: number for number, word in enumerate([*specials, *words, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


@pytest.fixture(scope="session")
def florence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Florence-2 folder that tells red from green."""
    import torch
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    specials = ["<s>", "<pad>", "</s>", "<image>"]
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = word_tokenizer(specials, extra_special_tokens={"image_token": "<image>"}, **names)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, **ids}
    vision = {"embed_dim": [8, 8, 8, 16], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2], "window_size": 4}
    vision |= {"depths": [1, 1, 1, 1], "projection_dim": 16, "drop_path_rate": 0.0, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(
        Florence2Config(
            text_config={"model_type": "bart", "vocab_size": len(tokenizer), "dropout": 0.0, **text},
            vision_config=vision,
            image_token_id=specials.index("<image>"),
        )
    )
    square = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    pictures.image_seq_length = 2  # what a picture of this size becomes: one patch and the mean of all
    processor = Florence2Processor(pictures, tokenizer, post_processor_config={"pure_text": {}})
    lessons = list(LESSONS.values())[:2]
    inputs = processor(images=lesson_pictures()[:2], text=["<DETAILED_CAPTION>"] * 2, padding=True, return_tensors="pt")
    labels = tokenizer([f"{line} </s>" for line in lessons], padding=True, return_tensors="pt").input_ids
    teach(model, dict(inputs, labels=labels), 200, 5e-3)
    folder = tmp_path_factory.mktemp("florence2")
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ c.text }} {% endif %}{% endfor %}<|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Qwen3-VL folder that tells a red, a green and a blue square apart when it is asked QUESTION."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from preprocessing.captioners.qwen_vl import QwenVlCaptioner

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    tokenizer = word_tokenizer(
        specials, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=specials[1:]
    )
    tokenizer.chat_template = CHAT
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(tokenizer), "bos_token_id": 1, **text},
        vision_config=vision,
        image_token_id=specials.index("<|image_pad|>"),
        video_token_id=0,
        vision_start_token_id=specials.index("<|vision_start|>"),
        vision_end_token_id=specials.index("<|vision_end|>"),
    )
    folder = tmp_path_factory.mktemp("qwen")
    limits = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=limits).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)

    captioner = QwenVlCaptioner(QUESTION, str(folder))
    asked = captioner._inputs(lesson_pictures())
    said = tokenizer(
        [f"{line} <|im_end|>" for line in LESSONS.values()], padding=True, padding_side="right", return_tensors="pt"
    )
    labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)
    whole = {
        "input_ids": torch.cat([asked["input_ids"], said.input_ids], 1),
        "attention_mask": torch.cat([asked["attention_mask"], said.attention_mask], 1),
        "mm_token_type_ids": torch.cat([asked["mm_token_type_ids"], torch.zeros_like(said.input_ids).int()], 1),
        "labels": torch.cat([torch.full_like(asked["input_ids"], -100), labels], 1),
    }
    teach(captioner._model, asked | whole, 60, 5e-3)
    captioner._model.save_pretrained(folder)
    return folder
