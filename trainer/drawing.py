"""What a user can set about drawing pictures: `predict.py`'s flags are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# settings that only some base models have; see Drawable.draw_options
FOR_SOME = (
    *("prior_guidance_scale", "prior_num_inference_steps", "image_guidance_scale"),
    *("temperature", "top_p", "class_label"),
)
Scheduler = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmsolver++", "unipc"]


class DrawSettings(BaseModel):
    """What is drawn and how; None takes the base model's own value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description="What to draw; the trigger word calls the subject.")
    negative_prompt: str = Field("", description="What to keep away from.")
    num_outputs: int = Field(1, ge=1, le=64, description="Pictures, with the seeds seed, seed + 1, ...")
    width: int | None = Field(None, ge=16, le=4096, description="In pixels.")
    height: int | None = Field(None, ge=16, le=4096, description="In pixels.")
    guidance_scale: float | None = Field(None, ge=0, le=50, description="How strictly the prompt is followed.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps.")
    prior_guidance_scale: float | None = Field(
        None, ge=0, le=50, description="The same of the prior, of a model that has one (Kandinsky 2.2)."
    )
    prior_num_inference_steps: int | None = Field(None, ge=2, le=1000, description="The prior's denoising steps.")
    image_guidance_scale: float | None = Field(
        None, ge=0, le=50, description="How strictly references are followed (OmniGen2); 1 or less: by the prompt only."
    )
    temperature: float | None = Field(
        None, ge=0, le=10, description="Of an autoregressive model's choices (pixel_ar); 0 takes the likeliest value."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="The likeliest values that together have this probability are chosen from."
    )
    class_label: int | None = Field(None, ge=0, description="Number of the class, of a model that learned some.")
    scheduler: Scheduler | None = Field(None, description="How the steps are taken.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="The same seed draws the same picture; null: a random one."
    )
    true_cfg_scale: float | None = Field(
        None,
        ge=1,
        le=50,
        description="FLUX dev: guidance by a second call with the negative prompt; null: 2 with one, else none.",
    )
    lora_scale: float = Field(1.0, ge=-4, le=4, description="Strength of the trained weights; 0 is the base model.")
    more_scales: tuple[float, ...] | None = Field(
        None, description="Strengths of more_weights, one for each; null: lora_scale."
    )
    token_scale: float | None = Field(
        None, ge=0, le=2, description="Strength of the trained tokens; null: one that suits lora_scale."
    )
    references: tuple[Path, ...] | None = Field(
        None, min_length=1, max_length=5, description="Pictures that the prompt speaks of (OmniGen2); one is edited."
    )
    image: Path | None = Field(None, description="Picture to start from (img2img).")
    mask: Path | None = Field(
        None, description="With an image of its size: white is drawn anew, black stays (inpaint)."
    )
    condition: tuple[Path, ...] | None = Field(
        None,
        description="Pictures to draw from, for weights of method condition: their edges, their greys, ... Of FLUX "
        "Kontext the one picture that it changes.",
    )
    condition_ready: bool = Field(False, description="The condition pictures are edges, greys, ... already.")
    condition_strength: float = Field(1.0, ge=0, le=10, description="Weight of the conditions; 0 hides them.")
    keep_known: bool = Field(
        True, description="Task fill: what mask leaves black is the condition's own pixels, and not drawn ones."
    )
    prompt_strength: float = Field(0.8, ge=0, le=1, description="With an image: 1 draws over all of it, 0 keeps it.")

    @model_validator(mode="after")
    def _fits_together(self) -> DrawSettings:
        if self.mask is not None and self.image is None and not self.condition:
            raise ValueError("mask says which part of an image is drawn anew: give image too")
        if self.image is not None and self.condition:
            raise ValueError("image and condition cannot be drawn from together: give one of them")
        if any(not -4 <= scale <= 4 for scale in self.more_scales or ()):
            raise ValueError("more_scales must be from -4 to 4")
        return self
