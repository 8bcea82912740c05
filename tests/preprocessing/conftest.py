"""A captioner small enough to be taught within a test run, in the stock format."""

from pathlib import Path

import pytest
from PIL import Image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "green", "blue", "square", "there", "is"]
LESSONS = {"red": "a red square", "lime": "a green square", "blue": "there is a blue square"}
SIZE = 32
POSITIONS = 16  # fewer than the longest caption


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
    pictures = [Image.new("RGB", (SIZE, SIZE), colour) for colour in LESSONS]
    # The lines begin as the model is asked to: with its own token for the start, which the tokenizer does not write.
    tokens = processor(text=list(LESSONS.values()), padding=True, return_tensors="pt").input_ids
    tokens[:, 0] = WORDS.index("[DEC]")
    labels = tokens.masked_fill(tokens == 0, -100)
    inputs = processor(images=pictures, return_tensors="pt")
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(**inputs, input_ids=tokens, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.half().save_pretrained(folder)
    return folder
