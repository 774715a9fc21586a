"""Which optimizer updates which parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .muon import Muon


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices inside a model's blocks (and stacks of them, of experts), which are Muon's; and all others:
    embeddings, the output head, norms, biases, convolutions. Frozen parameters are in neither.
    """
    ends = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if isinstance(head, nn.Module):
        ends |= {id(p) for p in head.parameters()}
    convolutions = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    ends |= {id(p) for m in convolutions for p in m.parameters(recurse=False)}
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = p.ndim in (2, 3) and id(p) not in ends and not name.endswith("_bias")
            (matrices if inside else others).append(p)
    return matrices, others


def make_optimizers(
    model: nn.Module,
    kind: str = "muon",
    *,
    lr: float,
    adamw_lr: float | None = None,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run.

    kind:         "muon": Muon for the matrices of the blocks, AdamW for the rest; "adamw": AdamW for all
    lr:           peak learning rate, of Muon with "muon"
    adamw_lr:     of AdamW with "muon"; default lr
    weight_decay: not of vectors: norms and biases
    """
    if kind not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be 'muon' or 'adamw', got {kind!r}")
    matrices, others = split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = []
    rate = lr
    if kind == "adamw":
        others = matrices + others
    else:
        rate = lr if adamw_lr is None else adamw_lr
        if matrices:
            optimizers.append(Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True))
    if not optimizers:
        raise ValueError("the model has no parameters that require a gradient")
    return optimizers


def optimizer_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the optimizers remember: tensors and numbers, as "number of the optimizer/parameter's name/key"."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for key, value in state.items():
                place = f"{index}/{names[id(p)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[place] = value.detach().cpu().contiguous()
                else:
                    numbers[place] = value
    return tensors, numbers


def restore_optimizers(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
) -> None:
    """Give optimizers of the same parameters what optimizer_state told; raises ValueError for another model's."""
    parameters = dict(model.named_parameters())
    found: list[dict[Tensor, dict[str, Any]]] = [{} for _ in optimizers]
    for place, value in [*tensors.items(), *numbers.items()]:
        index, name, key = place.split("/")
        if name not in parameters or int(index) >= len(optimizers):
            raise ValueError(f"the optimizer state has {place}, which is not of this model and its optimizers")
        p = parameters[name]
        if isinstance(value, Tensor):
            if value.ndim and value.shape != p.shape:
                raise ValueError(f"the optimizer state has {place} of shape {list(value.shape)}, not {list(p.shape)}")
            value = value.to(p.device, copy=True)  # a fused AdamW keeps its count of steps there, too
        found[int(index)].setdefault(p, {})[key] = value
    for optimizer, states in zip(optimizers, found, strict=True):
        optimizer.state.clear()
        optimizer.state.update(states)
