"""What a plan has in place of attention and of an MLP: recurrences, and mixtures of experts."""

import ctypes
from typing import Any

import torch
from torch import nn

from ..experts import PackedExperts, PackedStack
from ..kernels.cpu import step as native
from .pieces import Pieces, Unplanned

_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_FACTORS = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
# the layers that the gated delta rule's input goes through, and its norm
_RULES = {
    "four layers": (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), "norm"),
    "by key head": (("in_proj_qkvz", "in_proj_ba"), "norm"),
    "six layers": (("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj"), "o_norm"),
}

Shapes = tuple[tuple[int, ...] | None, tuple[int, ...]]  # of states and windows


def gated_delta_rule(plan: Pieces, block: Any, name: str, rule: Any, norm: Any) -> Shapes:
    """Fill a block whose `linear_attn` is one of Qwen3-Next's kind; what a sequence keeps of it."""
    parts = next(parts for parts, (layers, _) in _RULES.items() if hasattr(rule, layers[0]))
    layers, norm_name = _RULES[parts]
    block.in_count = plan.products([(f"{name}.{layer}", getattr(rule, layer)) for layer in layers], norm, block.into)
    out = "o_proj" if parts == "six layers" else "out_proj"
    plan.products([(f"{name}.{out}", getattr(rule, out))], None, [block.out])
    if rule.head_v_dim % native.COLUMNS:
        raise Unplanned(
            f"{name} has values of {rule.head_v_dim} features, which must be a multiple of {native.COLUMNS}"
        )
    gated = getattr(rule, norm_name)
    if rule.conv1d.bias is not None or getattr(gated, "activation", "silu") != "silu" or rule.activation != "silu":
        raise Unplanned(f"{name} has a bias in its convolution, or gates that are not silu")
    plan.watch(rule.conv1d, "weight")
    plan.watch(rule, "A_log", "dt_bias")
    channels, _, kernel = rule.conv1d.weight.shape
    tensors = (rule.conv1d.weight[:, 0].T, rule.A_log.float().exp(), rule.dt_bias)
    floats = [tensor.detach().float().contiguous() for tensor in tensors]
    recurrence = native.Recurrence(norm=plan.inner_norm(gated), kernel=kernel, channels=channels)
    recurrence.convolution, recurrence.speed, recurrence.shift = (t.data_ptr() for t in floats)
    recurrence.key_heads, recurrence.value_heads = rule.num_k_heads, rule.num_v_heads
    recurrence.key_dim, recurrence.value_dim = rule.head_k_dim, rule.head_v_dim
    recurrence.most = 2 if getattr(rule, "allow_neg_eigval", False) else 1
    recurrence.parts = native.PARTS[parts]
    plan.alive += [floats, recurrence]
    block.recurrence = ctypes.pointer(recurrence)
    return (rule.num_v_heads, rule.head_k_dim, rule.head_v_dim), (kernel - 1, channels)


def state_space(plan: Pieces, block: Any, name: str, mixer: Any, norm: Any) -> Shapes:
    """Fill a block whose mixer is one of Mamba-2's kind; what a sequence keeps of it."""
    block.in_count = plan.products([(f"{name}.in_proj", mixer.in_proj)], norm, block.into)
    plan.products([(f"{name}.out_proj", mixer.out_proj)], None, [block.out])
    if mixer.head_dim % native.COLUMNS:
        raise Unplanned(f"{name} has heads of {mixer.head_dim} features, which must be a multiple of {native.COLUMNS}")
    shortest, longest = mixer.time_step_limit
    if mixer.activation != "silu" or longest != float("inf"):
        raise Unplanned(f"{name} has gates that are not silu, or longest steps")
    plan.watch(mixer.conv1d, "weight", *(["bias"] if mixer.conv1d.bias is not None else []))
    plan.watch(mixer, "A_log", "dt_bias", "D")
    channels, _, kernel = mixer.conv1d.weight.shape
    bias = torch.zeros(channels) if mixer.conv1d.bias is None else mixer.conv1d.bias
    tensors = (mixer.conv1d.weight[:, 0].T, bias, mixer.D, mixer.A_log.float().exp(), mixer.dt_bias)
    floats = [tensor.detach().float().contiguous() for tensor in tensors]
    space = native.Recurrence(*(t.data_ptr() for t in floats), plan.inner_norm(mixer.norm), kernel=kernel)
    space.norm_size = getattr(mixer.norm, "group_size", mixer.intermediate_size)
    space.channels, space.parts, space.shortest = channels, native.PARTS["state space"], shortest
    space.key_heads, space.value_heads = mixer.n_groups, mixer.num_heads
    space.key_dim, space.value_dim = mixer.ssm_state_size, mixer.head_dim
    plan.alive += [floats, space]
    block.recurrence = ctypes.pointer(space)
    return (mixer.num_heads, mixer.ssm_state_size, mixer.head_dim), (kernel - 1, channels)


def latent_attention(plan: Pieces, block: Any, name: str, attention: Any, norm: Any) -> native.Cache:
    """Fill a block whose attention is of DeepSeek's kind, but for its output; what a sequence keeps of it."""
    low = getattr(attention, "q_a_proj", None)
    first = ("q_proj", attention.q_proj) if low is None else ("q_a_proj", low)
    into = [(f"{name}.{first[0]}", first[1]), (f"{name}.kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa)]
    block.in_count = plan.products(into, norm, block.into)
    latent = native.Latent(rank=attention.kv_lora_rank, norm=plan.norm(attention.kv_a_layernorm))
    if low is not None:
        latent.query_rank = attention.q_lora_rank
        plan.products([(f"{name}.q_b_proj", attention.q_b_proj)], attention.q_a_layernorm, [latent.query])
    plan.products([(f"{name}.kv_b_proj", attention.kv_b_proj)], None, [latent.expand])
    plan.alive.append(latent)
    block.latent = ctypes.pointer(latent)
    rank = attention.kv_lora_rank if hasattr(attention, "expand_kv") else 0  # else transformers keeps keys and values
    shape = attention.num_heads, attention.qk_head_dim, attention.v_head_dim
    return native.Cache(*shape, rank, attention.qk_rope_head_dim)


def short_convolution(plan: Pieces, block: Any, name: str, rule: Any, norm: Any) -> Shapes:
    """Fill a block whose `conv` is one of LFM2's kind; what a sequence keeps of it."""
    block.in_count = plan.products([(f"{name}.in_proj", rule.in_proj)], norm, block.into)
    plan.products([(f"{name}.out_proj", rule.out_proj)], None, [block.out])
    if rule.conv.bias is not None:
        raise Unplanned(f"{name} has a bias in its convolution")
    plan.watch(rule.conv, "weight")
    channels, _, kernel = rule.conv.weight.shape
    values = rule.conv.weight[:, 0].T.detach().float().contiguous()
    recurrence = native.Recurrence(values.data_ptr(), kernel=kernel, channels=channels)
    plan.alive += [values, recurrence]
    block.recurrence = ctypes.pointer(recurrence)
    return None, (kernel - 1, channels)


def mixture(plan: Pieces, mlp: Any, experts: Any, norm: Any) -> native.Mixture:
    """Experts and what chooses among them; the router's options have one name in nearly all families that have them."""
    family = plan.family
    name = f"{family.holder}.experts"
    if not isinstance(experts, PackedExperts):
        raise Unplanned(f"{name} is a {type(experts).__name__}, not packed experts")
    if experts.has_gate != (family.mlp[0] is not None) or getattr(experts, "has_post_expert_norm", False):
        raise Unplanned(f"{name} are gated otherwise than the MLPs, or have a norm of their own")
    if not isinstance(getattr(mlp, "fc1_latent_proj", nn.Identity()), nn.Identity):
        raise Unplanned(f"{name} see latents")
    router: Any = getattr(mlp, "gate", None) or mlp.router
    chosen = router.top_k if hasattr(router, "top_k") else router.config.top_k_experts
    holders: tuple[Any, ...] = (router, getattr(router, "moe_statics", None), mlp)
    mixed = native.Mixture(experts=experts.stacks[0].experts, chosen=chosen, groups=1, groups_chosen=1)
    if norm is not None:
        mixed.norm = plan.norm(norm)
    mixed.inner = experts.stacks[1].in_features
    mixed.first, mixed.second = (_stack(plan, f"{name}.{m.packed}", experts.stack(m)) for m in experts.stacks)
    linear = next((getattr(router, of) for of in ("wg", "gate", "proj") if hasattr(router, of)), router)
    gate = getattr(mlp, "shared_expert_gate", None)
    weight = linear.weight
    plan.watch(linear, "weight")
    if gate is not None:
        plan.watch(gate, "weight")
        weight, mixed.shared_gate = torch.cat([weight, gate.weight.to(weight.dtype)]), True
    weight = weight.detach().contiguous()
    if getattr(linear, "bias", None) is not None:
        plan.watch(linear, "bias")
        bias = nn.functional.pad(linear.bias.detach().float(), (0, int(mixed.shared_gate)))
        mixed.bias = bias.data_ptr()
        plan.alive.append(bias)
    found = [(m, of) for m in holders for of in _CORRECTIONS if hasattr(m, of)]
    for holder, of in found[:1]:
        plan.watch(holder, of)
        correction = getattr(holder, of).detach().float().flatten().contiguous()
        mixed.correction = correction.data_ptr()
        plan.alive.append(correction)
    mixed.router, mixed.router_type = weight.data_ptr(), native.TYPES[weight.dtype]
    normalized = family.normalized if family.normalized is not None else family.score != "softmax of chosen"
    mixed.score, mixed.normalized = native.SCORES[family.score], getattr(router, "norm_topk_prob", normalized)
    mixed.added, mixed.least = family.added, getattr(router, "norm_min", 1e-20)
    mixed.factor = next((getattr(router, of) for of in _FACTORS if hasattr(router, of)), 1)
    if getattr(router, "num_group", None) is not None and getattr(router, "topk_method", None) != "greedy":
        mixed.groups, mixed.groups_chosen, mixed.group_best = router.num_group, router.topk_group, family.group_best
    if hasattr(router, "per_expert_scale"):  # Gemma 4's, whose input has a norm of its own
        plan.watch(router, "scale", "per_expert_scale")
        scale = (router.scale.detach().float() * router.scalar_root_size).contiguous()
        factors = router.per_expert_scale.detach().float().contiguous()
        mixed.router_norm, mixed.factors = native.Norm(scale.data_ptr(), None, router.eps, False), factors.data_ptr()
        plan.alive += [scale, factors]
    plan.alive += [mixed, weight]
    return mixed


def _stack(plan: Pieces, name: str, stack: PackedStack) -> int:
    """The address of the addresses of a stack's layers, which all take the same codes."""
    plan.watch(stack, "weight", "weight_scale", "bias")
    layers = [plan.layer(f"{name}[{e}]", layer, watched=False) for e, layer in enumerate(stack.layers())]
    if len({(layer.form, layer.isa, layer.activation_bits) for layer in layers}) > 1:
        raise Unplanned(f"{name} runs on several backends")
    pointers = (ctypes.c_void_p * len(layers))(*map(ctypes.addressof, layers))
    plan.alive.append(pointers)
    return ctypes.addressof(pointers)
