"""Adapters of PEFT merged into the packed layers they stand beside, which are quantized anew: with loss, reported."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet import tables
from bitnet.kernels import rotation
from bitnet.kernels.reference import dequantize_weight
from bitnet.packed import PackedBitLinear
from bitnet.packing import pack_matrix

from ..rounding import latent_weight


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

    Raises ValueError for layers with an RMSNorm inside, before anything changes, and for models without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ValueError("merge_adapter: the model has no adapters")
    for name, layer in found.items():
        base = layer.get_base_layer()
        if isinstance(base, PackedBitLinear) and base.rms_norm is not None:
            raise ValueError(
                f"merge_adapter: {name} has an RMSNorm before its packed weight and not before the adapter, so no "
                "weight can be both"
            )
    rows = []
    for name, layer in found.items():
        base = layer.get_base_layer()
        if isinstance(base, PackedBitLinear):
            rows.append(_merge(name, base, _added(layer)))
        else:
            layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    return MergeReport(rows)


def _added(layer: Any) -> Tensor:
    """What the active adapters add to the weight, float32 [N, K]."""
    base = layer.get_base_layer()
    total = torch.zeros(base.out_features, base.in_features, device=base.weight.device)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            total += layer.get_delta_weight(adapter).float()
    return total


def _merge(name: str, layer: PackedBitLinear, added: Tensor) -> Merged:
    spec = layer.spec
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
