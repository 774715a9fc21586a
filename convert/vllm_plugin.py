"""vLLM serves packed checkpoints: its own models, with our products in their layers.

vLLM calls `register` in each of its processes (the entry point in pyproject.toml), and from then on a checkpoint whose
config.json says `quant_method: bitnet` is ours. hub/config.py and hub/values.py say what its files mean.

vLLM fuses matrices that take the same input (q, k and v; gate and up). Their Hub bytes are kept one matrix after the
other while they load, and become one matrix of the Hub layout in the end, with a scale a row, or a row and group: that
of a whole matrix, repeated. The backend's own form of it is then all that is kept.

With tensor parallelism a process has some of the rows (column-parallel layers) or of the features (row-parallel ones).
Features are quantized token by token over all of them, so processes tell each other their greatest, which each appends
to its own tokens as further features, of weight 0: codes and s are then those of one process, and what differs is that
vLLM adds up the parts of an output after their rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from bitnet.kernels import layout, ops
from bitnet.kernels.backends import Linear
from bitnet.kernels.observed import needs_operator
from bitnet.kernels.rotation import hadamard
from bitnet.linear import check_features
from bitnet.packed import PackedBitLinear, embedding_rows, packed_zeros
from bitnet.quantize import QuantSpec

from .hub.config import EXTENDED, BitNetConfig
from .hub.values import loaded_scale, loaded_weight

METHOD = "bitnet_toolkit"
EMBEDDING = QuantSpec("int8", per_row=True)
ELSEWHERE = "`bitnet serve` serves it"


def register() -> None:
    """Make the method known to vLLM; may be called again."""
    register_quantization_config(METHOD)(PackedConfig)


class PackedConfig(QuantizationConfig):
    """Which layers of a vLLM model are packed, and how, by the quantization_config of a checkpoint."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        return cls(BitNetConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        ours = hf_quant_cfg.get("quant_method") == "bitnet" and user_quant in (None, "bitnet", METHOD)
        return METHOD if ours else None

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give the config the names that vLLM's model has for the modules of transformers' one."""
        config, rename = self.config, hf_to_vllm_mapper.map_name
        if config.modules_to_not_convert is not None:  # patterns: a bare dot stands for a dot, too
            names = [name.replace("\\.", ".") for name in config.modules_to_not_convert]
            config.modules_to_not_convert = [rename(name) or name for name in names]
        if config.linear_class == EXTENDED:
            section = config.bitnet_toolkit
            overrides = {rename(name) or name: layer for name, layer in section["overrides"].items()}
            embedding = config.embedding and (rename(config.embedding) or config.embedding)
            config.bitnet_toolkit = section | {"overrides": overrides, "embedding": embedding}

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """vLLM's hook: what a layer computes with; None, or UnquantizedLinearMethod, for one that is float."""
        if isinstance(layer, LinearBase):
            spec = self._linear_spec(prefix)
            return UnquantizedLinearMethod() if spec is None else PackedLinear(self.config, spec, prefix)
        if isinstance(layer, ParallelLMHead):
            skips = self.config.modules_to_not_convert
            spec = None if skips is None else self._spec(prefix)  # without patterns heads are kept
            kinds = {spec.weights if spec else ""}
            if self.config.embedding:
                kinds.add(self.config.embedding_spec.weights)
            if "int4" in kinds or (self.config.embedding and kinds != {"int8"}):
                raise ValueError(f"{prefix}: vLLM serves heads of 8 bits, and untied ternary ones; {ELSEWHERE}")
            return None if spec is None else PackedVocabulary(self.config, spec, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            name = self.config.embedding
            ours = name is not None and prefix in ("", name)  # some models give no prefix
            return PackedVocabulary(self.config, EMBEDDING, name or "") if ours else None
        if isinstance(layer, RoutedExperts) and self.config.linear_class == EXTENDED and self._converted(prefix):
            raise ValueError(f"{prefix}: vLLM cannot serve packed experts; {ELSEWHERE}")
        return None

    def _linear_spec(self, prefix: str) -> QuantSpec | None:
        """The options that all matrices fused in a layer have in common, but for per_row; None for float ones."""
        room, dot, last = prefix.rpartition(".")
        names = [f"{room}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]
        specs = [self._spec(name) for name in names]
        alike = {None if spec is None else replace(spec, per_row=False) for spec in specs}
        if len(alike) > 1:
            raise ValueError(
                f"{prefix}: vLLM makes one layer of {', '.join(names)}, whose options differ ({specs}); {ELSEWHERE}"
            )
        return specs[0]

    def _converted(self, name: str) -> bool:
        return should_convert_module(name, self.config.modules_to_not_convert)

    def _spec(self, name: str) -> QuantSpec | None:
        if not self._converted(name):
            return None
        packed, spec = self.config.layer(name)
        if not packed:
            raise ValueError(
                f"{name}: this is a model in training, with float weights, and vLLM serves packed ones; "
                "`bitnet convert DIR OUT --to hub` packs it"
            )
        if spec.rms_norm:
            raise ValueError(f"{name}: vLLM has no place for an RMSNorm inside a layer (rms_norm); {ELSEWHERE}")
        return spec


class PackedLinear(LinearMethodBase):
    """What one packed layer of vLLM holds and computes; each layer has a method of its own."""

    backend: str
    activation_bits: int | None

    def __init__(self, config: BitNetConfig, spec: QuantSpec, prefix: str) -> None:
        self.config, self.spec, self.prefix = config, spec, prefix
        self.bound: tuple[Tensor | None, Linear] | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Room for the Hub bytes of the matrices, one after the other, and for a scale a row."""
        spec, k = self.spec, input_size_per_partition
        self.sizes, self.in_features, self.all_features = output_partition_sizes, k, input_size
        self._check_features()
        self.columns = slice(0, k)
        if k < input_size:
            self.columns = slice(layer.tp_rank * k, (layer.tp_rank + 1) * k)
        parts = [packed_zeros(k, n, replace(spec, per_row=spec.group_size is None), None) for n in self.sizes]
        self.heights = [len(weight) for weight, _ in parts]
        self.missing = {(name, index) for name in ("weight", "weight_scale") for index in range(len(parts))}
        weights, scales = zip(*parts, strict=True)
        self._add(layer, "weight", torch.cat(weights), self._read_weight, self.heights)
        self._add(layer, "weight_scale", torch.cat(scales), self._read_scale, self.sizes)
        if spec.hadamard_signs:
            self.missing |= {("signs", index) for index in range(len(parts))}
            self._add(layer, "signs", torch.zeros(k, dtype=torch.int8), self._read_signs, [0] * len(parts))

    def _check_features(self) -> None:
        spec, k = self.spec, self.in_features
        try:
            check_features(self.all_features, spec)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        if k == self.all_features:
            return
        why = f"{self.prefix}: tensor parallelism leaves a process {k} of {self.all_features} features"
        for what, block in (("group_size", spec.group_size), ("hadamard", spec.hadamard)):
            if block and k % block:
                raise ValueError(f"{why}, which cuts blocks of {what}={block}; choose a smaller --tensor-parallel-size")
        if spec.activation_bits == 4:
            raise ValueError(f"{why}, and 4-bit activations need all of them; choose --tensor-parallel-size 1")

    def _add(self, layer: Any, name: str, values: Tensor, read: Callable[..., Tensor], heights: list[int]) -> None:
        parameter = nn.Parameter(values, requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, {"weight_loader": partial(self._load, layer, name, read, heights)})

    def _load(
        self,
        layer: Any,
        name: str,
        read: Callable[..., Tensor],
        heights: list[int],
        parameter: nn.Parameter,
        stored: Tensor,
        shard: Any = None,
    ) -> None:
        """Called by vLLM for each stored tensor: takes this process's part of it."""
        try:
            index, out_features, rows = self._part(layer, shard)
            part = read(stored, index, out_features, rows)
            start = sum(heights[:index])
            room = parameter.data[start : start + len(part)]
            if name == "signs" and bool(room.any()) and not torch.equal(room, part.to(room.device)):
                raise ValueError(f"the matrices that vLLM makes one layer of have different signs; {ELSEWHERE}")
            room.copy_(part)
        except ValueError as error:
            which = "" if shard is None else f" ({shard})"
            raise ValueError(f"{self.prefix}.{name}{which}: {error}") from None
        self.missing.discard((name, index))

    def _part(self, layer: Any, shard: Any) -> tuple[int, int, slice]:
        """Of a stored matrix: which of the fused ones it is, its rows, and those of them that are this process's."""
        index = 0 if len(self.sizes) == 1 else {"q": 0, "k": 1, "v": 2}.get(shard, shard)
        if not isinstance(index, int):
            raise ValueError(f"the files hold {len(self.sizes)} matrices as one, whose order is not known; {ELSEWHERE}")
        own = self.sizes[index]
        if not isinstance(layer, ColumnParallelLinear):
            return index, own, slice(0, own)
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
        start = layer.tp_rank // copies * own
        return index, own * layer.tp_size // copies, slice(start, start + own)

    def _read_weight(self, stored: Tensor, index: int, out_features: int, rows: slice) -> Tensor:
        if not stored.is_contiguous():
            raise ValueError(f"vLLM's model transposes it before it is loaded (GPT-2's Conv1D); {ELSEWHERE}")
        weight = loaded_weight(stored, self.all_features, out_features, self.spec.weights, self.config)
        if weight.dtype == torch.int8:
            return weight[rows, self.columns]
        own = rows.stop - rows.start
        weight = layout.slice_packed(weight, out_features, rows, self.columns)
        if further := self.sizes[index] - own:  # rows that fill up a vocabulary
            weight = layout.concat_packed(
                [weight, packed_zeros(self.in_features, further, QuantSpec(), "cpu")[0]], [own, further]
            )
        return weight

    def _read_scale(self, stored: Tensor, index: int, out_features: int, rows: slice) -> Tensor:
        scale = loaded_scale(stored, self.spec.weights, self.config)
        size = self.spec.group_size
        expected = (out_features,) if size is None else (out_features, -(-self.all_features // size))
        if size is None and scale.numel() == 1:
            scale = scale.expand(expected)
        if tuple(scale.shape) != expected:
            raise ValueError(f"it is {list(scale.shape)}, but should be {list(expected)}, or [1] of a whole matrix")
        first, last = self.columns.start, self.columns.stop
        return scale[rows] if size is None else scale[rows, first // size : -(-last // size)]

    def _read_signs(self, stored: Tensor, index: int, out_features: int, rows: slice) -> Tensor:
        if stored.dtype != torch.int8 or stored.shape != (self.all_features,):
            raise ValueError(f"it is {stored.dtype} {list(stored.shape)}, but should be int8 [{self.all_features}]")
        return stored[self.columns]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the backend's form of all that was loaded, and drop the Hub bytes."""
        if self.missing:
            names = sorted({name for name, _ in self.missing})
            raise ValueError(f"{self.prefix}: the checkpoint has no {' and no '.join(names)} for it, or not all of it")
        weight, scale, spec = layer.weight.data, layer.weight_scale.data, self.spec
        if weight.dtype == torch.uint8 and len(self.sizes) > 1:
            weight = layout.concat_packed(weight.split(self.heights), self.sizes)
        if self.peaks:
            weight = F.pad(weight, (0, self.peaks), value=0 if weight.dtype == torch.int8 else layout.ZEROS)
            scale = scale if spec.group_size is None else F.pad(scale, (0, 1), value=1.0)
        spec = replace(spec, per_row=spec.group_size is None, hadamard=None, hadamard_signs=False)
        packed = PackedBitLinear.from_packed(weight, scale, None, sum(self.sizes), spec)
        try:
            prepacked, self.backend = packed.prepack()
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        self.activation_bits = packed.activation_bits
        del layer.weight
        layer.prepacked = nn.Parameter(prepacked, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def peaks(self) -> int:
        """Features that are appended to a token for the greatest of all processes; as many as a group has."""
        alone = self.in_features == self.all_features or self.spec.activation_bits is None
        return 0 if alone else self.spec.group_size or 64

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.spec.hadamard is not None:
            x = hadamard(x, self.spec.hadamard, layer.signs if self.spec.hadamard_signs else None)
        if self.peaks:
            peak = tensor_model_parallel_all_gather(x.abs().amax(-1, keepdim=True)).amax(-1, keepdim=True)
            x = torch.cat([x, peak.expand(*x.shape[:-1], self.peaks)], dim=-1)
        n, weight, scale = sum(self.sizes), layer.prepacked, layer.weight_scale
        if needs_operator(x, scale, bias):
            return ops.linear_prepacked(x, weight, scale, bias, n, self.activation_bits, self.backend)
        if self.bound is None or self.bound[0] is not bias:
            self.bound = bias, ops.bind(weight, scale, bias, n, x.shape[-1], self.activation_bits, self.backend)
        return self.bound[1](x)


class PackedVocabulary(PackedLinear):
    """An output head, or the int8 embedding that shares its weight. vLLM fills vocabularies up to whole blocks."""

    def _part(self, layer: Any, shard: Any) -> tuple[int, int, slice]:
        own = layer.shard_indices
        return 0, layer.org_vocab_size, slice(own.org_vocab_start_index, own.org_vocab_end_index)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head of a tied pair has the embedding's parameters, and is told what they get."""
        if isinstance(embed_tokens.quant_method, PackedVocabulary):
            layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
            self.missing = embed_tokens.quant_method.missing
            return layer
        raise ValueError(f"{self.prefix}: the head is packed, but the embedding tied to it is not; {ELSEWHERE}")

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return embedding_rows(input_, layer.weight, layer.weight_scale, self.all_features, layer.params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if isinstance(layer, ParallelLMHead):  # tokens are looked up in the stored form
            super().process_weights_after_loading(layer)
        elif self.missing:
            raise ValueError(f"{self.prefix}: the checkpoint has no int8 weight with a weight_scale for it")
