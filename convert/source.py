"""A checkpoint read one tensor at a time: what conversion, calibration and inspection start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from bitnet.kernels import ops
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding

from . import hf
from .checkpoint import TensorHeader, read_headers, weight_files
from .swap import replace_linear

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Quantized(NamedTuple):
    """A low-bit matrix: weight ~ codes * scale[:, None]."""

    codes: Tensor  # int8 [N, K]: -1, 0, 1 (8-bit codes where the layer's spec says int8)
    scale: Tensor  # float32 [1] or [N]; multiplies


class Source:
    """A checkpoint whose tensors are read when they are asked for, and a skeleton of its model.

    path:  the folder or file
    model: on the meta device, without values; its low-bit layers are BitLinear where the checkpoint holds float
           weights for them and PackedBitLinear where it holds codes. model.config says what the model is.
    """

    path: Path
    model: PreTrainedModel

    def keys(self) -> list[str]:
        """Names of all stored tensors, as the model's state_dict has them."""
        raise NotImplementedError

    def layers(self) -> dict[str, BitLinear | PackedBitLinear]:
        """The low-bit layers of the skeleton by name, but for those tied to another tensor, which have none stored."""
        stored = set(self.keys())
        modules = self.model.named_modules()
        layers = {name: module for name, module in modules if isinstance(module, BitLinear | PackedBitLinear)}
        return {name: layer for name, layer in layers.items() if f"{name}.weight" in stored}

    def tensor(self, key: str) -> Tensor:
        """One of keys(), as it is stored."""
        raise NotImplementedError

    def dtype(self, key: str) -> torch.dtype:
        """Of tensor(key), without reading it."""
        raise NotImplementedError

    def quantized(self, name: str) -> Quantized:
        """Codes and scale of the low-bit layer `name`: those stored, or those its float weight is rounded to.

        An int8 embedding (PackedEmbedding) counts, too.

        Raises ValueError naming the layer for NaN or Inf, or bytes that encode no weight.
        """
        raise NotImplementedError


def read_tensor(header: TensorHeader) -> Tensor:
    """Read one tensor of a safetensors file into memory of its own (a mapping would count, and stay, as memory)."""
    tensor = torch.empty(header.shape, dtype=DTYPES[header.dtype])
    if tensor.numel():
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with header.file.open("rb", buffering=0) as stream:
            stream.seek(header.offset)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise OSError(f"{header.file}: ended {len(view):,} bytes early while it was read")
                view = view[count:]
    return tensor


def skeleton(config: Any) -> PreTrainedModel:
    """The model that a transformers config describes, on the meta device."""
    names = config.architectures or ["AutoModelForCausalLM"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no model class {names[0]!r}")
    build: Callable[[Any], PreTrainedModel] = getattr(cls, "_from_config", None) or cls.from_config
    with torch.device("meta"):
        return build(config)


class FolderSource(Source):
    """A Hugging Face checkpoint directory: float, or `bitnet` in any of the forms that hf.py lists.

    skip, include, options: those of replace_linear, for a float checkpoint; they decide which layers become low-bit.

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the config.
    """

    def __init__(self, path: str | Path, *, skip: Any = None, include: Any = None, **options: Any) -> None:
        self.path = Path(path)
        headers = read_headers([str(file) for file in weight_files(path)])
        config = AutoConfig.from_pretrained(path)
        settings = getattr(config, "quantization_config", None)
        self.model = skeleton(config)
        names = hf.model_names(self.model, headers)
        self.stored = dict(zip(names, names.values(), strict=True))  # name in the file -> name in the model
        self.headers = {name: headers[key] for key, name in names.items()}
        self.settings: hf.BitNetConfig | None = None
        self.report = None
        if settings is None:
            self.report = replace_linear(self.model, skip=skip, include=include, **options)
        else:
            if not isinstance(settings, dict):
                settings = settings.to_dict()
            if settings.get("quant_method") != "bitnet":
                method = settings.get("quant_method")
                raise ValueError(f"{path}: is quantized by {method!r}; a float or a `bitnet` checkpoint is needed")
            self.settings = hf.BitNetConfig.from_dict(settings)
            hf.swap_for_loading(self.model, self.settings, self.headers)

    def keys(self) -> list[str]:
        return list(self.headers)

    def tensor(self, key: str) -> Tensor:
        return read_tensor(self.headers[key])

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self.headers[key].dtype]

    def quantized(self, name: str) -> Quantized:
        layer = self.model.get_submodule(name)
        weight = self.tensor(f"{name}.weight")
        try:
            if isinstance(layer, BitLinear) and f"{name}.weight_scale" not in self.headers:
                return Quantized(*ops.quantize_weight(weight, kind=layer.spec.weights, per_row=layer.spec.per_row))
            assert self.settings is not None
            scale = self.tensor(f"{name}.weight_scale")
            if isinstance(layer, PackedEmbedding):
                rows, columns = layer.weight.shape
            else:
                assert isinstance(layer, BitLinear | PackedBitLinear)
                rows, columns = layer.out_features, layer.in_features
            return Quantized(*hf.stored_codes(weight, scale, columns, rows, self.settings))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
