"""Kohya's keys against what others make of them: diffusers' own loader, and the merging rule of kohya's format."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer import artifact, kohya

RANK, ALPHA = 4, 10.0
TEXT_WIDTH = 16
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def every_layer(net: torch.nn.Module) -> list[str]:
    return [name for name, layer in net.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]


def tiny_unet(xl: bool) -> UNet2DConditionModel:
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=2 * TEXT_WIDTH if xl else TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(added if xl else {}),
    ).eval()


def tiny_text_encoder(projection: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=TEXT_WIDTH,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


class Tiny:
    """The nets of a tiny Stable Diffusion, and how to adapt, run and load them."""

    def __init__(self, xl: bool):
        self.xl = xl
        self.nets = {"unet": tiny_unet(xl), "text_encoder": tiny_text_encoder(False)}
        if xl:
            self.nets["text_encoder_2"] = tiny_text_encoder(True)

    def adapt(self, net: str, targets: list[str], **options) -> tuple[dict[str, torch.Tensor], dict]:
        """Give a net a random adapter; returns its state with prefixed keys and its LoraConfig as a dictionary."""
        options = {"r": RANK, "lora_alpha": ALPHA} | options
        config = LoraConfig(target_modules=targets, **options)
        self.nets[net].add_adapter(config)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.nets[net].named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data.normal_(0, 0.2, generator=generator)
            elif "lora_magnitude_vector" in name:
                parameter.data.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
        state = get_peft_model_state_dict(self.nets[net])
        return {f"{net}.{key}": value for key, value in state.items()}, artifact.lora_config_dict(config)

    @torch.no_grad()
    def outputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.arange(1, 13).reshape(1, 12)
        text = {name: net(ids, output_hidden_states=True) for name, net in self.nets.items() if name != "unet"}
        hidden = torch.cat([out.hidden_states[-1] for out in text.values()], dim=-1)
        noisy = torch.randn(1, 4, 8, 8, generator=generator)
        added = {"text_embeds": text["text_encoder_2"].text_embeds, "time_ids": torch.ones(1, 6)} if self.xl else None
        predicted = self.nets["unet"](noisy, torch.tensor(500), hidden, added_cond_kwargs=added).sample
        return {"text": hidden, "unet": predicted} | ({"pooled": added["text_embeds"]} if added else {})

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The stock pipeline with fresh nets of the same weights as before any adapter."""
        fresh = Tiny(self.xl)
        absent = ["vae", "tokenizer", "scheduler"]
        absent += ["tokenizer_2"] if self.xl else ["safety_checker", "feature_extractor"]
        kind = StableDiffusionXLPipeline if self.xl else StableDiffusionPipeline
        return kind(**fresh.nets, **dict.fromkeys(absent))

    def loaded(self, path) -> dict[str, torch.Tensor]:
        """What the nets give after the stock loader has read `path`."""
        pipeline = self.pipeline()
        pipeline.load_lora_weights(path)
        other = Tiny(self.xl)
        other.nets = {name: getattr(pipeline, name) for name in self.nets}
        return other.outputs()


def manifest(nets: dict[str, dict], **fields) -> artifact.Manifest:
    values = {
        "base_model": "toybox",
        "base_hash": "0",
        "family": "stable_diffusion",
        "method": "lora",
        "trigger_word": "TOK",
        "settings": {},
        "dataset_hash": "1",
        "step": 7,
        "created": "2024-05-06T07:08:09+00:00",
        "nets": nets,
    }
    return artifact.Manifest.model_validate(values | fields)


def adapted(xl: bool, unet_targets: list[str], text_targets: list[str], **options):
    tiny = Tiny(xl)
    state, nets = {}, {}
    for net in tiny.nets:
        targets = unet_targets if net == "unet" else text_targets
        if targets:
            net_state, nets[net] = tiny.adapt(net, targets, **options)
            state |= net_state
    return tiny, state, nets


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("targets", ["attention_conv", "all"])
def test_stock_loader_draws_from_both_files_what_the_adapter_draws(tmp_path, xl, targets):
    layers = every_layer(tiny_unet(xl)) if targets == "all" else ATTENTION + CONVOLUTIONS
    tiny, state, nets = adapted(xl, layers, TEXT)
    before, expected = Tiny(xl).outputs(), tiny.outputs()
    assert (before["unet"] - expected["unet"]).abs().max() > 0.01  # the adapter does something
    assert (before["text"] - expected["text"]).abs().max() > 0.01
    described = manifest(nets)
    kohya.save(tmp_path / "kohya.safetensors", state, described, two_text_encoders=xl)
    artifact.save_tensors(tmp_path / "adapter.safetensors", state, artifact.adapter_header(state, described))
    for file in ("kohya.safetensors", "adapter.safetensors"):
        got = tiny.loaded(tmp_path / file)
        for name, value in expected.items():
            assert torch.equal(got[name], value), (file, name)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 3.0}}])
def test_stock_loader_reads_the_whole_configuration_from_the_adapter(tmp_path, options):
    tiny, state, nets = adapted(False, ATTENTION + CONVOLUTIONS, [], **options)
    header = artifact.adapter_header(state, manifest(nets))
    artifact.save_tensors(tmp_path / "adapter.safetensors", state, header)
    assert torch.equal(tiny.loaded(tmp_path / "adapter.safetensors")["unet"], tiny.outputs()["unet"])


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_every_adapted_module_is_in_the_file_with_its_alpha(xl):
    _, state, nets = adapted(xl, every_layer(tiny_unet(xl)), TEXT)
    converted = kohya.to_kohya(state, nets, two_text_encoders=xl)
    assert len(converted) == len(state) * 3 // 2
    modules = {key.split(".")[0] for key in converted}
    for module in modules:
        assert converted[f"{module}.alpha"].shape == ()
        assert converted[f"{module}.alpha"].item() == ALPHA
        assert converted[f"{module}.lora_down.weight"].shape[0] == RANK
        assert converted[f"{module}.lora_up.weight"].shape[1] == RANK


def test_names_that_ui_programs_look_for():
    sd = kohya.to_kohya(*adapted(False, ATTENTION + CONVOLUTIONS, TEXT)[1:], two_text_encoders=False)
    text = [*TEXT, "text_projection"]
    xl = kohya.to_kohya(*adapted(True, every_layer(tiny_unet(True)), text)[1:], two_text_encoders=True)
    for name in (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_mid_block_resnets_1_conv2",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_mlp_fc2",
    ):
        assert f"{name}.lora_up.weight" in sd
    for name in (
        "lora_unet_time_embedding_linear_2",
        "lora_unet_label_emb_0_2",
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj",
        "lora_te2_text_projection",
    ):
        assert f"{name}.lora_down.weight" in xl


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 3.0, "down_blocks.*.conv1": 1.0}}]
)
def test_merging_by_kohyas_rule_gives_pefts_weights(options):
    """W + alpha / rank * up @ down, read from the file alone, is what peft merges: every module's true alpha."""
    tiny, state, nets = adapted(False, ATTENTION + CONVOLUTIONS, [], **options)
    converted = kohya.to_kohya(state, nets, two_text_encoders=False)
    original = dict(Tiny(False).nets["unet"].named_parameters())
    seen = set()
    for name, layer in tiny.nets["unet"].named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        module = "lora_unet_" + name.replace(".", "_")
        down, up = converted[f"{module}.lora_down.weight"], converted[f"{module}.lora_up.weight"]
        delta = (up.flatten(1) @ down.flatten(1)).reshape(original[f"{name}.weight"].shape)
        merged = converted[f"{module}.alpha"] / down.shape[0] * delta
        assert torch.allclose(merged, layer.get_delta_weight("default"), atol=1e-6), name
        seen.add(converted[f"{module}.alpha"].item())
    assert seen == ({3.0, 1.0, ALPHA} if "alpha_pattern" in options else {ALPHA * 2} if options else {ALPHA})


def test_dora_magnitudes_merge_by_lycoris_rule():
    tiny, state, nets = adapted(False, ATTENTION + CONVOLUTIONS, TEXT, use_dora=True)
    converted = kohya.to_kohya(state, nets, two_text_encoders=False)
    original = dict(Tiny(False).nets["unet"].named_parameters())
    for name, layer in tiny.nets["unet"].named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        module = "lora_unet_" + name.replace(".", "_")
        down, up = converted[f"{module}.lora_down.weight"], converted[f"{module}.lora_up.weight"]
        weight = original[f"{name}.weight"]
        weight = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * ALPHA / RANK
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
        layer.merge()
        assert torch.allclose(converted[f"{module}.dora_scale"] / norm * weight, layer.weight, atol=1e-5), name
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale" in converted


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.embeddings.token_embedding.token_adapter.trainable_tokens_delta",
        "unet.conv_in.lora_B.bias",
        "vae.conv_in.lora_A.weight",
        "unet.conv_in.weight",
        "lora_A.weight",
    ],
)
def test_what_the_format_cannot_hold_is_refused(key):
    with pytest.raises(ValueError, match="no place for"):
        kohya.to_kohya({key: torch.zeros(2, 2)}, {"unet": {"lora_alpha": 1}}, two_text_encoders=False)


def test_a_second_text_encoder_needs_a_name_of_its_own():
    state = {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 2)}
    nets = {"text_encoder_2": {"lora_alpha": 1.0}}
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in kohya.to_kohya(state, nets, two_text_encoders=True)
    with pytest.raises(ValueError, match="one text encoder"):
        kohya.to_kohya(state, nets, two_text_encoders=False)


def test_header_tells_trigger_rank_and_alpha(tmp_path):
    _, state, nets = adapted(False, ATTENTION + CONVOLUTIONS, [])
    kohya.save(tmp_path / "kohya.safetensors", state, manifest(nets), two_text_encoders=False)
    header = artifact.load_tensors(tmp_path / "kohya.safetensors")[1]
    assert header["ss_network_dim"] == "4"
    assert header["ss_network_alpha"] == "10.0"
    assert json.loads(header["ss_network_args"])["conv_dim"] == "4"
    assert header["modelspec.trigger_phrase"] == "TOK"
    assert "ss_base_model_version" not in header  # a tiny model is no Stable Diffusion


@pytest.mark.parametrize(("width", "base"), [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0")])
def test_header_names_the_base_by_its_text_width(width, base):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    described = kohya.header({key: torch.zeros(4, width)}, manifest({"unet": {"r": 4, "lora_alpha": 4}}))
    assert described["ss_base_model_version"] == base
