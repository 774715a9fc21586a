"""Adapters of PEFT merged into the packed layers they stand beside, which are quantized anew: with loss, reported."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet import tables
from bitnet.kernels import rotation
from bitnet.kernels.reference import dequantize_weight
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.packing import pack_matrix

from ..rounding import latent_weight

LOST = 0.1  # an error of a layer from which on merging warns


@dataclass(frozen=True)
class Merged:
    """One layer. With W its weight before, D what adapters add, and V the weight afterwards:

    asked: |D| / |W|
    kept:  <V - W, D> / |D|^2, the share of what was asked for that came through; 1 is all of it
    error: |V - W - D| / |D|; 0 is exact, and 1 or more is no better than to leave the adapter out
    """

    name: str
    asked: float
    kept: float
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What merge_adapter did, layer by layer; str() is a table."""

    layers: list[Merged]

    @property
    def kept(self) -> float:
        """The mean of the packed layers'."""
        return sum(row.kept for row in self.layers) / max(len(self.layers), 1)

    def __str__(self) -> str:
        rows = [("layer", "asked", "kept", "error")]
        rows += [(row.name, f"{row.asked:.2%}", f"{row.kept:.1%}", f"{row.error:.2f}") for row in self.layers]
        return tables.text(rows, right=(1, 2, 3))


@torch.no_grad()
def merge_adapter(model: nn.Module) -> MergeReport:
    """Put the active LoRA adapters of packed layers into their weights, in place, and take the adapters away.

    model: what get_peft_model, PeftModel.from_pretrained or load_adapter made; of a PeftModel, the model afterwards is
           model.get_base_model()

    An adapter changes weights by less than the steps between their codes, mostly, so little of it comes through: read
    the report, and serve the adapter beside the packed layers where that is not enough. New weights are what training
    from the packed ones would quantize: latent weights that give the codes back, plus what the adapter adds. Layers
    that are not packed are merged by PEFT.

    Warns where more than a tenth of an adapter's change is lost. Raises ValueError, before anything changes, for models
    without adapters, and for layers that no merge can express: with an RMSNorm inside, whose weight an int8 embedding
    shares, without a bias where the adapter has one, or with an adapter that is more than B A.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ValueError("merge_adapter: the model has no adapters")
    embeddings = [module.weight for module in model.modules() if isinstance(module, PackedEmbedding)]
    for name, layer in found.items():
        if why := _why_not(layer, embeddings):
            raise ValueError(f"merge_adapter: {name} {why}; serve the adapter beside the packed layers")
    rows = []
    for name, layer in found.items():
        base = layer.get_base_layer()
        if isinstance(base, PackedBitLinear):
            rows.append(_merge(name, layer))
        else:
            layer.merge()
        _replace(model, name, base)
    for name, module in list(model.named_modules()):  # modules_to_save
        if hasattr(module, "unload_and_optionally_merge_module"):
            _replace(model, name, module.unload_and_optionally_merge_module(True, False, None))
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vars(inner).pop("peft_config", None)
    if hasattr(inner, "_hf_peft_config_loaded"):
        inner._hf_peft_config_loaded = False  # else save_pretrained would write adapters
    if left := vars(inner).get("_weight_conversions"):  # load_adapter's names, which a save would give the weights
        inner._weight_conversions = [each for each in left if not _is_adapters(each)]
    report = MergeReport(rows)
    if any(row.error > LOST for row in rows):
        warnings.warn(
            f"merging kept {report.kept:.0%} of what the adapters add to {len(rows)} packed layers (their mean; print "
            "the report for each); serve the adapter beside the packed layers where that is too little",
            stacklevel=3,
        )
    return report


def _is_adapters(conversion: Any) -> bool:
    """Does one of transformers' conversions rename what PEFT stores?"""
    patterns = [*conversion.source_patterns, *conversion.target_patterns]
    return any(part in pattern for pattern in patterns for part in ("base_model.", "lora_", "modules_to_save"))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _why_not(layer: Any, embeddings: list[Tensor]) -> str | None:
    base = layer.get_base_layer()
    if any(getattr(layer, "lora_bias", {}).get(name) for name in layer.active_adapters) and base.bias is None:
        return "has no bias, and its adapter does"
    if not isinstance(base, PackedBitLinear):
        return None
    if base.rms_norm is not None:
        return "has an RMSNorm before its packed weight and not before the adapter, so no weight can be both"
    if any(base.weight is weight for weight in embeddings):
        return "shares its weight with the input embedding, which the adapter leaves as it is"
    if kinds := {
        type(layer.lora_variant[name]).__name__ for name in layer.active_adapters if name in layer.lora_variant
    }:
        return f"has an adapter that is more than B A ({', '.join(sorted(kinds))})"
    return None


def _added(layer: Any) -> Tensor:
    """What the active adapters add to the weight, float32 [N, K]."""
    base = layer.get_base_layer()
    total = torch.zeros(base.out_features, base.in_features, device=base.weight.device)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            total += layer.get_delta_weight(adapter).float()
    return total


def _merge(name: str, adapted: Any) -> Merged:
    layer: PackedBitLinear = adapted.get_base_layer()
    added, spec = _added(adapted), layer.spec
    for adapter in adapted.active_adapters:
        if adapted.lora_bias.get(adapter):
            assert layer.bias is not None
            more = adapted.lora_B[adapter].bias * adapted.scaling[adapter]
            layer.bias = (layer.bias + more).to(layer.bias.dtype)
    if spec.hadamard is not None:
        added = rotation.hadamard(added, spec.hadamard, layer.signs)
    codes, scale = layer.codes(), layer.weight_scale
    before = dequantize_weight(codes, scale)
    latent = latent_weight(codes, scale) if spec.weights == "ternary" else before
    packed, new = pack_matrix(latent + added, spec)
    same = torch.equal(packed, layer.weight)  # then the scale, too, but for its last bits
    layer.weight = packed
    layer.weight_scale = layer.weight_scale if same else new
    layer._drop_derived()
    moved = dequantize_weight(layer.codes(), layer.weight_scale) - before
    size = added.norm().item()
    asked = size / max(before.norm().item(), 1e-30)
    if not size:
        return Merged(name, asked, 1.0, 0.0)
    return Merged(name, asked, (moved * added).sum().item() / size**2, (moved - added).norm().item() / size)
