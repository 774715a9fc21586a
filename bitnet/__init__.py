"""Train, convert and serve 1-bit and 1.58-bit language models.

    import bitnet
    report = bitnet.replace_linear(model)    # nn.Linear -> BitLinear (Conv1D, experts), in place; train as usual
    bitnet.pack(model)                       # BitLinear -> PackedBitLinear: two bits a weight, the same outputs
    bitnet.save(model, "out")                # a Hugging Face checkpoint
    model = bitnet.load("out")               # or AutoModelForCausalLM.from_pretrained("out")

Importing this package also teaches transformers' from_pretrained to build these layers for `bitnet` checkpoints, and
PEFT to put LoRA beside packed layers.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .convert.checkpoint import load, save
    from .convert.conversion.convert import convert_checkpoint
    from .convert.inspection import diff_checkpoints, inspect_checkpoint
    from .convert.swap.merge import merge_adapter
    from .convert.swap.pack import pack
    from .convert.swap.replace import replace_linear
    from .convert.swap.report import Report
    from .convert.swap.unpack import unpack
    from .decode.attach import native_decoding
    from .experts import BitExperts, PackedExperts
    from .kernels.backends import backends
    from .linear import BitConv1D, BitLinear
    from .packed import PackedBitLinear
    from .quantize import QuantSpec
    from .serving.embed import Encoder, embed
    from .train.distill import Distillation
    from .train.fsdp import gather
    from .train.muon import Muon
    from .train.strength import set_strength, strength_at
    from .train.trainer import DistillTrainer, MonitorCallback, StrengthCallback

_HOME = {
    "BitConv1D": "bitnet.linear",
    "BitExperts": "bitnet.experts",
    "BitLinear": "bitnet.linear",
    "DistillTrainer": "bitnet.train.trainer",
    "Distillation": "bitnet.train.distill",
    "Encoder": "bitnet.serving.embed",
    "MonitorCallback": "bitnet.train.trainer",
    "Muon": "bitnet.train.muon",
    "PackedBitLinear": "bitnet.packed",
    "PackedExperts": "bitnet.experts",
    "QuantSpec": "bitnet.quantize",
    "Report": "bitnet.convert.swap.report",
    "StrengthCallback": "bitnet.train.trainer",
    "backends": "bitnet.kernels.backends",
    "convert_checkpoint": "bitnet.convert.conversion.convert",
    "diff_checkpoints": "bitnet.convert.inspection",
    "embed": "bitnet.serving.embed",
    "gather": "bitnet.train.fsdp",
    "inspect_checkpoint": "bitnet.convert.inspection",
    "load": "bitnet.convert.checkpoint",
    "merge_adapter": "bitnet.convert.swap.merge",
    "native_decoding": "bitnet.decode.attach",
    "pack": "bitnet.convert.swap.pack",
    "replace_linear": "bitnet.convert.swap.replace",
    "save": "bitnet.convert.checkpoint",
    "set_strength": "bitnet.train.strength",
    "strength_at": "bitnet.train.strength",
    "unpack": "bitnet.convert.swap.unpack",
}

__all__ = [
    "BitConv1D",
    "BitExperts",
    "BitLinear",
    "DistillTrainer",
    "Distillation",
    "Encoder",
    "MonitorCallback",
    "Muon",
    "PackedBitLinear",
    "PackedExperts",
    "QuantSpec",
    "Report",
    "StrengthCallback",
    "backends",
    "convert_checkpoint",
    "diff_checkpoints",
    "embed",
    "gather",
    "inspect_checkpoint",
    "load",
    "merge_adapter",
    "native_decoding",
    "pack",
    "replace_linear",
    "save",
    "set_strength",
    "strength_at",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("bitnet.functional")
    if name not in _HOME:
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Ours:
    """A class of ours that is imported when it is used; it and transformers take seconds."""

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self.__module__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def _found(self) -> Any:
        return getattr(importlib.import_module(self.__module__), self.name)


class _WheneverImported(importlib.abc.MetaPathFinder):
    """Has `then` called with a module whenever that module has run.

    transformers and PEFT have no entry points for plug-ins. The finder stays: a spec may be asked for without being
    used (importlib.util.find_spec), and a module may run again (importlib.reload).
    """

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then
        sys.meta_path.insert(0, self)
        if name in sys.modules:
            then(importlib.import_module(name))  # waits if another thread is at it

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then(module: Any) -> None:
                run(module)
                self.then(module)

            spec.loader.exec_module = run_then  # type: ignore[method-assign]
        return spec


def _register_quantizer(mappings: Any) -> None:
    mappings.AUTO_QUANTIZER_MAPPING["bitnet"] = _Ours("bitnet.convert.hub.quantizer", "BitNetQuantizer")
    mappings.AUTO_QUANTIZATION_CONFIG_MAPPING["bitnet"] = _Ours("bitnet.convert.hub.config", "BitNetConfig")


def _register_adapters(lora: Any) -> None:
    importlib.import_module("bitnet.adapters").register(lora)


_WheneverImported("transformers.quantizers.auto", _register_quantizer)
_WheneverImported("peft.tuners.lora.model", _register_adapters)
