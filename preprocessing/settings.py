"""What a user can set about preparing the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from preprocessing.concepts import EVERY, Concept, as_entries, check_together

Mode = Literal["subject", "face", "style", "captions"]


class PrepareSettings(BaseModel):
    """Settings of the stage that turns an archive into a PreparedDataset."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_images: Path = Field(
        description="Archive (zip, tar, tar.gz) or folder of pictures, captions beside them; or a data set: see source."
    )
    source: Literal["auto", "files", "dataset", "cifar100", "imagenet", "imagenet10k", "coco", "toybox"] = Field(
        "auto",
        description="dataset: input_images is a Hub id, or local Parquet, WebDataset or ImageFolder files, streamed. "
        "auto: that for a folder of nothing but .parquet or .tar files. cifar100 (binary version), imagenet and "
        "imagenet10k (class folders), coco: input_images is where it lies; toybox: the drawn world, input_images any.",
    )
    dataset_split: str = Field("train", description="Split of a data set.")
    image_column: str | None = Field(None, description="Column of a data set's pictures; None: the only one with some.")
    caption_column: str | None = Field(None, description="Column of its captions; None: caption, text, prompt or txt.")
    condition_columns: tuple[str, ...] | None = Field(
        None, description="Columns of its condition pictures, in order; None: condition, condition.1, ..."
    )
    dataset_layout: Literal["auto", "single", "pairs"] = Field(
        "auto",
        description="pairs: as Subjects200K, two pictures of a subject side by side; each is drawn from the other. "
        "auto: that where its columns are.",
    )
    max_pictures: int | None = Field(None, ge=1, description="Take no more than so many from a data set.")
    mode: Mode = Field("subject", description="What is taught; decides wordings, masks, flips and preview prompts.")
    trigger_word: str = Field("TOK", min_length=1, pattern=r"^\S+$", description="Word that calls the subject.")
    class_word: str = Field("", description="What the subject is, in one word; starts the tokens and is kept as it is.")
    concepts: tuple[Concept, ...] = Field(
        (),
        description="Several things in one job, each in a folder of the upload: names of folders, or for each folder, "
        "trigger_word, class_word, n_tokens, weight, mask_prompt; folders: every folder at the top is one.",
    )
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
    extra_resolutions: tuple[int, ...] = Field(
        (), description="Train on every picture at these too, where it is large enough for them."
    )
    bucket_ratio: float = Field(
        4.0, ge=1, le=64, description="Most extreme aspect ratio of a bucket; pictures beyond it are cropped to it."
    )
    small_pictures: Literal["refuse", "keep", "upscale"] = Field(
        "keep",
        description="Pictures with fewer pixels than their bucket: left out, trained in a smaller bucket, or enlarged.",
    )
    upscale_model: str | None = Field(
        None, description="Hub id or folder of a Swin2SR model that enlarges small pictures; None: Lanczos."
    )
    folder_repeats: bool = Field(False, description="Pictures in a folder called like 10_dog count ten times.")
    horizontal_flip: bool = Field(False, description="Also train on mirrored pictures; not with mode face.")
    mask_from: Literal["auto", "none", "alpha", "text", "face"] = Field(
        "auto",
        description="Where the loss counts: alpha channel, what mask_prompt names, or faces; a mask in the upload "
        "(x.mask.png, masks/x.png) always wins. auto: face in mode face, else only such masks.",
    )
    mask_prompt: str = Field("", description="What mask_from text looks for; empty: class_word, or face in mode face.")
    mask_model: str | None = Field(None, description="Hub id or folder of the CLIPSeg model of mask_from text.")
    mask_background: float = Field(0.0, ge=0, le=1, description="Weight of the loss outside of a mask.")
    crop: Literal["auto", "centre", "mask"] = Field(
        "auto", description="The middle of a picture, or around its mask. auto: mask in mode face, else centre."
    )
    crop_margin: float = Field(
        0.4, ge=0, le=10, description="Around a mask, how much to keep on each side, as a share of its sides."
    )
    workers: int | None = Field(
        None, ge=0, le=256, description="Processes that decode pictures; 0: none beside this one, null: as fits."
    )

    @field_validator("concepts", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        return as_entries(value)

    @field_validator("class_word", "caption_prefix", "caption_suffix", "mask_prompt")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join(value.split())

    @field_validator("extra_resolutions")
    @classmethod
    def _are_resolutions(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 16 <= one <= 4096 for one in value):
            raise ValueError("must be from 16 to 4096")
        return value

    @model_validator(mode="after")
    def _modes_fit(self) -> PrepareSettings:
        if self.mode == "face" and self.horizontal_flip:
            raise ValueError("horizontal_flip would teach another face, because none is symmetric: leave it off")
        if self.mask_from == "text" and not self.concepts and not self.mask_words:
            raise ValueError("mask_from text needs mask_prompt or class_word, the words that it looks for")
        return self

    @model_validator(mode="after")
    def _concepts_fit(self) -> PrepareSettings:
        if not self.concepts:
            return self
        check_together(self.concepts)
        for name in ("trigger_word", "class_word", "mask_prompt"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is given for each of concepts: leave it out beside them")
        if self.mode == "captions":
            raise ValueError("concepts are called by trigger words, which mode captions has not: use another mode")
        if self.source not in ("auto", "files"):
            raise ValueError(f"concepts lie in folders, which source {self.source} has not: give files")
        return self

    @property
    def taught(self) -> tuple[Concept, ...]:
        """What is taught, each with its trigger. Of `concepts` folders it is known when the upload has been read."""
        if any(one.folder == EVERY for one in self.concepts):
            raise ValueError("the concepts are those of folders that nobody has looked at yet")
        alone = Concept(trigger_word=self.trigger_word, class_word=self.class_word, mask_prompt=self.mask_prompt)
        return tuple(one for one in self.concepts if not one.concepts) or (alone,)

    @property
    def class_words(self) -> dict[str, str]:
        """The class word, or "", by trigger."""
        return {one.trigger_word: one.class_word for one in self.taught}

    def words_of(self, concept: Concept) -> str:
        """What mask_from text looks for in one concept's pictures."""
        own = [one for one in self.taught if one.trigger_word in concept.triggers]
        return concept.mask_prompt or " and ".join(word for one in own if (word := one.mask_prompt or one.class_word))

    def singles(self, concept: Concept) -> tuple[PrepareSettings, ...]:
        """These settings for each of the concepts that a folder's pictures show, as if it were the only one."""
        return tuple(
            self.model_copy(
                update={
                    "concepts": (),
                    "trigger_word": one.trigger_word,
                    "class_word": one.class_word,
                    "mask_prompt": self.words_of(concept),
                }
            )
            for one in self.taught
            if one.trigger_word in concept.triggers
        )

    @property
    def mask_words(self) -> str:
        """What mask_from text looks for."""
        return self.mask_prompt or self.class_word or ("face" if self.mode == "face" else "")

    @property
    def mask_source(self) -> str:
        """`mask_from` with auto settled: "none", "user" (those in the upload alone), "alpha", "text" or "face"."""
        return {"auto": "face" if self.mode == "face" else "user"}.get(self.mask_from, self.mask_from)

    @property
    def crops_to_mask(self) -> bool:
        """`crop` with auto settled."""
        return self.crop == "mask" or (self.crop == "auto" and self.mode == "face")
