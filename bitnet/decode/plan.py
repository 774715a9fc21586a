"""From a transformers model to the native step's plan: which models it computes, and what of each goes where.

The step (kernels/csrc/step.h) knows one block:

    x += [norm](out([norm](attention(q, k, v))))     q, k, v of [norm](x); q and k [norm], then [rotary positions]
    x += [norm](down([norm](f(gate([norm](x))) [* up([norm](x))])))

with what stands in brackets where a model has it, norms of two kinds, and both lines of the same x in some models. In
place of the second line's MLP, or beside it, there may be experts, of which a router chooses a few for each token, and
in place of attention the gated delta rule.
FAMILIES (families.py) says of which model types that is true of all that their transformers class computes; what a
block has is read off its modules.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import PackedExperts, PackedStack
from ..kernels.cpu import library
from ..kernels.cpu import step as native
from ..kernels.cpu.linear import ROWS, prepared
from ..packed import PackedBitLinear
from .families import FAMILIES, known

_GATES = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
_ROPES = ("default", "linear", "llama3", "yarn", "ntk_alpha")  # whose tables do not depend on how long a text is


class Unplanned(Exception):
    """Why a model, or something in it, is not what the native step computes."""


def eps_of(norm: nn.Module) -> Any:
    """The eps of a norm, under either of its names; None if it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class Plan:
    """A model's plan, tied to the tensors and modules it was made from.

    base:       a model without its head, which computes text (see text_part)
    cache_type: "float32", "float16" or "int8"
    isa:        the name of an instruction set, by default the best
    Raises Unplanned, with the reason, and ValueError for another cache_type.
    """

    def __init__(self, base: Any, cache_type: str = "float16", isa: str | None = None) -> None:
        if cache_type not in native.CACHE_TYPES:
            raise ValueError(f"cache_type must be one of {', '.join(native.CACHE_TYPES)}, got {cache_type!r}")
        self._isa = isa
        self.cache_type = native.CACHE_TYPES[cache_type]
        self._watched: list[tuple[Any, str, Any, int]] = []
        self._hooks: list[dict[int, Any]] = []
        self._kept: list[Any] = []  # what the structures point to
        config = base.config
        if not known(base):
            raise Unplanned(f"{type(base).__name__} is not one of {', '.join(f.base for f in FAMILIES.values())}")
        if isinstance(library.load(), str):
            raise Unplanned("there is no native library")
        self._family = FAMILIES[config.model_type]
        layers = list(base.layers)[: config.num_hidden_layers]
        for name, module in base.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise Unplanned(f"{name or 'the model'} has hooks")
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for part, child in module._modules.items():
                self._watched.append((module._modules, part, child, -1))
        attending = [layer for layer in layers if hasattr(layer, self._family.attention)]
        if not attending:
            raise Unplanned("there is no block with attention")
        attention = getattr(attending[0], self._family.attention)
        self.blocks, self.hidden, self.mixtures = len(layers), config.hidden_size, False
        self.heads = config.num_attention_heads
        self.kv_heads = self.heads if self._family.by_head else config.num_key_value_heads
        self.head_dim = getattr(attention, "head_dim", config.hidden_size // self.heads)
        self.positions = config.max_position_embeddings
        if self.head_dim % native.RUN:
            raise Unplanned(f"heads of {self.head_dim} features, which must be a multiple of {native.RUN}")
        if getattr(config, "use_bidirectional_attention", False):
            raise Unplanned("its attention looks ahead")
        norms = _norms(attention)
        if getattr(attention, "qk_layernorm", False) or (norms is not None and norms[0].weight.ndim > 1):
            raise Unplanned("each head of its queries and keys has a norm of its own")
        if getattr(config, "clip_qkv", None) is not None:
            raise Unplanned("its queries, keys and values are clipped")
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", self._family.gate)
        if (gate := _GATES.get(activation or "")) is None:
            raise Unplanned(f"{activation!r} in its MLPs")
        ropes = self._kinds(base, attending)
        self.kept = native.Kept(len(attending), self.kv_heads, self.head_dim)
        blocks = (native.Block * self.blocks)()
        places = [0, 0]  # of caches, of states
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            recurs = not hasattr(layer, self._family.attention)
            block.place = places[recurs]
            places[recurs] += 1
            try:
                self._fill(block, layer, ropes)
            except Unplanned as why:
                raise Unplanned(f"layers.{i}.{why}") from None
        plan = native.Plan()
        plan.blocks, plan.count = ctypes.cast(blocks, ctypes.c_void_p), self.blocks
        plan.hidden, plan.heads, plan.kv_heads, plan.head_dim = self.hidden, self.heads, self.kv_heads, self.head_dim
        plan.scaling, plan.gate = attention.scaling, native.GATES[gate]
        plan.cap = getattr(config, "attn_logit_softcapping", None) or 0
        plan.residual = getattr(config, "residual_multiplier", 1)
        plan.interleaved, plan.gated = self._family.interleaved, self._family.mlp[0] is not None
        plan.by_head, plan.query_gate = self._family.by_head, self._query_gate
        shapes = (None if shape is None else (places[1], *shape) for shape in (self.kept.states, self.kept.windows))
        self.kept = native.Kept(*self.kept[:3], *shapes)
        plan.final = self._norm(getattr(base, self._family.final))
        plan.cache_type, plan.isa = native.cache_type(cache_type), native.isa(isa)
        self._kept.append(blocks)
        self.native = plan
        self.reach(1)

    def current(self) -> bool:
        """Whether the model still is what it was: the same modules and tensors, unwritten, without hooks."""
        if any(self._hooks):
            return False
        for holder, name, value, version in self._watched:
            if holder.get(name) is not value:
                return False
            if version >= 0 and value._version != version:
                return False
        return True

    def _watch(self, module: nn.Module, *names: str) -> None:
        for name in names:
            holder: Any = module._parameters if name in module._parameters else module._buffers
            value: Any = holder.get(name)
            version = -1 if value is None or value.is_inference() else value._version
            self._watched.append((holder, name, value, version))

    def _norm(self, module: Any) -> native.Norm:
        weight, eps = module.weight, eps_of(module)
        bias = getattr(module, "bias", None)
        self._watch(module, "weight", *(["bias"] if bias is not None else []))
        if weight is None or not isinstance(eps, float):
            raise Unplanned(f"a norm of type {type(module).__name__} without weight or eps")
        values = weight.detach().float()
        values = (1 + values if self._family.plus_one else values).contiguous()
        shift = None if bias is None else bias.detach().float().contiguous()
        self._kept += [values, shift]
        centered = self._family.centered or isinstance(module, nn.LayerNorm)
        return native.Norm(values.data_ptr(), None if shift is None else shift.data_ptr(), eps, centered)

    def _layer(
        self, name: str, module: nn.Module, rows: tuple[int, int] | None = None, watched: bool = True
    ) -> ctypes.Structure:
        """A layer, or the part of it that gives outputs [first, last)."""
        if not isinstance(module, PackedBitLinear):
            raise Unplanned(f"{name} is a {type(module).__name__}, not a packed layer")
        if module.transposed or (bits := module.activation_bits) is None:
            raise Unplanned(f"{name} takes float activations or is transposed")
        weight, backend = module.prepack()
        if (form := library.form_of_backend(backend)) is None:
            raise Unplanned(f"{name} runs on backend {backend!r}")
        if watched:
            self._watch(module, "weight", "weight_scale", "bias", "signs")
        scale, bias, n = module.weight_scale, module.bias, module.out_features
        if rows is not None:
            first, last = rows
            if first % ROWS:
                raise Unplanned(f"{name} is {first} outputs and others, and {first} is no multiple of {ROWS}")
            weight, n = weight[first // ROWS : -(-last // ROWS)], last - first
            scale = scale if len(scale) == 1 else scale[first:last]
            bias = None if bias is None else bias[first:last]
        layer = prepared(weight, scale, bias, n, module.in_features, form, self._isa, bits)
        self._kept.append(layer)
        return layer

    def _products(self, named: list[Any], norm: Any, into: Any) -> int:
        """Fill products with layers that share an input; layers that transform theirs alike share one. How many.

        named: for each its name, the module, and if it is a part of one its rows
        """
        outer = None if norm is None else self._norm(norm)
        count, previous = 0, None
        for name, module, *rows in named:
            layer = self._layer(name, module, *rows)
            inner, block, signs = module.rms_norm, module.spec.hadamard or 0, module.signs
            alike = inner is None and previous is not None and previous[0] == block and _equal(previous[1], signs)
            product = into[count - 1 if alike else count]
            if not alike:
                norms = [n for n in (outer, None if inner is None else self._inner(inner)) if n is not None]
                for i, value in enumerate(norms):
                    product.norms[i] = value
                product.hadamard, product.signs = block, None if signs is None else signs.data_ptr()
                count += 1
            product.layers[product.count] = ctypes.pointer(layer)
            product.count += 1
            previous = (block, signs) if inner is None else None
        return count

    def _inner(self, norm: Any) -> native.Norm:
        self._watch(norm, "weight")
        weight = norm.weight.detach().float().contiguous()
        self._kept.append(weight)
        return native.Norm(weight.data_ptr(), None, eps_of(norm), False)

    def _fill(self, block: Any, layer: Any, ropes: dict[str, int]) -> None:
        family, mlp = self._family, getattr(layer, self._family.holder)
        block.parallel = getattr(layer, "use_parallel_residual", family.parallel)
        norms = [None if name is None else getattr(layer, name, None) for name in family.norms]
        if block.parallel and norms[2] is None:
            norms[2] = norms[0]
        if hasattr(layer, family.attention):
            self._attention(block, getattr(layer, family.attention), norms[0], ropes)
        else:
            self._recurrence(block, getattr(layer, family.recurrence), norms[0])
        holder, experts = family.holder, getattr(mlp, "experts", None)
        if experts is not None:
            block.mixture = ctypes.pointer(self._mixture(mlp, experts, norms[2]))
            shared = [name for name in _SHARED if getattr(mlp, name, None) is not None]
            holder, mlp = (f"{holder}.{shared[0]}", getattr(mlp, shared[0])) if shared else (holder, None)
        if mlp is not None:
            gate, up, down = family.mlp
            names = [name for name in (gate, up) if name is not None]
            block.inner = getattr(mlp, down).in_features
            first = _parts(holder, mlp, names, "gate_up_proj", (block.inner,) * 2)
            block.gate_count = self._products(first, norms[2], block.gate)
            self._products([(f"{holder}.{down}", getattr(mlp, down))], getattr(mlp, "ffn_sub_norm", None), [block.down])
        if norms[1] is not None:
            block.after_attention = self._norm(norms[1])
        if norms[3] is not None:
            block.after_mlp = self._norm(norms[3])

    def _attention(self, block: Any, attention: Any, norm: Any, ropes: dict[str, int]) -> None:
        family = self._family
        width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if family.by_head:
            into = [(f"{family.attention}.{family.fused}", getattr(attention, family.fused))]
        else:
            sizes = width, key_width, key_width
            into = _parts(family.attention, attention, ["q_proj", "k_proj", "v_proj"], family.fused, sizes)
        block.in_count = self._products(into, norm, block.into)
        sub = getattr(attention, "attn_sub_norm", None)
        self._products([(f"{family.attention}.{family.out}", getattr(attention, family.out))], sub, [block.out])
        self._query_gate = hasattr(attention, "q_proj") and attention.q_proj.out_features == 2 * width
        if (norms := _norms(attention)) is not None:
            block.query, block.key = map(self._norm, norms)
            block.whole, block.turned = norms[0].weight.numel() == width > self.head_dim, family.turned
        block.window = family.window(attention) or 0
        block.rope = ropes[_kind(attention)] if family.rotates(attention) else -1

    def _recurrence(self, block: Any, rule: Any, norm: Any) -> None:
        """The gated delta rule of a block."""
        name = self._family.recurrence
        if hasattr(rule, "conv"):
            return self._short_convolution(block, name, rule, norm)
        into = [
            (f"{name}.{part}", getattr(rule, part)) for part in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        ]
        block.in_count = self._products(into, norm, block.into)
        self._products([(f"{name}.out_proj", rule.out_proj)], None, [block.out])
        if rule.head_v_dim % native.COLUMNS:
            raise Unplanned(
                f"{name} has values of {rule.head_v_dim} features, which must be a multiple of {native.COLUMNS}"
            )
        self._watch(rule.conv1d, "weight")
        self._watch(rule, "A_log", "dt_bias")
        if rule.conv1d.bias is not None or rule.norm.activation != "silu" or rule.activation != "silu":
            raise Unplanned(f"{name} has a bias in its convolution, or gates that are not silu")
        channels, _, kernel = rule.conv1d.weight.shape
        tensors = (rule.conv1d.weight[:, 0].T, rule.A_log.float().exp(), rule.dt_bias)
        floats = [tensor.detach().float().contiguous() for tensor in tensors]
        gated = self._inner(rule.norm)
        recurrence = native.Recurrence(*(t.data_ptr() for t in floats), gated, kernel, channels)
        recurrence.key_heads, recurrence.value_heads = rule.num_k_heads, rule.num_v_heads
        recurrence.key_dim, recurrence.value_dim = rule.head_k_dim, rule.head_v_dim
        self.kept = self.kept._replace(
            states=(rule.num_v_heads, rule.head_k_dim, rule.head_v_dim), windows=(kernel - 1, channels)
        )
        self._kept += [floats, recurrence]
        block.recurrence = ctypes.pointer(recurrence)

    def _short_convolution(self, block: Any, name: str, rule: Any, norm: Any) -> None:
        block.in_count = self._products([(f"{name}.in_proj", rule.in_proj)], norm, block.into)
        self._products([(f"{name}.out_proj", rule.out_proj)], None, [block.out])
        if rule.conv.bias is not None:
            raise Unplanned(f"{name} has a bias in its convolution")
        self._watch(rule.conv, "weight")
        channels, _, kernel = rule.conv.weight.shape
        values = rule.conv.weight[:, 0].T.detach().float().contiguous()
        recurrence = native.Recurrence(values.data_ptr(), kernel=kernel, channels=channels)
        self.kept = self.kept._replace(windows=(kernel - 1, channels))
        self._kept += [values, recurrence]
        block.recurrence = ctypes.pointer(recurrence)

    def _mixture(self, mlp: Any, experts: Any, norm: Any) -> native.Mixture:
        """Experts and what chooses among them; the router's options have one name in all families that have them."""
        name = f"{self._family.holder}.experts"
        if not isinstance(experts, PackedExperts):
            raise Unplanned(f"{name} is a {type(experts).__name__}, not packed experts")
        if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
            raise Unplanned(f"{name} have no gate, or a norm of their own")
        router = getattr(mlp, "gate", None) or mlp.router
        holders: tuple[Any, ...] = (router, getattr(router, "moe_statics", None), mlp)
        mixture = native.Mixture(experts=experts.stacks[0].experts, chosen=router.top_k, groups=1, groups_chosen=1)
        if norm is not None:
            mixture.norm = self._norm(norm)
        mixture.inner = experts.stacks[1].in_features
        mixture.first, mixture.second = (self._stack(f"{name}.{m.packed}", experts.stack(m)) for m in experts.stacks)
        linear, gate = getattr(router, "wg", router), getattr(mlp, "shared_expert_gate", None)
        weight = linear.weight
        self._watch(linear, "weight")
        if gate is not None:
            self._watch(gate, "weight")
            weight, mixture.shared_gate = torch.cat([weight, gate.weight.to(weight.dtype)]), True
        weight = weight.detach().contiguous()
        found = [(m, of) for m in holders for of in _CORRECTIONS if hasattr(m, of)]
        for holder, of in found[:1]:
            self._watch(holder, of)
            correction = getattr(holder, of).detach().float().flatten().contiguous()
            mixture.correction = correction.data_ptr()
            self._kept.append(correction)
        mixture.router, mixture.router_type = weight.data_ptr(), native.TYPES[weight.dtype]
        mixture.score, mixture.normalized = native.SCORES[self._family.score], getattr(router, "norm_topk_prob", True)
        if self._family.score == "softmax of chosen":
            mixture.normalized = False
        mixture.added, mixture.least = self._family.added, getattr(router, "norm_min", 1e-20)
        mixture.factor = getattr(router, "routed_scaling_factor", 1)
        if getattr(router, "num_group", None) is not None:
            mixture.groups, mixture.groups_chosen = router.num_group, router.topk_group
        self._kept += [mixture, weight]
        self.mixtures = True
        return mixture

    def _stack(self, name: str, stack: PackedStack) -> int:
        """The address of the addresses of a stack's layers, which all take the same codes."""
        self._watch(stack, "weight", "weight_scale", "bias")
        layers = [self._layer(f"{name}[{e}]", layer, watched=False) for e, layer in enumerate(stack.layers())]
        if len({(layer.form, layer.isa, layer.activation_bits) for layer in layers}) > 1:
            raise Unplanned(f"{name} runs on several backends")
        pointers = (ctypes.c_void_p * len(layers))(*map(ctypes.addressof, layers))
        self._kept.append(pointers)
        return ctypes.addressof(pointers)

    def _kinds(self, base: Any, layers: list[Any]) -> dict[str, int]:
        """Which table of rotary positions each kind of layer has, once it is known that they are tables."""
        rotary = getattr(base, self._family.rotary)
        self._rotary, ropes = rotary, rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
        if (odd := set(ropes.values()).difference(_ROPES)) or len(ropes) > 2:
            raise Unplanned(f"rotary positions of type {', '.join(sorted(odd)) or list(ropes)}")
        self._ropes, kinds = list(ropes), {_kind(getattr(layer, self._family.attention)) for layer in layers}
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
        like, at, tables = torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None], []
        if hasattr(self._rotary, "mrope_section"):  # in time, height and width, which are one for text
            at = at.expand(3, 1, -1)
        for index, kind in enumerate(self._ropes):
            with torch.no_grad():
                cosine, sine = (
                    table[0] for table in (self._rotary(like, at, kind) if kind else self._rotary(like, at))
                )
            half = cosine.shape[-1] // 2
            if torch.equal(cosine[:, :half], cosine[:, half:]):
                columns = slice(0, half)
            elif self._family.interleaved and torch.equal(cosine[:, ::2], cosine[:, 1::2]):
                columns = slice(0, None, 2)
            else:
                raise Unplanned("rotary positions that do not pair features i and i + half")
            if 2 * half > self.head_dim:
                raise Unplanned(f"rotary positions of {2 * half} features in heads of {self.head_dim}")
            tables += [cosine[:, columns].contiguous(), sine[:, columns].contiguous()]
            self.native.ropes[index][0], self.native.ropes[index][1] = (table.data_ptr() for table in tables[-2:])
        self.native.half, self.native.positions = half, positions
        self._kept.append(tables)  # and the ones before, which another thread may be reading


def _norms(attention: Any) -> tuple[Any, Any] | None:
    """Those of queries and keys."""
    found = [(getattr(attention, q), getattr(attention, k)) for q, k in _NORMS if hasattr(attention, q)]
    return found[0] if found else None


def _parts(holder: str, module: Any, names: list[str], fused: str, sizes: tuple[int, ...]) -> list[Any]:
    """Layers by name, or where there is one layer for all of them its parts of so many outputs."""
    if not hasattr(module, fused):
        return [(f"{holder}.{name}", getattr(module, name)) for name in names]
    layer, parts, first = getattr(module, fused), [], 0
    for size in sizes:
        parts.append((f"{holder}.{fused}", layer, (first, first + size)))
        first += size
    return parts


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _kind(attention: Any) -> str:
    return getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None) or ""
