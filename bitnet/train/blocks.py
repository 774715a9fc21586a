"""Block-wise reconstruction: each block of a low-bit model learns by itself to give what the float model's gives.

Adapted from BRECQ (arXiv 2102.05426, section 3.2) to latent weights and straight-through gradients. A block is trained
on the hidden states that the blocks before it, done already, hand it, and on the outputs that the float blocks make of
their own: so it makes up for the errors of those before. All that is in memory for it is one block's gradients, and two
hidden states a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..linear import BitLayer
from ..progress import Progress
from .optimizers import make_optimizers
from .schedule import Schedule
from .strength import set_strength


@dataclass(frozen=True)
class BlockReport:
    """How far a block's outputs are from the float block's, as block_error, before and after its training."""

    name: str
    before: float
    after: float


def block_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |output - wanted|^2 / |wanted|^2, for hidden states [B, L, D].

    Each token by its own size, because the norm that follows takes the size away, and because some models give the
    first token of a text a hidden state a thousand times as large as the others'.
    """
    difference = (output.float() - wanted.float()).square().sum(-1)
    return (difference / wanted.float().square().sum(-1).clamp(min=1e-12)).mean()


def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    rows: Tensor,
    *,
    steps: int = 64,
    lr: float = 1e-4,
    batch: int = 8,
    seed: int = 0,
    console: Console | None = None,
    saved: Callable[[int, nn.Module], BlockReport | None] | None = None,
    save: Callable[[int, nn.Module, BlockReport], None] | None = None,
) -> list[BlockReport]:
    """Train the low-bit blocks of `student`, in place and one after the other, on what the teacher's compute.

    student: a language model with low-bit layers in training, from calibrated codes if it is to come far
    teacher: the float model it was made of
    rows:    ids [R, L] of text, R a multiple of `batch`
    steps:   for each block, of `batch` rows, in an order drawn with `seed`
    lr:      peak, AdamW's, of the latent weights and norms; it falls in half a cosine. A block whose error it does not
             lower stays as it was
    saved:   (index, block) -> the report of an earlier run that did this block, whose weights it then puts there
    save:    (index, block, report), called after each

    Embeddings, head and what else is outside the blocks stay as they are. Raises ValueError for models whose blocks
    cannot be run one by one: blocks with other arguments for other texts, or more than hidden states between them.
    """
    try:
        name, own = low_bit_blocks(student)
    except ValueError as error:
        raise ValueError(f"reconstruct: of {type(student).__name__}, {error}; or train it as a whole") from None
    theirs = teacher.get_submodule(name)
    assert isinstance(theirs, nn.ModuleList)
    if len(rows) % batch or not len(rows):
        raise ValueError(f"reconstruct: rows must be a multiple of the batch, {batch}; got {len(rows)}")
    device = next(student.parameters()).device
    parts = rows.split(batch)
    with torch.no_grad():
        calls = [_calls(model, blocks, parts, device) for model, blocks in ((student, own), (teacher, theirs))]
        given = [_enter(student, own, part.to(device)).cpu() for part in parts]
        wanted = [_enter(teacher, theirs, part.to(device)).cpu() for part in parts]
    reports: list[BlockReport] = []
    schedule = Schedule(steps, "cosine")
    training, teaching = student.training, teacher.training
    teacher.eval()
    set_strength(student, 1.0)
    try:
        with Progress("reconstructing", len(own), "blocks", console or Console(quiet=True)) as progress:
            for index, (block, float_block) in enumerate(zip(own, theirs, strict=True)):
                with torch.no_grad():
                    wanted = [_run(float_block, x.to(device), calls[1][index]).cpu() for x in wanted]
                report = saved(index, block) if saved is not None else None
                if report is None:
                    call, title = calls[0][index], f"{name}.{index}"
                    before = _mean_error(block, given, wanted, call, device)
                    start = {name: value.clone() for name, value in block.state_dict().items()}
                    block.train()
                    optimizers = make_optimizers(block, "adamw", lr=lr, weight_decay=0.0)
                    draw = torch.Generator().manual_seed(seed + index)
                    order: list[int] = []
                    for step in range(steps):
                        order = order or torch.randperm(len(parts), generator=draw).tolist()
                        at = order.pop()
                        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                            group["lr"] = lr * schedule.lr(step)
                        block_error(_run(block, given[at].to(device), call), wanted[at].to(device)).backward()
                        for optimizer in optimizers:
                            optimizer.step()
                            optimizer.zero_grad()
                        progress.advance(1 / (steps + 1))
                    after = _mean_error(block, given, wanted, call, device)
                    if not after < before:  # calibrated codes are good already, and a large lr only scatters them
                        block.load_state_dict(start)
                        after = before
                    report = BlockReport(title, before, after)
                    if save is not None:
                        save(index, block, report)
                reports.append(report)
                block.eval()
                with torch.no_grad():
                    given = [_run(block, x.to(device), calls[0][index]).cpu() for x in given]
                progress.update(index + 1, f"error {report.before:.3g} -> {report.after:.3g}")
    finally:
        student.train(training)
        teacher.train(teaching)
    return reports


def low_bit_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one outermost nn.ModuleList that holds low-bit layers, and its name; raises ValueError if it is not one."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        low_bit = isinstance(module, nn.ModuleList) and any(isinstance(m, BitLayer) for m in module.modules())
        if low_bit and not any(name.startswith(f"{other}.") for other in lists):
            lists[name] = module
    if len(lists) != 1:
        names = list(lists)
        others = f": {', '.join(names)}; skip='{names[0]}.*' keeps the layers of the first float" if names else ""
        raise ValueError(f"low-bit layers are in {len(lists)} lists of modules, not in one{others}")
    return next(iter(lists.items()))


_Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments besides its hidden states


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _hooked(
    blocks: nn.ModuleList, hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calls(model: nn.Module, blocks: nn.ModuleList, parts: tuple[Tensor, ...], device: torch.device) -> list[_Call]:
    """How the model calls its blocks, each, for any of the batches."""
    seen: list[list[Any]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        if not args and "hidden_states" not in kwargs:
            raise _refusal(model, "they do not take hidden states first")
        kwargs.pop("hidden_states", None)
        seen[-1].append((block, args[1:], kwargs))

    for part in (parts[0], parts[-1]):
        seen.append([])
        with _hooked(blocks, note):
            model(input_ids=part.to(device), use_cache=False)
    first, second = seen
    if [block for block, *_ in first] != list(blocks):
        raise _refusal(model, "they are not called one after the other")
    pairs = zip(tree_leaves([call[1:] for call in first]), tree_leaves([call[1:] for call in second]), strict=True)
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
        raise _refusal(model, "they are called with values that depend on the text")
    return [(args, kwargs) for _, args, kwargs in first]


def _enter(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    """What the first block is given."""

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    try:
        with _hooked(blocks, stop):
            model(input_ids=ids, use_cache=False)
    except _Stop as end:
        hidden: Tensor = end.args[0]
        return hidden
    raise _refusal(model, "they are not called")


def _run(block: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    args, kwargs = call
    out = block(hidden, *args, **kwargs)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@torch.no_grad()
def _mean_error(
    block: nn.Module, given: list[Tensor], wanted: list[Tensor], call: _Call, device: torch.device
) -> float:
    block.eval()
    errors = [block_error(_run(block, x.to(device), call), y.to(device)) for x, y in zip(given, wanted, strict=True)]
    return torch.stack(errors).mean().item()


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"reconstruct: the blocks of {type(model).__name__} cannot be run one by one ({reason}); train it as a whole"
    )
