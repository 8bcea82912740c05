"""FLUX's transformer with condition pictures beside text and image, each in a branch of its own.

A condition is clean: its modulation is that of t = 0 with a guidance of 1. Its LoRA acts on its tokens alone; text and
image stay on the base weights, or have a LoRA of their own. The stock blocks cannot do this (they modulate and project
all tokens alike), so that while branches are in, `forward` of the transformer and of its blocks is replaced by what is
below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer.branches import MAIN, BranchPlan, KeyValue, Placement, Store, joined, strength_bias

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Condition:
    """One condition picture: latents [B, C, h, w] as the transformer sees them, or [1, C, h, w] for every row."""

    latents: Tensor
    placement: Placement
    kept: Tensor | None = None  # indices of the tokens that are used; None: all
    independent: bool = False  # sees neither text nor picture
    adapter: str = "default"  # that acts on its tokens


@dataclass
class Conditions:
    """What the next forward passes are conditioned on. `stores` make them reuse keys and values, where all conditions
    are independent.

    With `generated` (indices of the picture's tokens) the first branch holds these tokens alone; all others are known:
    `known` [B, C, h, w] are their clean latents, and their velocity is the one that leads straight there.
    """

    pictures: Sequence[Condition] = ()
    strength: float = 1.0
    stores: dict[int, Store] | None = None  # by the pooled text of the pass
    generated: Tensor | None = None
    known: Tensor | None = None


@dataclass(frozen=True)
class _Step:
    """One forward pass: what every block needs of it."""

    plan: BranchPlan
    adapters: list[str | None]  # of each branch
    tembs: list[Tensor]  # [B, D] of each branch
    rotary: list[Rotary]
    strength: float
    store: Store | None
    last: nn.Module  # the last block, behind which nothing reads the conditions


@dataclass
class Branches:
    """Branches put into a transformer. With no conditions set, it computes what the stock one does with the adapter
    `main` (peft's name; None: without any).
    """

    transformer: FluxTransformer2DModel
    main: str | None = None
    conditions: Conditions = field(default_factory=Conditions)

    def __post_init__(self) -> None:
        net = self.transformer
        self._stock = net.forward
        net.forward = self._forward
        for index, block in enumerate(net.transformer_blocks):
            block.forward = partial(_double, block, index, block.forward)
        for index, block in enumerate(net.single_transformer_blocks, len(net.transformer_blocks)):
            block.forward = partial(_single, block, index, block.forward)
        self.settle()

    def settle(self) -> None:
        """Have text and picture on `main`, after adapters or their strengths were changed."""
        _route(self.transformer, self.main)

    @contextmanager
    def on(self, conditions: Conditions) -> Iterator[None]:
        """Inside, the transformer is conditioned."""
        before, self.conditions = self.conditions, conditions
        try:
            yield
        finally:
            self.conditions = before

    def _forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **given: Any) -> Any:
        chosen = self.conditions
        if not chosen.pictures:
            return self._stock(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **given)
        tokens, ids = hidden_states, given["img_ids"]
        if chosen.generated is not None:
            tokens, ids = tokens[:, chosen.generated], ids[chosen.generated]
        sample = self._branched(tokens, encoder_hidden_states, given | {"img_ids": ids})
        if chosen.generated is not None:
            sample = _scattered(sample, hidden_states, chosen, given["timestep"])
        return Transformer2DModelOutput(sample=sample) if given.get("return_dict", True) else (sample,)

    def _branched(self, tokens: Tensor, context: Tensor, given: dict[str, Any]) -> Tensor:
        net, chosen = self.transformer, self.conditions
        step = self._step(tokens, context, given)
        streams = [net.x_embedder(tokens)]
        for one in () if step.plan.stored else chosen.pictures:
            with _routed(net.x_embedder, one.adapter, self.main):
                streams.append(net.x_embedder(_packed(one, tokens)))
        text = net.context_embedder(context)
        for block in net.transformer_blocks:
            text, streams = self._call(block, text, streams, step)
        streams = [torch.cat([text, streams[MAIN]], dim=1), *streams[1:]]
        for block in net.single_transformer_blocks:
            streams = self._call(block, streams, step)
        image = streams[MAIN][:, text.shape[1] :]
        return net.proj_out(net.norm_out(image, step.tembs[MAIN]))

    def _call(self, block: nn.Module, *given: Any) -> Any:
        if torch.is_grad_enabled() and self.transformer.gradient_checkpointing:
            return self.transformer._gradient_checkpointing_func(block, *given)
        return block(*given)

    def _step(self, tokens: Tensor, context: Tensor, given: dict[str, Any]) -> _Step:
        net, chosen = self.transformer, self.conditions
        # a condition is modulated by the pooled text, too: a call without the prompt stores its own
        store = (
            None if chosen.stores is None else chosen.stores.setdefault(given["pooled_projections"].data_ptr(), Store())
        )
        independent = frozenset(i for i, one in enumerate(chosen.pictures, start=1) if one.independent)
        plan = BranchPlan(len(chosen.pictures), independent, stored=bool(store))
        guidance, pooled, dtype = given.get("guidance"), given["pooled_projections"], net.x_embedder.weight.dtype
        dtype = torch.get_autocast_dtype(tokens.device.type) if torch.is_autocast_enabled(tokens.device.type) else dtype
        times = [(given["timestep"], guidance)]
        clean = torch.zeros_like(given["timestep"])
        times += [(clean, None if guidance is None else torch.ones_like(guidance))] * (len(plan.computed) - 1)
        tembs = [
            net.time_text_embed(t.to(dtype) * 1000, pooled)
            if g is None
            else net.time_text_embed(t.to(dtype) * 1000, g.to(dtype) * 1000, pooled)
            for t, g in times
        ]
        rotary = [net.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))]
        if not plan.stored:
            rotary += [net.pos_embed(_ids(one)) for one in chosen.pictures]
        last = (net.single_transformer_blocks or net.transformer_blocks)[-1]
        adapters = [self.main, *(one.adapter for one in chosen.pictures)]
        return _Step(plan, adapters, tembs, rotary, chosen.strength, store, last)


def remove_branches(net: FluxTransformer2DModel) -> None:
    """Give the transformer and its blocks their own forward back, also where putting them in was stopped halfway."""
    for module in (net, *net.transformer_blocks, *net.single_transformer_blocks):
        forward = module.__dict__.get("forward")
        ours = (getattr(forward, "func", None), getattr(forward, "__func__", None))
        if {_double, _single, Branches._forward} & set(ours):
            del module.forward
    for layer in _tuner_layers(net):
        layer._disable_adapters = False


def _packed(condition: Condition, like: Tensor) -> Tensor:
    """Latents [B or 1, C, h, w] -> tokens [B, n, 4 C]."""
    latents = condition.latents.to(like)
    tokens = FluxPipeline._pack_latents(latents, *latents.shape)
    tokens = tokens.expand(like.shape[0], *tokens.shape[1:])
    return tokens if condition.kept is None else tokens[:, condition.kept]


def _ids(condition: Condition) -> Tensor:
    height, width = condition.latents.shape[-2:]
    ids = condition.placement.ids(height // 2, width // 2, condition.latents.device)
    return ids if condition.kept is None else ids[condition.kept]


def _scattered(sample: Tensor, noisy: Tensor, chosen: Conditions, t: Tensor) -> Tensor:
    """The velocity of all the picture's tokens [B, n, 4 C]: `sample` at the generated ones, else noise - data."""
    known = FluxPipeline._pack_latents(chosen.known.to(noisy), *chosen.known.shape)
    whole = (noisy - known) / t.to(noisy).view(-1, 1, 1)
    index = chosen.generated.view(1, -1, 1).expand(noisy.shape[0], -1, noisy.shape[2])
    return whole.scatter(1, index, sample.to(noisy))


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _route(module: nn.Module, adapter: str | None) -> None:
    """Have the module's adapter of that name act and no other, or none."""
    for layer in _tuner_layers(module):
        # peft's own switches would also freeze and thaw the matrices. DoRA's magnitudes know no scale, not even of 0.
        layer._disable_adapters = adapter is None or not layer.scaling.get(adapter)
        if adapter is not None:
            layer._active_adapter = [adapter]


@contextmanager
def _routed(module: nn.Module, adapter: str | None, main: str | None) -> Iterator[None]:
    """Inside, the module's adapter of that name acts in place of `main`."""
    if adapter == main:
        yield
        return
    _route(module, adapter)
    try:
        yield
    finally:
        _route(module, main)


def _heads(attention: nn.Module, states: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Query, key, value [B, n, heads, d] by the projections `names`, normed, not yet rotated."""
    query, key, value = (getattr(attention, n)(states).unflatten(-1, (attention.heads, -1)) for n in names[:3])
    return [getattr(attention, names[3])(query), getattr(attention, names[4])(key), value]


OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


def _rotated(heads: list[Tensor], rotary: Rotary) -> tuple[Tensor, KeyValue]:
    query, key, value = heads
    turned = [apply_rotary_emb(one, rotary, sequence_dim=1) for one in (query, key)]
    return turned[0], (turned[1], value)


def _attend(attention: nn.Module, queries: list[Tensor | None], parts: list[KeyValue], step: _Step) -> list[Tensor]:
    """What each computed branch's queries read, [B, n, D]; one call a branch and no mask between branches."""
    results = []
    for branch, query in enumerate(queries):
        if query is None:
            continue
        key, value = joined(parts, step.plan.sees(branch))
        bias = strength_bias(parts, step.strength) if branch == MAIN else None
        read = dispatch_attention_fn(query, key, value, attn_mask=bias, backend=attention.processor._attention_backend)
        results.append(read.flatten(2, 3).to(query.dtype))
    return results


def _parts(computed: list[KeyValue], layer: int, step: _Step) -> list[KeyValue]:
    """Keys and values of all branches: the stored ones behind those computed; computed ones are stored if asked."""
    if step.plan.stored:
        return [*computed, *step.store.read(layer)]
    if step.store is not None:
        step.store.write(computed[1:])
    return computed


def _double(block: nn.Module, layer: int, stock: Any, *given: Any, **named: Any) -> Any:
    """A block whose text has weights of its own: (text [B, n, D], streams) -> the same."""
    if named or not isinstance(given[-1], _Step):
        return stock(*given, **named)
    text, streams, step = given
    states, *text_gates = block.norm1_context(text, emb=step.tembs[MAIN])
    text_heads = _heads(block.attn, states, ADDED)
    queries, computed, gates = [], [], []
    for branch, stream in enumerate(streams):
        with _routed(block, step.adapters[branch], step.adapters[MAIN]):
            states, *gate = block.norm1(stream, emb=step.tembs[branch])
            heads = _heads(block.attn, states, OWN)
        if branch == MAIN:
            heads = [torch.cat(pair, dim=1) for pair in zip(text_heads, heads, strict=True)]
        query, part = _rotated(heads, step.rotary[branch])
        queries.append(query)
        computed.append(part)
        gates.append(gate)
    main, *others = _attend(block.attn, queries, _parts(computed, layer, step), step)
    text_read, image_read = main[:, : text.shape[1]], main[:, text.shape[1] :]
    text = _fed(text, (block.attn.to_add_out(text_read), text_gates), block.norm2_context, block.ff_context)
    found = []
    for branch, (stream, read) in enumerate(zip(streams, [image_read, *others], strict=True)):
        with _routed(block, step.adapters[branch], step.adapters[MAIN]):
            read = block.attn.to_out[1](block.attn.to_out[0](read))
            found.append(_fed(stream, (read, gates[branch]), block.norm2, block.ff))
    return text, found


def _fed(stream: Tensor, read: tuple[Tensor, Sequence[Tensor]], norm: nn.Module, feed: nn.Module) -> Tensor:
    """A stream behind attention and MLP, both gated."""
    attended, (gate, shift_mlp, scale_mlp, gate_mlp) = read
    stream = stream + gate.unsqueeze(1) * attended
    states = norm(stream) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    return _clipped(stream + gate_mlp.unsqueeze(1) * feed(states))


def _single(block: nn.Module, layer: int, stock: Any, *given: Any, **named: Any) -> Any:
    """A block in which text and image are one stream: streams -> streams. The last one drops the conditions."""
    if named or not isinstance(given[-1], _Step):
        return stock(*given, **named)
    streams, step = given
    queries, computed, rests = [], [], []
    for branch, stream in enumerate(streams):
        with _routed(block, step.adapters[branch], step.adapters[MAIN]):
            states, gate = block.norm(stream, emb=step.tembs[branch])
            read = branch == MAIN or block is not step.last
            query, part = _rotated(_heads(block.attn, states, OWN), step.rotary[branch])
            queries.append(query if read else None)
            computed.append(part)
            rests.append((gate, block.act_mlp(block.proj_mlp(states))) if read else None)
    results = _attend(block.attn, queries, _parts(computed, layer, step), step)
    found = []
    for branch, result in enumerate(results):
        gate, mlp = rests[branch]
        with _routed(block, step.adapters[branch], step.adapters[MAIN]):
            added = block.proj_out(torch.cat([result, mlp], dim=2))
        found.append(_clipped(streams[branch] + gate.unsqueeze(1) * added))
    return found


def _clipped(stream: Tensor) -> Tensor:
    return stream.clip(-65504, 65504) if stream.dtype == torch.float16 else stream
