"""Every setting of a training job, in one frozen model: `train.py`'s flags, its YAML and config.yaml are made from it.

A setting whose default is None takes the base model's recommended value (see `trainer.families.recommended`) when
the job starts; the values used are saved with the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from preprocessing.errors import UserError
from preprocessing.settings import PrepareSettings

TokenOptimiser = Literal["adamw", "adamw8bit", "prodigy"]
Optimiser = Literal[TokenOptimiser, "muon"]
Schedule = Literal["constant", "linear", "cosine", "exponential"]
# settings that only some base models have; see Family.own_settings
FOR_SOME = (
    *("use_text", "tokenizer", "vocab_size", "text_embed_dim", "num_text_layers", "text_nhead", "max_text_length"),
    *("hidden_dim", "num_layers", "use_frequency_prior", "use_class_labels"),
    "token_attention_penalty",
)


class MethodSettings(PrepareSettings):
    """How the base model is adapted."""

    method: Literal["pivotal", "lora", "textual_inversion", "full", "condition", "prefix", "perfusion"] = Field(
        "pivotal",
        description="pivotal: token embeddings and LoRA together; condition: draw from condition pictures; prefix: "
        "vectors before the text encoders' input; perfusion: tokens and rank-one edits of cross-attention.",
    )
    n_tokens: int | None = Field(
        None,
        ge=1,
        le=64,
        description="New tokens that the trigger word stands for; None: three, where the base model recommends no "
        "other number.",
    )
    token_std_penalty: float = Field(0.01, ge=0, description="Pull of each token's spread to the vocabulary's.")
    adapter_type: Literal["lora", "lokr", "oft"] = Field(
        "lora", description="LoRA, Kronecker products (LoKr) or rotations of what a layer reads (OFT): lora, pivotal."
    )
    lora_rank: int | None = Field(
        None, ge=1, le=1024, description="Rank of the LoRA matrices, or of LoKr's second factor; OFT: a block's size."
    )
    lokr_factor: int = Field(8, ge=-1, description="Size of LoKr's first factor; -1: near the root of the layer's.")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA's scale is alpha / rank; None: alpha = rank.")
    lora_targets: Literal["attention", "attention_conv", "all"] | None = Field(
        None, description="Layers of the denoiser that get LoRA: attention projections, convolutions too, or all."
    )
    lora_l1_penalty: float = Field(0.0, ge=0, description="Weight of the mean absolute value of the LoRA matrices.")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (DoRA).")
    train_text_encoder: bool = Field(False, description="Adapt the text encoders too (methods lora and full).")
    num_prefix_tokens: int = Field(10, ge=1, le=1024, description="Method prefix: vectors before each text.")
    prefix_init_text: str = Field(
        "", description="Text whose tokens the prefix starts as; empty: words of the vocabulary by chance."
    )
    prefix_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the prefix's numbers that a step leaves out.")
    prefix_on_negative: bool = Field(
        False, description="Also put the prefix before negative prompts, and no caption; else these are the base's."
    )


class ConditionSettings(PrepareSettings):
    """How pictures condition the base model (method condition)."""

    condition_tasks: tuple[str, ...] = Field(
        ("canny",),
        min_length=1,
        max_length=8,
        description="What each condition is: canny, coloring, deblurring, depth, depth_pred, fill, sr, subject, pair, "
        "or a class of your own as module:Class.",
    )
    condition_resolution: int | None = Field(
        None, ge=16, le=4096, description="As resolution, of the conditions: fewer tokens; None: the task's own."
    )
    position_scale: float | None = Field(
        None, gt=0, description="Size of a condition's token in the picture's; None: so that both cover the same area."
    )
    position_delta: tuple[float, float] | None = Field(
        None, description="Rows and columns of tokens that a condition is shifted by; None: the task's own."
    )
    independent_condition: bool = Field(
        False, description="Conditions see neither text nor picture, so that drawing computes them once and not a step."
    )
    token_integration: bool = Field(False, description="Task fill: compute known tokens as the condition alone.")
    image_dropout: float = Field(0.1, ge=0, le=1, description="Share of conditions replaced by a black picture.")
    target_modules: str | None = Field(
        None, description="Regular expression of the whole names of the layers that get LoRA; None: all usual ones."
    )


class ArchitectureSettings(PrepareSettings):
    """How a model that is trained from nothing is built (pixel_ar).

    None takes what the base model's own configuration says.
    """

    use_text: bool | None = Field(
        None, description="Read captions; null: as the base model, of one that is built anew true."
    )
    tokenizer: str | None = Field(
        None, description="Hub id or folder of a transformers tokenizer (gpt2); null: the words of the captions."
    )
    vocab_size: int | None = Field(None, ge=4, description="Most words that are learned from captions.")
    text_embed_dim: int | None = Field(None, ge=8, description="Width of the text encoder.")
    num_text_layers: int | None = Field(None, ge=1, description="Its transformer layers.")
    text_nhead: int | None = Field(None, ge=1, description="Its attention heads.")
    max_text_length: int | None = Field(None, ge=2, description="Tokens of a caption that are read.")
    hidden_dim: int | None = Field(None, ge=8, description="Channels of the picture's features.")
    num_layers: int | None = Field(None, ge=1, description="Gated layers over the picture.")
    use_frequency_prior: bool | None = Field(None, description="Tell the model which frequencies are above a row.")
    use_class_labels: bool = Field(False, description="Learn the classes of the data set too, for class_label.")


class OptimisationSettings(PrepareSettings):
    """How the trainable parameters are moved."""

    optimizer: Optimiser | None = Field(
        None,
        description="For the weights: prodigy finds its own learning rate, muon makes a matrix's step orthogonal; "
        "None: adamw, where the base model recommends no other.",
    )
    learning_rate: float | None = Field(None, ge=0, description="Of the LoRA or full weights, or of the prefix.")
    lr_schedule: Schedule = Field("cosine", description="Of the weights; ignored by prodigy.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up, of the weights.")
    weight_decay: float = Field(0.004, ge=0, description="Of the LoRA or full weights.")
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of the matrices B over that of A (the paper's choice is 16)."
    )
    text_embedding_optimizer: TokenOptimiser = Field("adamw", description="For the new tokens.")
    text_embedding_lr: float | None = Field(None, ge=0, description="Of the new tokens; falls with (1 - done)^1.7.")
    text_encoder_lr: float | None = Field(None, ge=0, description="Of the text encoders' weights; None: learning_rate.")
    pivot_fraction: float = Field(0.7, ge=0, le=1, description="Share of the run after which the tokens are frozen.")
    max_train_steps: int | None = Field(None, ge=1, description="Optimiser steps.")
    num_train_epochs: float | None = Field(
        None, gt=0, description="In place of max_train_steps: how often each picture is trained on."
    )
    train_batch_size: int | None = Field(None, ge=1, description="Pictures a step and process.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches that are summed into one optimiser step.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Keep and deliver an average of the weights.")


class ObjectiveSettings(PrepareSettings):
    """What is minimised."""

    snr_gamma: float | None = Field(5.0, gt=0, description="Min-SNR weighting; null switches it off.")
    noise_offset: float = Field(0.0, ge=0, description="Noise added per channel, for darker and brighter pictures.")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of samples without condition: no caption, or a black picture."
    )
    preservation_weight: float | None = Field(
        None, ge=0, description="Pull towards the base model's own predictions on prompts without the trigger."
    )
    preservation_prompts: tuple[str, ...] | None = Field(
        None, description="Prompts for it; None: the base model's, else the captions with class_word for the trigger."
    )


class RegularisationSettings(PrepareSettings):
    """What keeps the trained text near the base model's, and where it begins."""

    token_covariance_penalty: float = Field(
        0.0, ge=0, description="Pull of the tokens' variance along the vocabulary's principal axes to the vocabulary's."
    )
    conditioning_norm_penalty: float = Field(
        0.0,
        ge=0,
        description="Pull of the length of an encoded caption's states to that of the base model's, with class_word.",
    )
    token_attention_penalty: float = Field(
        0.0, ge=0, description="Weight of the share of the tokens' attention that lies outside of the mask."
    )
    token_text_warmup: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Steps before the run that fit the tokens to class_word by the encoded captions alone, no picture.",
    )
    alignment_prompt: str = Field(
        "", description="PALP: the one prompt, with {trigger}, that is to be drawn as the base model would."
    )
    alignment_weight: float = Field(
        0.0, ge=0, description="Weight of that term, five predictions more of every third sample."
    )
    conditioning_noise: float = Field(
        0.0, ge=0, description="Noise on the encoded captions in training, in their own standard deviations."
    )


class EvaluationSettings(PrepareSettings):
    """How a job judges itself."""

    holdout: int | None = Field(
        None,
        ge=0,
        description="Pictures kept from training to judge it by; null: a tenth, or of fewer than 8 none but "
        "cross-validation; 0: train on everything, to the last step.",
    )
    validation_folds: int = Field(
        2,
        ge=0,
        le=7,
        description="Of fewer than 8 pictures: further runs that leave a part out; 0: none.",
    )
    evaluate_every: int | None = Field(None, ge=1, description="Steps between evaluations; null: eight a run.")
    keep_evaluated: bool = Field(
        False, description="Keep the weights of every evaluation, not of the best, the middle and the last one only."
    )
    early_stop: bool = Field(True, description="End a run that is overfitted beyond doubt; its best step is delivered.")
    unrelated_prompts: tuple[str, ...] | None = Field(
        None, description="Prompts on which drift from the base model is measured; null: what suits the base model."
    )


class RunSettings(PrepareSettings):
    """Where and how the job runs and what it leaves."""

    base_model: str = Field("toybox", description="A toybox model's name, a folder, a .safetensors file or a Hub id.")
    companion_model: str | None = Field(
        None, description="The other half of a base model that is one of two (Kandinsky 2.2); None: the published one."
    )
    init_adapter: str | None = Field(
        None,
        description="Weights that training starts from: an archive, folder, LoRA file, URL or Hub id, ours or not. "
        "Rank, alpha, layers and tokens are taken from it.",
    )
    output_dir: Path = Field(Path("outputs/train"), description="Everything the job writes goes here.")
    seed: int = Field(0, ge=0, lt=2**63, description="The same seed gives the same weights on the same machine.")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="auto: bf16 where the device is fast at it. Trained weights are fp32 always."
    )
    base_precision: Literal["same", "fp8", "int8", "nf4"] = Field(
        "same",
        description="The denoiser's frozen weights while LoRA trains: in 8 bits (fp8, which needs "
        "gradient_checkpointing, or int8) or in 4 (nf4); int8 and nf4 need the package bitsandbytes.",
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for about 40 % more time.")
    enable_xformers: bool = Field(False, description="Attention of the denoiser by xFormers, where it is installed.")
    save_diffusers: bool | None = Field(
        None,
        description="Also leave the weights in diffusers' layout in output_dir and in every checkpoint: "
        "pytorch_lora_weights.safetensors, or with method full the nets and the whole pipeline.",
    )
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; None: four a run.")
    checkpoints_total_limit: int = Field(2, ge=1, description="Older checkpoints are removed.")
    resume: bool = Field(False, description="Go on from the last checkpoint in output_dir.")
    dry_run: bool = Field(
        False, description="Stop before the training: prepare, measure a few steps, write prepared/report.html."
    )
    report_to: Literal["none", "tensorboard", "wandb"] = Field("tensorboard", description="Beside metrics.jsonl.")
    push_to_hub: str | None = Field(
        None, description="Repository (owner/name) that gets the weights; the token is HF_TOKEN's or the login's."
    )
    hub_private: bool = Field(True, description="A repository that push_to_hub makes is private.")
    preview_prompts: tuple[str, ...] | None = Field(None, description="Drawn at the end, base beside adapted.")
    preview_seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="Seeds of the previews.")


# What OminiControl is trained with; a job that says otherwise has its way.
CONDITION_DEFAULTS = {"optimizer": "prodigy", "weight_decay": 0.01, "max_grad_norm": 0.5}


# OminiControl's configurations nest some settings: its names -> ours, and what of it is always so.
NESTED = {
    "optimizer": {"type": "optimizer", "lr": "learning_rate", "weight_decay": "weight_decay"},
    "lora_config": {"r": "lora_rank", "lora_alpha": "lora_alpha", "target_modules": "target_modules"},
}
ALWAYS = {"use_bias_correction": "true", "safeguard_warmup": "true", "init_lora_weights": "gaussian"}


class JobSettings(
    MethodSettings,
    ConditionSettings,
    ArchitectureSettings,
    OptimisationSettings,
    ObjectiveSettings,
    RegularisationSettings,
    EvaluationSettings,
    RunSettings,
):
    """All settings of one job."""

    @model_validator(mode="before")
    @classmethod
    def _suits_the_method(cls, given: Any) -> Any:
        """Defaults that depend on the method."""
        if not isinstance(given, dict) or given.get("method") != "condition":
            return given
        given = CONDITION_DEFAULTS | given
        if given["optimizer"] != "prodigy":
            given.setdefault("learning_rate", 1e-4)
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> JobSettings:
        if self.train_text_encoder and self.method not in ("lora", "full"):
            raise ValueError(f"train_text_encoder goes with method lora or full, not {self.method}")
        if self.target_modules is not None and self.method != "condition":
            raise ValueError(f"target_modules goes with method condition, not {self.method}: use lora_targets")
        if self.use_dora and self.method not in ("lora", "pivotal"):
            raise ValueError(f"use_dora goes with method lora or pivotal, not {self.method}")
        if self.method == "perfusion" and not self.class_word:
            raise ValueError("method perfusion locks the concept to a class_word: give one, such as dog")
        if self.base_precision != "same" and self.method == "full":
            raise ValueError(f"base_precision {self.base_precision} is for frozen weights, and full trains them")
        if self.base_precision == "fp8" and not self.gradient_checkpointing:
            raise ValueError("base_precision fp8 saves nothing without gradient_checkpointing: switch it on")
        if self.concepts and self.method not in ("pivotal", "textual_inversion", "lora"):
            raise ValueError(f"concepts go with method pivotal, textual_inversion or lora, not {self.method}")
        if self.num_train_epochs is not None and self.max_train_steps is not None:
            raise ValueError("num_train_epochs and max_train_steps both say how long to train: leave one out (null)")
        if self.preservation_weight and self.method == "full":
            raise ValueError("preservation_weight needs the base model beside the trained one, which full has not")
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> JobSettings:
        if self.lokr_factor == 0:
            raise ValueError("lokr_factor 0 parts nothing: use 1 or more, or -1")
        if self.adapter_type == "lora":
            return self
        kind = f"adapter_type {self.adapter_type}"
        if self.method not in ("lora", "pivotal"):
            raise ValueError(f"{kind} goes with method lora or pivotal, not {self.method}")
        if self.use_dora or self.lora_plus_ratio != 1:
            raise ValueError(f"{kind} has not LoRA's two matrices: leave use_dora and lora_plus_ratio out")
        if self.base_precision != "same":
            raise ValueError(f"{kind} needs the base model's weights as they are: leave base_precision out")
        if self.save_diffusers:
            raise ValueError(f"{kind}: diffusers has no loader for it: set save_diffusers false")
        if self.adapter_type == "oft" and (self.lora_alpha is not None or self.lora_rank == 1):
            raise ValueError("adapter_type oft rotates blocks of lora_rank numbers, 2 or more, and has no lora_alpha")
        return self

    @model_validator(mode="after")
    def _regularisers_fit(self) -> JobSettings:
        if self.method not in ("pivotal", "textual_inversion"):
            for name in ("token_covariance_penalty", "token_attention_penalty", "token_text_warmup"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with method pivotal or textual_inversion, not {self.method}")
        reads_anew = self.train_text_encoder or self.method in ("pivotal", "textual_inversion", "prefix")
        if self.conditioning_norm_penalty and not reads_anew:
            raise ValueError(
                f"conditioning_norm_penalty: method {self.method} leaves the encoded captions as they are: leave it out"
            )
        if bool(self.alignment_weight) != bool(self.alignment_prompt):
            raise ValueError("alignment_prompt and alignment_weight go together: give both or neither")
        if self.alignment_weight and ("{trigger}" not in self.alignment_prompt or self.method in ("full", "condition")):
            raise ValueError("alignment_prompt needs {trigger} in it, and a method that keeps the base model beside")
        if self.token_text_warmup and (not (self.class_word or self.concepts) or self.init_adapter):
            raise ValueError("token_text_warmup needs class_word to begin from, and no init_adapter, which has tokens")
        if self.lora_plus_ratio != 1:
            if self.method not in ("pivotal", "lora", "condition"):
                raise ValueError(f"lora_plus_ratio is for LoRA's two matrices, which method {self.method} has not")
            if self.optimizer == "prodigy":
                raise ValueError(
                    "lora_plus_ratio: prodigy finds its rates itself: use optimizer adamw, or leave it out"
                )
        return self

    @staticmethod
    def flattened(values: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values with `optimizer: {type, lr, weight_decay}` (also below `params`) and `lora_config:
        {r, lora_alpha, target_modules}` as settings of their own. UserError for anything else below them.
        """
        flat = {name: value for name, value in values.items() if not (name in NESTED and isinstance(value, dict))}
        for name in values.keys() - flat.keys():
            nested = dict(values[name])
            params = nested.pop("params", {})
            for key, value in (nested | (params if isinstance(params, dict) else {"params": params})).items():
                if key in NESTED[name]:
                    flat[NESTED[name][key]] = value.lower() if key == "type" else value
                elif str(value).lower() != ALWAYS.get(key):
                    raise UserError(f"{name}: {key} is no setting; there are {', '.join(NESTED[name])}")
        return flat

    def filled(self, recommended: dict[str, Any]) -> JobSettings:
        """These settings with every None that `recommended` has a value for replaced by it, checked again."""
        missing = {k: v for k, v in recommended.items() if k in type(self).model_fields and getattr(self, k) is None}
        return type(self).model_validate(self.model_dump() | missing)
