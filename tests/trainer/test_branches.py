"""FLUX with condition branches is one long sequence with a mask, and stock FLUX where nothing conditions it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from trainer.branches import BranchPlan, Placement
from trainer.families.flux import CONDITION_TARGETS
from trainer.families.flux_branches import Branches, Condition, Conditions, remove_branches
from trainer.methods import adapters
from trainer.methods.adapters import inject

TEXT, BATCH = 5, 2
HEADS = ["to_q", "to_k", "to_v", "norm_q", "norm_k"]
TEXT_HEADS = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(net: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A small transformer with random LoRA where a condition's goes."""
    for i, parameter in enumerate(inject(net, LoraConfig(r=3, lora_alpha=6, target_modules=CONDITION_TARGETS))):
        parameter.data = 0.2 * randn(*parameter.shape, seed=i)
    return net.eval()


@pytest.fixture(params=[True, False], ids=["dev", "schnell"])
def net(request: pytest.FixtureRequest, build_transformer) -> FluxTransformer2DModel:
    return adapted(build_transformer(request.param))


def inputs(net: FluxTransformer2DModel, t: float = 0.7, seed: int = 0) -> dict[str, Any]:
    """What a pipeline gives the transformer for latents of 8x12."""
    height, width = 4, 6
    return {
        "hidden_states": randn(BATCH, height * width, 16, seed=seed),
        "encoder_hidden_states": randn(BATCH, TEXT, 24, seed=1),
        "pooled_projections": randn(BATCH, 32, seed=2),
        "timestep": torch.full((BATCH,), t),
        "guidance": torch.full((BATCH,), 3.5) if net.config.guidance_embeds else None,
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32),
    }


def pictures(count: int, seed: int = 20, **changes: Any) -> list[Condition]:
    placements = [Placement(), Placement((0, -4)), Placement((0, 0), 2.0), Placement((1, 7), 0.5)]
    sizes = [(8, 12), (4, 4), (4, 6), (6, 2)]
    chosen = zip(placements[:count], sizes, strict=False)
    return [
        Condition(randn(BATCH, 4, *size, seed=seed + i), place, **changes) for i, (place, size) in enumerate(chosen)
    ]


def off(net: FluxTransformer2DModel, on: bool = False) -> None:
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = not on


def act(net: FluxTransformer2DModel, adapter: str | None) -> None:
    """Have one adapter act, or none."""
    off(net, on=adapter is not None)
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer) and adapter is not None:
            layer._active_adapter = [adapter]


class OneSequence:
    """The whole as one sequence [text, picture, conditions] with a mask; every layer is applied with each branch's
    adapter, and each token takes the result that is its own.
    """

    def __init__(self, net: FluxTransformer2DModel, given: dict[str, Any], chosen: Conditions, main: str | None):
        self.net, self.given, self.main = net, given, main
        self.acting = [main, *(one.adapter for one in chosen.pictures)]
        self.tokens = [FluxPipeline._pack_latents(one.latents, *one.latents.shape) for one in chosen.pictures]
        self.length = given["hidden_states"].shape[1]
        sizes = [self.length, *(one.shape[1] for one in self.tokens)]
        self.text = torch.zeros(TEXT, dtype=torch.long)  # its tokens are the first branch's, too
        self.image = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
        self.owner = torch.cat([self.text, self.image])
        ids = [one.placement.ids(*(side // 2 for side in one.latents.shape[2:]), "cpu") for one in chosen.pictures]
        self.rotary = net.pos_embed(torch.cat([given["txt_ids"], given["img_ids"], *ids]))
        mine, other = self.owner[:, None], self.owner[None]
        alone = torch.tensor([False, *(one.independent for one in chosen.pictures)])
        self.mask = (mine == other) | (mine == 0) | ((other == 0) & ~alone[self.owner][:, None])

    def apply(self, layer: Any, x: Tensor, owners: Tensor) -> Tensor:
        found = torch.zeros(())
        for branch, adapter in enumerate(self.acting):
            act(self.net, adapter)
            found = torch.where((owners == branch).view(1, -1, 1), layer(x), found)
        act(self.net, self.main)
        return found

    def temb(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        scaled = [t * 1000] + ([] if guidance is None else [guidance * 1000])
        return self.net.time_text_embed(*scaled, self.given["pooled_projections"])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (apply_rotary_emb(one, self.rotary, sequence_dim=1) for one in (q, k))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)

    def heads(self, attention: Any, x: Tensor, names: list[str], owners: Tensor) -> list[Tensor]:
        q, k, v = (self.apply(getattr(attention, n), x, owners).unflatten(-1, (attention.heads, -1)) for n in names[:3])
        return [getattr(attention, names[3])(q), getattr(attention, names[4])(k), v]

    def double(self, block: Any, text: Tensor, picture: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        attention, image = block.attn, self.image
        mods = self.apply(block.norm1.linear, silu(temb[:, TEXT:]), image).chunk(6, dim=-1)
        text_mods = block.norm1_context.linear(silu(temb[:, :TEXT])).chunk(6, dim=-1)
        states = block.norm1.norm(picture) * (1 + mods[1]) + mods[0]
        text_states = block.norm1_context.norm(text) * (1 + text_mods[1]) + text_mods[0]
        own = self.heads(attention, states, HEADS, image)
        both = zip(self.heads(attention, text_states, TEXT_HEADS, self.text), own, strict=True)
        read = self.attend(*(torch.cat(pair, dim=1) for pair in both))
        picture = picture + mods[2] * self.apply(attention.to_out[0], read[:, TEXT:], image)
        text = text + text_mods[2] * attention.to_add_out(read[:, :TEXT])
        picture = picture + mods[5] * self.apply(block.ff, block.norm2(picture) * (1 + mods[4]) + mods[3], image)
        text = text + text_mods[5] * block.ff_context(block.norm2_context(text) * (1 + text_mods[4]) + text_mods[3])
        return text, picture

    def single(self, block: Any, whole: Tensor, temb: Tensor) -> Tensor:
        mods = self.apply(block.norm.linear, silu(temb), self.owner).chunk(3, dim=-1)
        states = block.norm.norm(whole) * (1 + mods[1]) + mods[0]
        read = self.attend(*self.heads(block.attn, states, HEADS, self.owner))
        mlp = block.act_mlp(self.apply(block.proj_mlp, states, self.owner))
        return whole + mods[2] * self.apply(block.proj_out, torch.cat([read, mlp], dim=2), self.owner)

    def predict(self) -> Tensor:
        net, given = self.net, self.given
        clean = None if given["guidance"] is None else torch.ones(BATCH)
        noisy, condition = self.temb(given["timestep"], given["guidance"]), self.temb(torch.zeros(BATCH), clean)
        temb = torch.where((self.owner == 0)[:, None], noisy[:, None], condition[:, None])
        text = net.context_embedder(given["encoder_hidden_states"])
        picture = self.apply(net.x_embedder, torch.cat([given["hidden_states"], *self.tokens], dim=1), self.image)
        for block in net.transformer_blocks:
            text, picture = self.double(block, text, picture, temb)
        whole = torch.cat([text, picture], dim=1)
        for block in net.single_transformer_blocks:
            whole = self.single(block, whole, temb)
        return net.proj_out(net.norm_out(whole[:, TEXT : TEXT + self.length], noisy))


def reference(
    net: FluxTransformer2DModel, given: dict[str, Any], chosen: Conditions, main: str | None = None
) -> Tensor:
    """What the net should predict where `main` is the picture's and the text's adapter."""
    act(net, main)
    return OneSequence(net, given, chosen, main).predict()


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_branches_are_one_sequence_with_a_mask(net, count, independent):
    chosen = Conditions(pictures(count, independent=independent))
    given = inputs(net)
    with torch.no_grad():
        expected = reference(net, given, chosen)
        branches = Branches(net)
        with branches.on(chosen):
            found = net(**given).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_each_branch_has_its_own_adapter(net):
    """Two conditions of two adapters, one independent and one not, and a LoRA for text and picture."""
    everywhere = r".*\.(?:to_[qkv]|add_[qkv]_proj|norm1\.linear|proj_mlp)|context_embedder"
    for seed, (name, targets) in enumerate((("second", CONDITION_TARGETS), ("style", everywhere)), start=1):
        for i, p in enumerate(inject(net, LoraConfig(r=2, lora_alpha=2, target_modules=targets), name)):
            p.data = 0.2 * randn(*p.shape, seed=100 * seed + i)
    net.eval()
    first, second = pictures(2)
    chosen = Conditions([first, replace(second, adapter="second", independent=True)])
    given = inputs(net)
    with torch.no_grad():
        expected, plain = (reference(net, given, chosen, main) for main in ("style", None))
        branches = Branches(net, "style")
        with branches.on(chosen):
            found = net(**given).sample
            branches.main = None
            branches.settle()
            without = net(**given).sample
            for layer in (one for one in net.modules() if isinstance(one, BaseTunerLayer)):
                layer.set_scale("style", 0.0)
            branches.main = "style"
            branches.settle()
            assert torch.equal(net(**given).sample, without)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(without, plain, rtol=1e-4, atol=2e-5)
    assert (expected - plain).abs().max() > 1e-2
    adapters.remove(net, "second")
    assert set(net.peft_config) == {"default", "style"}
    for name in ("default", "style"):
        adapters.remove(net, name)
    assert not hasattr(net, "peft_config") and not any(isinstance(one, BaseTunerLayer) for one in net.modules())


def test_gradients_are_those_of_the_one_sequence_and_of_checkpointing(net):
    chosen, given = Conditions(pictures(2)), inputs(net)
    parameters = [p for n, p in net.named_parameters() if ".lora_" in n]
    for p in parameters:
        p.requires_grad_(True)
    expected = torch.autograd.grad(reference(net, given, chosen).square().mean(), parameters, allow_unused=True)
    branches = Branches(net)
    for checkpointing in (False, True):
        net.train(checkpointing)
        (net.enable_gradient_checkpointing if checkpointing else net.disable_gradient_checkpointing)()
        with branches.on(chosen):
            found = torch.autograd.grad(net(**given).sample.square().mean(), parameters, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            if one is None:  # behind the last block's keys and values, where nothing reads a condition
                assert not other.any()
            else:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert sum(one is None for one in found) == 2 * len(("to_q", "proj_mlp", "proj_out"))


def test_without_conditions_it_is_the_stock_model_and_so_it_is_afterwards(net):
    given = inputs(net)
    with torch.no_grad():
        off(net)
        expected = net(**given).sample
        off(net, on=True)
        adapted = net(**given).sample
        branches = Branches(net)
        assert torch.equal(net(**given).sample, expected)
        with branches.on(Conditions(pictures(1), strength=0.0)):
            torch.testing.assert_close(net(**given).sample, expected)
        remove_branches(net)
        assert torch.equal(net(**given).sample, adapted) and not torch.equal(adapted, expected)
    assert "forward" not in net.__dict__ and "forward" not in net.transformer_blocks[0].__dict__


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_stored_keys_and_values_change_nothing(net, count):
    branches, steps = Branches(net), [inputs(net, t, seed=i) for i, t in enumerate((1.0, 0.6, 0.2))]
    results = []
    with torch.no_grad():
        for stores in (None, {}):
            with branches.on(Conditions(pictures(count, independent=True), stores=stores)):
                results.append([net(**given).sample for given in steps])
    for plain, stored in zip(*results, strict=True):
        assert torch.equal(plain, stored)


def test_a_condition_does_not_see_another(net, monkeypatch):
    seen: dict[str, list[Tensor]] = {}
    given = inputs(net)
    with torch.no_grad():
        for name, seed in (("a", 20), ("b", 40)):
            stores: dict[int, Any] = {}
            changed = [pictures(2, independent=True)[0], pictures(2, seed, independent=True)[1]]
            with Branches(net).on(Conditions(changed, stores=stores)):
                net(**given)
            (store,) = stores.values()
            seen[name] = [pair for layer in range(4) for pair in store.read(layer)]
            remove_branches(net)
    for layer in range(4):
        for one, other in zip(seen["a"][2 * layer], seen["b"][2 * layer], strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(seen["a"][2 * layer + 1][0], seen["b"][2 * layer + 1][0])


def test_strength_multiplies_the_weights_of_the_conditions_keys(net):
    """A strength of 2 is the condition given twice, where conditions are independent."""
    (picture,) = pictures(1, independent=True)
    branches, given = Branches(net), inputs(net)
    with torch.no_grad():
        with branches.on(Conditions([picture], strength=2.0)):
            strong = net(**given).sample
        with branches.on(Conditions([picture, picture])):
            twice = net(**given).sample
    torch.testing.assert_close(strong, twice, rtol=1e-4, atol=2e-5)


def test_generated_tokens_alone_are_computed_and_all_are_returned(net):
    """Token integration: 4x6 tokens, some generated, the others known; not square, two rows."""
    generated = torch.tensor([0, 3, 4, 9, 10, 23])
    kept = torch.tensor([i for i in range(24) if i not in generated.tolist()])
    known, given = randn(BATCH, 4, 8, 12, seed=50), inputs(net, t=0.5)
    condition = Condition(known, Placement(), kept)
    counted = []
    net.x_embedder.register_forward_hook(lambda _, args, __: counted.append(args[0].shape[1]))
    with torch.no_grad(), Branches(net).on(Conditions([condition], generated=generated, known=known)):
        velocity = net(**given).sample
    assert counted == [6, 18]
    clean = FluxPipeline._pack_latents(known, *known.shape)
    straight = given["hidden_states"] - 0.5 * velocity
    torch.testing.assert_close(straight[:, kept], clean[:, kept])
    assert not torch.allclose(straight[:, generated], clean[:, generated], atol=0.1)


def test_the_layers_that_get_lora(net):
    names = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    own = [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]
    hits = [name for name in own if re.fullmatch(CONDITION_TARGETS, name)]
    assert len(hits) == 1 + 6 * 2 + 6 * 2
    assert "x_embedder" in hits and "single_transformer_blocks.1.proj_out" in hits and "proj_out" not in hits


def test_positions_are_scaled_then_shifted():
    ids = Placement((1.0, -32.0), 2.0).ids(2, 2, torch.device("cpu"))
    assert ids.tolist() == [[0, 1.5, -31.5], [0, 1.5, -29.5], [0, 3.5, -31.5], [0, 3.5, -29.5]]


def test_a_plan_says_who_sees_whom():
    assert BranchPlan(2).sees(0) == (0, 1, 2) and BranchPlan(2).sees(2) == (0, 2)
    assert BranchPlan(2, independent=frozenset({2})).sees(2) == (2,)
    assert BranchPlan(2, independent=frozenset({2})).sees(1) == (0, 1)
    assert list(BranchPlan(2, independent=frozenset({1, 2}), stored=True).computed) == [0]
