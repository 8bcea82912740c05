"""What a user can set about preparing the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PrepareSettings(BaseModel):
    """Settings of the stage that turns an archive into a PreparedDataset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_images: Path = Field(description="Archive (zip, tar, tar.gz) or folder of pictures, captions beside them.")
    trigger_word: str = Field("TOK", min_length=1, pattern=r"^\S+$", description="Word that calls the subject.")
    captioner: Literal["auto", "toybox", "blip", "none"] = Field(
        "auto", description="Captions pictures that have none; auto takes the one that suits the base model."
    )
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="Side in pixels of a square bucket of the trained size; None: the model's own.",
    )
    horizontal_flip: bool = Field(False, description="Also train on mirrored pictures.")
    mask_from_alpha: bool = Field(False, description="Train only on what a picture's alpha channel shows.")
