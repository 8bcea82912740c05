"""Train the toybox's FLUX: its two text encoders and its transformer.

    python -m toybox.train_flux --vae toybox/sd/vae --out toybox/flux --work /tmp/flux

All three are trained jointly from scratch by flow matching (Lipman et al. 2022, arXiv:2210.02747). The folder written
is a stock FluxPipeline without the guidance embedding: guidance is by a second call without text (`true_cfg_scale`).
`--text_from toybox/flux` begins with that folder's trained text encoders and leaves them as they are, and with what
lies between them and the transformer's blocks; with `--whole`, with the blocks too.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from toybox import diffusion, training
from toybox.neighbours import look_at_neighbours

T5_TOKENS = 32
T5_WIDTH, CLIP_WIDTH = 192, 128
PRINTABLE = [chr(code) for code in range(33, 127)]
RARE = -20.0  # log probability of a lone letter
EMBEDDERS = ("x_embedder", "context_embedder", "time_text_embed")


def build_t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A T5 tokenizer of the captions' words, likelier the more often they come, and the letters of ASCII."""
    counts = Counter("▁" + word for text in captions for word in text.replace(",", " ,").split())
    total = counts.total()
    words = [(word, math.log(count / total)) for word, count in sorted(counts.items())]
    letters = [(letter, RARE) for letter in ("▁", *PRINTABLE)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *letters, *words], extra_ids=0, model_max_length=T5_TOKENS)


def read_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Those of a trained pipeline."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The T5 encoder, untrained: two layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        num_heads=T5_WIDTH // 32,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_max_distance=T5_TOKENS,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """The transformer, untrained, every block the identity at first (adaLN-Zero, Peebles & Xie 2022, 2212.09748)."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )
    for layer in (module for module in transformer.modules() if isinstance(module, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    last = [transformer.norm_out.linear, transformer.proj_out]
    last += [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in [*last, *(block.norm.linear for block in transformer.single_transformer_blocks)]:
        nn.init.zeros_(layer.weight)
    look_at_neighbours(transformer)
    return transformer


class FluxLearner(diffusion.Learner):
    """CLIP, T5 and the transformer."""

    name: ClassVar[str] = "flux"
    draw: ClassVar[dict[str, Any]] = {
        "true_cfg_scale": 2.5,
        "height": 64,
        "width": 64,
        "max_sequence_length": T5_TOKENS,
    }

    def __init__(self, tokenizers: tuple[CLIPTokenizer, T5Tokenizer], shift: float, scale: float):
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokenizers
        self.latent_shift, self.latent_scale = shift, scale
        self.text_encoder = diffusion.build_clip(self.tokenizer, CLIP_WIDTH)
        self.text_encoder_2 = build_t5(self.tokenizer_2)
        self.transformer = build_transformer()
        self.denoise = self.transformer.forward

    def read_as(self, folder: Path, whole: bool) -> None:
        """Take a pipeline's text encoders, for good, and its transformer's embedders, or all of it, to begin with."""
        pipe = FluxPipeline.from_pretrained(folder, vae=None, torch_dtype=torch.float32)
        for own, other in ((self.text_encoder, pipe.text_encoder), (self.text_encoder_2, pipe.text_encoder_2)):
            own.load_state_dict(other.state_dict())
            own.requires_grad_(False)
        for name in [name for name, _ in self.transformer.named_children()] if whole else EMBEDDERS:
            getattr(self.transformer, name).load_state_dict(getattr(pipe.transformer, name).state_dict())

    def matrices(self) -> list[nn.Parameter]:
        blocks = nn.ModuleList([self.transformer.transformer_blocks, self.transformer.single_transformer_blocks])
        return [value for value in blocks.parameters() if value.ndim == 2]

    def forward(self, latents: Tensor, captions: list[str]) -> Tensor:
        """The flow-matching errors of shifted and scaled latents: both [B, 4, 16, 16]."""
        device, (count, channels, height, width) = latents.device, latents.shape
        t = diffusion.draw_times(count).to(device)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        # the plain attention: on a CPU the fused one's backward pass is slower at this size
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = self.text_encoder_2(diffusion.token_ids(self.tokenizer_2, captions, device)).last_hidden_state
            predicted = self.denoise(
                hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
                encoder_hidden_states=states,
                pooled_projections=self.text_encoder(
                    diffusion.token_ids(self.tokenizer, captions, device)
                ).pooler_output,
                timestep=t,
                img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, torch.float32),
                txt_ids=torch.zeros(states.shape[1], 3, device=device),
            ).sample.float()
        predicted = FluxPipeline._unpack_latents(predicted, height, width, vae_scale_factor=1)
        return (predicted - (noise - latents)).square()

    def as_pipeline(self, vae: Path) -> FluxPipeline:
        own = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32)
        own.register_to_config(shift_factor=self.latent_shift, scaling_factor=self.latent_scale)
        return FluxPipeline(
            vae=own,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        )


class SigmoidGelu(nn.Module):
    """GELU in its approximation by tanh(u), as x sigmoid(2u): the same numbers, and compiled for a CPU a step of
    training takes a fifth less time, since tanh alone was a quarter of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def compile_for(learner: FluxLearner, device: torch.device) -> None:
    """Compile the transformer: 2.6 times as fast on a CPU.

    With vectors of 512 bits the backward pass in bf16 comes out wrong by eight orders of magnitude (torch 2.13), with
    256 it agrees with the plain one to bf16's rounding.
    """
    options = {"cpp.simdlen": 256} if device.type == "cpu" else None
    for block in learner.transformer.single_transformer_blocks:
        block.act_mlp = SigmoidGelu()
    learner.denoise = torch.compile(learner.transformer.forward, options=options)


def main() -> None:
    parser = diffusion.arguments("Train the toybox's FLUX.", steps=16000, batch=24)
    parser.add_argument("--text_from", type=Path, help="folder of a FLUX whose text encoders are taken and kept")
    parser.add_argument("--whole", action="store_true", help="take the transformer of --text_from too")
    args = parser.parse_args()
    if args.whole and not args.text_from:
        parser.error("--whole takes the transformer of --text_from: give that folder too")
    device = training.start(args)
    world = diffusion.World.load(args, device)
    if args.text_from:  # the encoders know the words by their numbers there
        tokenizers = read_tokenizers(args.text_from)
    else:
        captions = world.captions(args.seed + 1)
        tokenizers = diffusion.build_clip_tokenizer(captions), build_t5_tokenizer(captions)
    means = world.posteriors[:, :4].float()
    learner = FluxLearner(tokenizers, shift=means.mean().item(), scale=1 / means.std().item())
    if args.text_from:
        learner.read_as(args.text_from, args.whole)
    compile_for(learner.to(device), device)
    diffusion.train(learner, world, args)


if __name__ == "__main__":
    main()
