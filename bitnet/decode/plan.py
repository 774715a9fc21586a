"""From a transformers model to the native step's plan: which models it computes, and what of each goes where.

The step (kernels/csrc/step.h) knows one block:

    x += [norm](out([norm](attention(q, k, v))))     q, k, v of [norm](x); q and k [norm], then [rotary positions]
    x += [norm](down([norm](f(gate([norm](x))) [* up([norm](x))])))

with what stands in brackets where a model has it, norms of two kinds, and both lines of the same x in some models. In
place of the second line's MLP, or beside it, there may be experts, of which a router chooses a few for each token; keys
and values may come from latents; and in place of attention there may be the gated delta rule, a state space or a short
convolution (mixers.py). FAMILIES (families.py) says of which classes of transformers that is all they compute; what a
block has is read off its modules.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cpu import library
from ..kernels.cpu import step as native
from .families import FAMILIES, kind_of, known
from .mixers import gated_delta_rule, latent_attention, mixture, short_convolution, state_space
from .pieces import Pieces, Unplanned

_GATES = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "xielu": "xielu",
    "clamped_swiglu": "clamped_swiglu",
}
_ACTIVATIONS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "activation")
_FUSED = ("gate_up_proj", "input_linear")  # both in one layer
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
# whose tables do not depend on how long a text is
_ROPES = ("default", "linear", "llama3", "yarn", "ntk_alpha", "proportional")


class Plan(Pieces):
    """A model's plan, tied to the tensors and modules it was made from.

    base:       a model without its head, which computes text (see text_part)
    cache_type: "float32", "float16" or "int8"
    isa:        the name of an instruction set, by default the best
    Raises Unplanned, with the reason, and ValueError for another cache_type.
    """

    def __init__(self, base: Any, cache_type: str = "float16", isa: str | None = None) -> None:
        if cache_type not in native.CACHE_TYPES:
            raise ValueError(f"cache_type must be one of {', '.join(native.CACHE_TYPES)}, got {cache_type!r}")
        if not known(base):
            raise Unplanned(f"{type(base).__name__} is not one of the models that the native step knows")
        if isinstance(library.load(), str):
            raise Unplanned("there is no native library")
        config, family = base.config, FAMILIES[type(base).__name__]
        super().__init__(family, config.hidden_size, isa)
        self.cache_type = native.CACHE_TYPES[cache_type]
        self.watch_modules(base)
        layers = family.blocks(list(getattr(base, family.layers))[: config.num_hidden_layers])
        attending = [a for a in (getattr(layer, family.attention, None) for layer in layers) if a is not None]
        if not attending:
            raise Unplanned("there is no block with attention")
        attention = attending[0]
        self.blocks, self._config = len(layers), config
        self.heads = config.num_attention_heads
        self.kv_heads = self.heads if family.by_head else family.kv_heads(config) or self.heads
        self.positions = config.max_position_embeddings
        gate = self._checked(config, attending)
        self.learned = None if family.learned is None else getattr(base, family.learned)
        if self.learned is not None:
            self.watch(self.learned, "weight")
        ropes = self._kinds(base, attending)
        self.kept = native.Kept(())
        self.attending: list[int] = []  # which of transformers' layers have keys and values
        self.recurring: list[int] = []  # and which have states
        self._next = native.CachePlace()
        self._stored: dict[str, tuple[native.Cache, native.CachePlace]] = {}  # by kind, the last that was stored
        blocks = (native.Block * self.blocks)()
        recurrences = 0
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            block.state = recurrences
            recurrences += getattr(layer, family.recurrence, None) is not None
            try:
                self._fill(block, layer, ropes)
            except Unplanned as why:
                raise Unplanned(f"{family.layers}.{i}.{why}") from None
        plan = native.Plan()
        plan.blocks, plan.count = ctypes.cast(blocks, ctypes.c_void_p), self.blocks
        plan.hidden = self.hidden
        plan.per_layer = config.hidden_size_per_layer_input if family.per_layer else 0
        plan.scaling, plan.gate = _scaling(attention), native.GATES[gate]
        plan.cap = getattr(config, "attn_logit_softcapping", None) or 0
        plan.residual = getattr(config, "residual_multiplier", getattr(layers[0], "residual_scale", 1))
        plan.clip = getattr(config, "clip_qkv", None) or 0
        pairs = family.pairs or ("neighbours to halves" if config.rope_interleave else "halves")
        plan.pairs, plan.gated = native.PAIRS[pairs], family.mlp[0] is not None
        plan.by_head, plan.query_gate = family.by_head, self._query_gate
        states, windows = (None if s is None else (recurrences, *s) for s in (self.kept.states, self.kept.windows))
        self.kept = self.kept._replace(states=states, windows=windows)
        plan.final = self.norm(getattr(base, family.final))
        plan.cache_type, plan.isa = native.cache_type(cache_type), native.isa(isa)
        self.alive.append(blocks)
        self.native = plan
        self.reach(1)

    def _checked(self, config: Any, attending: list[Any]) -> str:
        """What is in its MLPs, of a model whose options are ones that the step computes."""
        attention, norms = attending[0], _norms(attending[0])
        if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
            raise Unplanned("its attention looks ahead")
        several = norms is not None and getattr(norms[0], "weight", torch.empty(0)).ndim > 1
        if getattr(attention, "qk_layernorm", False) or several:
            raise Unplanned("each head of its queries and keys has a norm of its own")
        if getattr(config, "clip_qkv", None) is not None and norms is not None:
            raise Unplanned("its queries and keys have norms and are clipped")
        if any(_scaling(other) != _scaling(attention) for other in attending):
            raise Unplanned("its layers scale their scores by different factors")
        if (odd := self.family.odd(config)) is not None:
            raise Unplanned(odd)
        activation = self.family.gate or next(getattr(config, name) for name in _ACTIVATIONS if hasattr(config, name))
        if activation not in _GATES:
            raise Unplanned(f"{activation!r} in its MLPs")
        return _GATES[activation]

    def _fill(self, block: Any, layer: Any, ropes: dict[str, int]) -> None:
        family = self.family
        mlp = layer if family.holder is None else getattr(layer, family.holder, None)
        block.parallel = getattr(layer, "use_parallel_residual", family.parallel)
        attends = getattr(layer, family.attention, None) is not None
        names = family.norms if attends or family.recurrent_norms is None else family.recurrent_norms
        norms = [None if name is None else _found(layer, name) for name in names]
        if block.parallel and norms[2] is None:
            norms[2] = norms[0]
        if attends:
            self._attention(block, getattr(layer, family.attention), norms[0], ropes)
        elif (rule := getattr(layer, family.recurrence, None)) is not None:
            space, short = hasattr(rule, "ssm_state_size"), hasattr(rule, "conv")
            fill = state_space if space else short_convolution if short else gated_delta_rule
            states, windows = fill(self, block, family.recurrence, rule, norms[0])
            self.recurring.append(rule.layer_idx)
            self.kept = self.kept._replace(states=states, windows=windows, transposed=space)
        holder, experts = family.holder, getattr(mlp, "experts", None)
        if experts is not None:
            block.mixture = ctypes.pointer(mixture(self, mlp, experts, norms[2]))
            if family.gate == "clamped_swiglu":
                block.bend[:2] = experts.alpha, experts.limit
            shared = [(m, name) for m in (mlp, layer) for name in _SHARED if getattr(m, name, None) is not None]
            holder, mlp = (f"{holder}.{shared[0][1]}", getattr(*shared[0])) if shared else (holder, None)
        elif hasattr(layer, "router"):
            block.mixture = ctypes.pointer(mixture(self, layer, layer.experts, layer.pre_feedforward_layernorm_2))
            block.mixture[0].after = self.norm(layer.post_feedforward_layernorm_2)
            block.mixture[0].beside = self.norm(layer.post_feedforward_layernorm_1)
        elif mlp is None:
            holder, mlp = "shared_mlp", getattr(layer, "shared_mlp", None)
        if mlp is not None:
            self._mlp(block, "" if holder is None else f"{holder}.", mlp, norms[2])
        if norms[1] is not None:
            block.after_attention = self.norm(norms[1])
        if norms[3] is not None:
            block.after_mlp = self.norm(norms[3])
        if family.per_layer and layer.hidden_size_per_layer_input:
            adds = native.PerLayer(after=self.norm(layer.post_per_layer_input_norm))
            self.products([("per_layer_input_gate", layer.per_layer_input_gate)], None, [adds.gate])
            self.products([("per_layer_projection", layer.per_layer_projection)], None, [adds.projection])
            self.alive.append(adds)
            block.per_layer = ctypes.pointer(adds)
        block.scalar = 1
        if hasattr(layer, "layer_scalar"):
            self.watch(layer, "layer_scalar")
            block.scalar = float(layer.layer_scalar)

    def _mlp(self, block: Any, prefix: str, mlp: Any, norm: Any) -> None:
        gate, up, down = self.family.mlp
        fused = next((name for name in _FUSED if hasattr(mlp, name)), "")
        down = down if hasattr(mlp, down) else "output_linear"
        block.inner = getattr(mlp, down).in_features
        first = _parts(prefix, mlp, [name for name in (gate, up) if name is not None], fused, (block.inner,) * 2)
        block.gate_count = self.products(first, norm, block.gate)
        self.products([(f"{prefix}{down}", getattr(mlp, down))], getattr(mlp, "ffn_sub_norm", None), [block.down])
        xielu: Any = getattr(mlp, "act_fn", None)
        if hasattr(xielu, "alpha_p"):
            self.watch(xielu, "alpha_p", "alpha_n", "beta", "eps")
            slopes = [nn.functional.softplus(slope.detach()) for slope in (xielu.alpha_p, xielu.alpha_n)]
            block.bend[:] = [float(v) for v in (slopes[0], xielu.beta + slopes[1], xielu.beta, xielu.eps)]

    def _attention(self, block: Any, attention: Any, norm: Any, ropes: dict[str, int]) -> None:
        family, name = self.family, self.family.attention
        latent = hasattr(attention, "kv_b_proj")
        if latent:
            self._query_gate, cache = 0, latent_attention(self, block, name, attention, norm)
        else:
            cache = self._heads(block, name, attention, norm)
        if cache.key_dim % native.RUN or cache.value_dim % native.RUN:
            dim = cache.key_dim if cache.key_dim % native.RUN else cache.value_dim
            raise Unplanned(f"{name} has heads of {dim} features, which must be a multiple of {native.RUN}")
        kind = kind_of(attention)
        block.heads = native.HeadShape(self.heads, *cache[:3])
        if block.reads:
            block.cache = self._stored[kind][1]
        else:
            block.cache = self._next
            self.attending.append(attention.layer_idx)
            self._stored[kind] = cache, self._next
            self._next = cache.before(self._next)
            self.kept = self.kept._replace(caches=(*self.kept.caches, cache))
        sub = getattr(attention, "attn_sub_norm", None)
        self.products([(f"{name}.{family.out}", getattr(attention, family.out))], sub, [block.out])
        if (sinks := getattr(attention, "sinks", None)) is not None:
            self.watch(attention, "sinks")
            self.alive.append(values := sinks.detach().float().contiguous())
            block.sinks = values.data_ptr()
        block.window = family.window(attention) or 0
        block.rope = ropes[family.turning(attention)] if ropes and family.rotates(attention) else -1
        if block.rope >= 0:
            self._turned[block.rope] = cache.turned or cache.key_dim

    def _heads(self, block: Any, name: str, attention: Any, norm: Any) -> native.Cache:
        """What makes queries, keys and values, of a block whose keys are all of one kind."""
        family, prefix = self.family, f"{name}."
        dim = getattr(attention, "head_dim", self.hidden // self.heads)
        block.reads = getattr(attention, "is_kv_shared_layer", False)
        block.keys_only = getattr(attention, "use_alternative_attention", False)
        kv_heads = self.kv_heads
        if block.reads:
            kv_heads = self._stored[kind_of(attention)][0].kv_heads
        elif hasattr(attention, "k_proj"):
            kv_heads = getattr(attention.k_proj, "out_features", kv_heads * dim) // dim
        width, key_width = self.heads * dim, kv_heads * dim
        self._query_gate = 0
        if family.by_head:
            into: list[Any] = [(prefix + family.fused, getattr(attention, family.fused))]
        else:
            sizes = width, key_width, key_width
            names = ["q_proj"] if block.reads else ["q_proj", "k_proj", "v_proj"][: 2 if block.keys_only else 3]
            into = _parts(prefix, attention, names, family.fused, sizes)
            if hasattr(attention, "gate_proj"):
                into.append((f"{prefix}gate_proj", attention.gate_proj))
                self._query_gate = 2
            elif getattr(getattr(attention, "q_proj", None), "out_features", width) == 2 * width:
                self._query_gate = 1
        block.in_count = self.products(into, norm, block.into)
        if block.reads:
            block.query = self.norm(attention.q_norm, dim)
        elif (norms := _norms(attention)) is not None:
            block.whole = getattr(norms[0], "weight", torch.empty(0)).numel() == width > dim
            block.query, block.key = (self.norm(n, dim) for n in norms)
            block.turned = family.turned
        if hasattr(attention, "v_norm"):
            block.value = self.norm(attention.v_norm, dim)
        return native.Cache(kv_heads, dim, dim)

    def _kinds(self, base: Any, attending: list[Any]) -> dict[str, int]:
        """Which table of rotary positions each kind of layer has, if any, once it is known that they are tables."""
        rotary: Any = getattr(base, self.family.rotary, None)
        self._ropes: list[str] = []
        self._turned: dict[int, int] = {}  # by table, features of a head that it may turn
        if rotary is None:
            return {}
        if isinstance(rotary, nn.ModuleList):  # one for each theta
            each: list[Any] = list(rotary)
            modules = {str(module.config.rope_parameters["rope_theta"]): module for module in each}
            ropes = {kind: module.rope_type for kind, module in modules.items()}
            self._rotary: Any = lambda like, at, kind: modules[kind](like, at)
        else:
            ropes = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
            self._rotary = rotary
        if (odd := set(ropes.values()).difference(_ROPES)) or len(ropes) > 2:
            raise Unplanned(f"rotary positions of type {', '.join(sorted(odd)) or list(ropes)}")
        self._ropes = list(ropes)
        kinds = {self.family.turning(attention) for attention in attending if self.family.rotates(attention)}
        if "" not in ropes and not kinds.issubset(ropes):
            raise Unplanned("layers without rotary positions of their kind")
        return {kind: self._ropes.index(kind if kind in ropes else "") for kind in kinds}

    def reach(self, positions: int) -> None:
        """Make the tables cover that many positions, at most the model's own. Raises ValueError beyond these."""
        if positions <= self.native.positions:
            return
        if positions > self.positions:
            raise ValueError(f"{positions} tokens, but this model was made for {self.positions}")
        positions = min(self.positions, max(2 * positions, 1024))
        at, tables = torch.arange(positions)[None], []
        for index, kind in enumerate(self._ropes):
            rope, (cosine, sine) = self.native.ropes[index], self._table(at, kind)
            half = cosine.shape[-1]
            if 2 * half > self._turned.get(index, 2 * half):
                raise Unplanned(f"rotary positions of {2 * half} features in heads of {self._turned[index]}")
            tables += [cosine, sine]
            rope.cosine, rope.sine, rope.half = cosine.data_ptr(), sine.data_ptr(), half
        if self.family.position_scales is not None:
            tables.append(self.family.position_scales(self._config, at[0].float()).contiguous())
            self.native.position_scales = tables[-1].data_ptr()
        self.native.positions = positions
        self.alive.append(tables)  # and the ones before, which another thread may be reading

    @torch.no_grad()
    def _table(self, at: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines at positions [1, P], each angle once: float32 [P, half], contiguous."""
        if hasattr(self._rotary, "mrope_section"):  # in time, height and width, which are one for text
            at = at.expand(3, 1, -1)
        like = torch.zeros(1, dtype=torch.float32)
        found = self._rotary(like, at, kind) if kind else self._rotary(like, at)
        if isinstance(found, Tensor):  # complex numbers, of neighbours
            return found[0].real.contiguous(), found[0].imag.contiguous()
        cosine, sine = (table[0] for table in found)
        half = cosine.shape[-1] if self.family.halves else cosine.shape[-1] // 2
        if self.family.halves or torch.equal(cosine[:, :half], cosine[:, half:]):
            columns = slice(0, half)
        elif self.family.pairs == "neighbours" and torch.equal(cosine[:, ::2], cosine[:, 1::2]):
            columns = slice(0, None, 2)
        else:
            raise Unplanned("rotary positions that do not pair features i and i + half")
        sine = -sine if self.family.flipped else sine
        return cosine[:, columns].contiguous(), sine[:, columns].contiguous()


def _found(layer: Any, name: str) -> Any:
    """A norm of a layer, or in a module of it; None if there is no such."""
    for part in name.split("."):
        layer = getattr(layer, part, None)
    return None if isinstance(layer, nn.Identity) else layer


def _scaling(attention: Any) -> float:
    return float(attention.scaling if hasattr(attention, "scaling") else attention.inv_norm_factor)


def _norms(attention: Any) -> tuple[Any, Any] | None:
    """Those of queries and keys."""
    found = [(getattr(attention, q), getattr(attention, k)) for q, k in _NORMS if hasattr(attention, k)]
    return found[0] if found else None


def _parts(prefix: str, module: Any, names: list[str], fused: str, sizes: tuple[int, ...]) -> list[Any]:
    """Layers by name, or where there is one layer for all of them its parts of so many outputs."""
    if not hasattr(module, fused):
        return [(f"{prefix}{name}", getattr(module, name)) for name in names]
    layer, parts, first = getattr(module, fused), [], 0
    for size in sizes:
        parts.append((f"{prefix}{fused}", layer, (first, first + size)))
        first += size
    return parts
