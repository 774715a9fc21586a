"""Models that several processes hold together: torch's fully_shard (FSDP2) and DistributedDataParallel.

With fully_shard, a layer's forward sees its whole weight, so its scales and codes are those of one process. Outside
the forward a process has its shard alone: what needs whole weights, packing and saving, asks for them here.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize import is_sharded

HOOKS = "_hooks"  # how the attributes end in which torch keeps them
ADDED = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")  # by fully_shard


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile, which add nothing that is stored."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def gather(model: nn.Module) -> nn.Module | None:
    """A whole copy of a model that several processes train, on the CPU of the first process; None in the others.

        if (whole := bitnet.gather(model)) is not None:
            bitnet.pack(whole)
            bitnet.save(whole, "out")

    Every process must call it. Parameters have the values and the dtype that the forward works with: those of
    fully_shard's MixedPrecisionPolicy, whose param_dtype rounds weights before they are quantized, so that packing
    quantizes what training did. (To go on training, store the sharded state instead, as torch.distributed.checkpoint
    and Trainer do.) The model stays as it is; the copy has no hooks of torch.distributed. A model in one process is
    copied, too.

    Raises ValueError for a model that is sharded in another way (tensor parallelism).
    """
    model = unwrapped(model)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    values = {name: value.to("cpu", copy=True) for name, value in whole_parameters(model) if first}
    if not first:
        return None
    memo: dict[int, Any] = {}  # what copy.deepcopy takes for copied already
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(values[name], parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copies = {module: _like(module) for module in model.modules()}
    memo |= {id(module): twin for module, twin in copies.items()}
    for module, twin in copies.items():
        vars(twin).update(copy.deepcopy(_own(module), memo))
    return copies[model]


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, as the forward sees it: gathered, in the dtype of fully_shard's policy.

    Every process must iterate, to the end. What fully_shard wraps together is gathered together, and is there until
    the next is asked for. Raises ValueError for a parameter that is sharded in another way.
    """
    units: list[Any] = [module for module in model.modules() if _is_unit(module)]
    for unit in units:
        unit.reshard()  # the outermost stays gathered after an evaluation
    names = []
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            names.append(name)
        else:
            yield name, parameter.detach()
    for unit in units:
        unit.unshard()
        try:
            here = [name for name in names if not is_sharded(model.get_parameter(name))]
            for name in here:
                yield name, model.get_parameter(name).detach()
        finally:
            unit.reshard()
        names = [name for name in names if name not in here]
    if names:
        raise ValueError(
            f"{names[0]} is sharded, but not by torch's fully_shard (tensor parallelism?); shard with fully_shard, or "
            "give each process the whole model"
        )


def _is_unit(module: nn.Module) -> bool:
    """Has fully_shard been called on it?"""
    return hasattr(module, "_get_fsdp_state")


def _like(module: nn.Module) -> nn.Module:
    """An empty object of a module's class, as it was before fully_shard."""
    cls = type(module)
    if _is_unit(module):  # FSDPLinear(FSDPModule, Linear)
        cls = cls.__mro__[2]
    return cls.__new__(cls)


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without what torch.distributed adds."""
    own = {key: value for key, value in vars(module).items() if not key.startswith(ADDED)}
    for key, hooks in own.items():
        if key.endswith(HOOKS) and isinstance(hooks, dict):
            own[key] = type(hooks)((i, hook) for i, hook in hooks.items() if not _is_distributed(hook))
    return own


def _is_distributed(hook: Any) -> bool:
    where = getattr(getattr(hook, "hook", hook), "__module__", None) or ""
    return where.startswith("torch.distributed")
