"""What a user can set about preparing the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Mode = Literal["subject", "face", "style"]


class PrepareSettings(BaseModel):
    """Settings of the stage that turns an archive into a PreparedDataset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_images: Path = Field(description="Archive (zip, tar, tar.gz) or folder of pictures, captions beside them.")
    mode: Mode = Field("subject", description="What is taught; decides wordings, masks, flips and preview prompts.")
    trigger_word: str = Field("TOK", min_length=1, pattern=r"^\S+$", description="Word that calls the subject.")
    class_word: str = Field("", description="What the subject is, in one word; starts the tokens and is kept as it is.")
    captioner: Literal["auto", "toybox", "blip", "florence2", "qwen-vl", "lavis", "none"] = Field(
        "auto", description="Captions pictures that have none; auto takes the one that suits the base model."
    )
    captioner_model: str | None = Field(
        None, description="Hub id or folder that the captioner loads in place of its own model."
    )
    caption_instruction: str | None = Field(
        None, description="What qwen-vl is asked; {subject} stands for the class_word. None: what suits the mode."
    )
    caption_identity: Literal["replace", "noun", "keep"] = Field(
        "replace",
        description="In captioned lines, what the trigger takes the place of, given class_word: "
        '"a red robot" (replace), "robot" alone (noun), or nothing (keep).',
    )
    caption_common: Literal["keep", "strip"] = Field(
        "keep", description="Fragments that four in five captioned lines share: what always is so belongs to the word."
    )
    caption_prefix: str = Field("", description="Put before every caption that does not begin with it.")
    caption_suffix: str = Field("", description="Put behind every caption that does not end in it.")
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="Side in pixels of a square bucket of the trained size; None: the model's own.",
    )
    horizontal_flip: bool = Field(False, description="Also train on mirrored pictures; not with mode face.")
    mask_from_alpha: bool = Field(False, description="Train only on what a picture's alpha channel shows.")

    @field_validator("class_word", "caption_prefix", "caption_suffix")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join(value.split())

    @model_validator(mode="after")
    def _face_is_not_mirrored(self) -> PrepareSettings:
        if self.mode == "face" and self.horizontal_flip:
            raise ValueError("horizontal_flip would teach another face, because none is symmetric: leave it off")
        return self
