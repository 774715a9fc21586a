"""From a transformers model to the native step's plan: which models it computes, and what of each goes where.

The step (kernels/csrc/step.h) knows one block, that of the Llama line:

    x += [norm](out([norm](attention(q, k, v))))     q, k, v of norm(x); heads of q and k [norm], then rotary positions
    x += [norm](down([norm](f(gate(norm(x))) * up(norm(x)))))

with what stands in brackets where a model has it. FAMILIES says of which model types that is true of all that their
transformers class computes; what a block has is read off its modules.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.cpu import library
from ..kernels.cpu import step as native
from ..kernels.cpu.linear import prepared
from ..packed import PackedBitLinear


class Family(NamedTuple):
    """What the modules of a model type do not say themselves."""

    base: str  # class in transformers
    centered: bool = False  # norms multiply by 1 + weight
    sandwich: bool = False  # norms before and after each half of a block
    window: str = "self_attn.sliding_window"  # where a block keeps its window: an attribute, or "config"


FAMILIES = {
    "llama": Family("LlamaModel"),
    "mistral": Family("MistralModel", window="config"),
    "qwen2": Family("Qwen2Model"),
    "qwen3": Family("Qwen3Model"),
    "gemma3_text": Family("Gemma3TextModel", centered=True, sandwich=True),
    "bitnet": Family("BitNetModel"),
    "smollm3": Family("SmolLM3Model"),
}

_GATES = {"silu": "silu", "swish": "silu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPES = ("default", "linear", "llama3", "yarn")  # whose tables do not depend on how long a text is


class Unplanned(Exception):
    """Why a model, or something in it, is not what the native step computes."""


def known(base: Any) -> bool:
    """Is it the base model of a family, of transformers' own class?"""
    family = FAMILIES.get(getattr(getattr(base, "config", None), "model_type", ""))
    return (
        family is not None and type(base).__name__ == family.base and type(base).__module__.startswith("transformers.")
    )


class Plan:
    """A model's plan, tied to the tensors and modules it was made from.

    base:       the model without its head
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
        attention = layers[0].self_attn
        self.blocks, self.hidden = len(layers), config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.positions = attention.head_dim, config.max_position_embeddings
        if self.head_dim % native.RUN:
            raise Unplanned(f"heads of {self.head_dim} features, which must be a multiple of {native.RUN}")
        if getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", False):
            raise Unplanned("its attention caps scores or looks ahead")
        if (gate := _GATES.get(getattr(config, "hidden_act", None) or config.hidden_activation)) is None:
            raise Unplanned(f"{config.hidden_act!r} in its MLPs")
        ropes = self._kinds(base, layers)
        blocks = (native.Block * self.blocks)()
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            try:
                self._fill(block, layer, config, ropes)
            except Unplanned as why:
                raise Unplanned(f"layers.{i}.{why}") from None
        plan = native.Plan()
        plan.blocks, plan.count = ctypes.cast(blocks, ctypes.c_void_p), self.blocks
        plan.hidden, plan.heads, plan.kv_heads, plan.head_dim = self.hidden, self.heads, self.kv_heads, self.head_dim
        plan.inner, plan.scaling, plan.gate = config.intermediate_size, attention.scaling, native.GATES[gate]
        plan.final = self._norm(base.norm)
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
        weight, eps = module.weight, getattr(module, "variance_epsilon", getattr(module, "eps", None))
        self._watch(module, "weight")
        if weight is None or not isinstance(eps, float):
            raise Unplanned(f"a norm of type {type(module).__name__} without weight or eps")
        values = weight.detach().float()
        values = (1 + values if self._family.centered else values).contiguous()
        self._kept.append(values)
        return native.Norm(values.data_ptr(), eps)

    def _layer(self, name: str, module: nn.Module) -> ctypes.Structure:
        if not isinstance(module, PackedBitLinear):
            raise Unplanned(f"{name} is a {type(module).__name__}, not a packed layer")
        if module.transposed or (bits := module.activation_bits) is None:
            raise Unplanned(f"{name} takes float activations or is transposed")
        weight, backend = module.prepack()
        if (form := library.form_of_backend(backend)) is None:
            raise Unplanned(f"{name} runs on backend {backend!r}")
        self._watch(module, "weight", "weight_scale", "bias", "signs")
        shape = module.out_features, module.in_features
        layer = prepared(weight, module.weight_scale, module.bias, *shape, form, self._isa, bits)
        self._kept.append(layer)
        return layer

    def _products(self, named: list[tuple[str, Any]], norm: Any, into: Any) -> int:
        """Fill products with layers that share an input; layers that transform theirs alike share one. How many."""
        outer = None if norm is None else self._norm(norm)
        count, previous = 0, None
        for name, module in named:
            layer = self._layer(name, module)
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

    def _inner(self, norm: nn.RMSNorm) -> native.Norm:
        self._watch(norm, "weight")
        weight = norm.weight.detach().float().contiguous()
        self._kept.append(weight)
        return native.Norm(weight.data_ptr(), norm.eps)

    def _fill(self, block: Any, layer: Any, config: Any, ropes: dict[str, int]) -> None:
        attention, mlp, family = layer.self_attn, layer.mlp, self._family
        into = [(f"self_attn.{name}", getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
        block.in_count = self._products(into, layer.input_layernorm, block.into)
        sub = getattr(attention, "attn_sub_norm", None)
        self._products([("self_attn.o_proj", attention.o_proj)], sub, [block.out])
        before = layer.pre_feedforward_layernorm if family.sandwich else layer.post_attention_layernorm
        gate = [("mlp.gate_proj", mlp.gate_proj), ("mlp.up_proj", mlp.up_proj)]
        block.gate_count = self._products(gate, before, block.gate)
        self._products([("mlp.down_proj", mlp.down_proj)], getattr(mlp, "ffn_sub_norm", None), [block.down])
        if family.sandwich:
            block.after_attention = self._norm(layer.post_attention_layernorm)
            block.after_mlp = self._norm(layer.post_feedforward_layernorm)
        if hasattr(attention, "q_norm"):
            block.query, block.key = self._norm(attention.q_norm), self._norm(attention.k_norm)
        holder = config if family.window == "config" else attention
        block.window = getattr(holder, "sliding_window", None) or 0
        block.rope = ropes[_kind(layer)] if getattr(attention, "use_rope", True) else -1

    def _kinds(self, base: Any, layers: list[Any]) -> dict[str, int]:
        """Which table of rotary positions each kind of layer has, once it is known that they are tables."""
        rotary = base.rotary_emb
        self._rotary, ropes = rotary, rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
        if (odd := set(ropes.values()).difference(_ROPES)) or len(ropes) > 2:
            raise Unplanned(f"rotary positions of type {', '.join(sorted(odd)) or list(ropes)}")
        self._ropes = list(ropes)
        return {kind: self._ropes.index(kind if kind in ropes else "") for kind in {_kind(layer) for layer in layers}}

    def reach(self, positions: int) -> None:
        """Make the tables cover that many positions, at most the model's own. Raises ValueError beyond these."""
        if positions <= self.native.positions:
            return
        if positions > self.positions:
            raise ValueError(f"{positions} tokens, but this model was made for {self.positions}")
        positions = min(self.positions, max(2 * positions, 4096))
        like, at, tables = torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None], []
        for index, kind in enumerate(self._ropes):
            with torch.no_grad():
                cosine, sine = (
                    table[0] for table in (self._rotary(like, at, kind) if kind else self._rotary(like, at))
                )
            half = cosine.shape[-1] // 2
            if 2 * half > self.head_dim or not torch.equal(cosine[:, :half], cosine[:, half:]):
                raise Unplanned("rotary positions that do not pair features i and i + half")
            tables += [cosine[:, :half].contiguous(), sine[:, :half].contiguous()]
            self.native.ropes[index][0], self.native.ropes[index][1] = (table.data_ptr() for table in tables[-2:])
        self.native.half, self.native.positions = half, positions
        self._kept.append(tables)  # and the ones before, which another thread may be reading


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _kind(layer: Any) -> str:
    return getattr(layer.self_attn, "layer_type", None) or ""
