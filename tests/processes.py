"""One of two processes that train together: `python processes.py RANK FOLDER`; see test_processes.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bitnet
from bitnet.linear import BitLayer
from bitnet.quantize import quantize_latent

WORLD, STEPS, ROWS = 2, 20, 4
SPECS: dict[str, dict[str, Any]] = {"tensor": {}, "row": {"per_row": True}, "group": {"group_size": 32}}


def build(options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = llama(hidden_size=64, intermediate_size=96)
    bitnet.replace_linear(model, **options)
    return model


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def train(model: nn.Module, rank: int | None) -> list[float]:
    """The losses of all rows, whether one process has them or each its share.

    One process takes the shares one after the other: gradients are then sums of the same two parts. In one batch they
    would be rounded otherwise, and a weight that stands on a threshold may then fall to its other side.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(64, (ROWS, 16), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for part in ids.chunk(WORLD) if rank is None else [ids.chunk(WORLD)[rank]]:
            loss = model(input_ids=part, labels=part).loss
            (loss / WORLD if rank is None else loss).backward()
            total += loss.detach() / WORLD
        optimizer.step()
        optimizer.zero_grad()
        if rank is not None:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def codes(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, BitLayer)]
    weights = [getattr(layer.weight, "full_tensor", lambda w=layer.weight: w)().detach() for layer in layers]
    return [quantize_latent(weight, layer.spec)[0] for weight, layer in zip(weights, layers, strict=True)]


def different(ours: list[Tensor], theirs: list[Tensor]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))


def refusal(run: Callable[[], object]) -> str:
    try:
        run()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, options in SPECS.items():
        alone = build(options)
        losses = train(alone, None)
        together = {"ddp": DistributedDataParallel(build(options)), "fsdp": sharded(build(options))}
        for kind, model in together.items():
            shared = train(model, rank)
            gap = max(abs(a - b) for a, b in zip(losses, shared, strict=True))
            found[f"{name} {kind}"] = {"gap": gap, "codes": different(codes(alone), codes(model))}
            whole = bitnet.gather(model)
            found[f"{name} {kind} gathered"] = whole is not None
            if whole is not None:
                bitnet.pack(whole)
                bitnet.save(whole, folder / f"{name}-{kind}-gathered")
            bitnet.save(model, folder / f"{name}-{kind}-{0 if kind == 'fsdp' else rank}")
        if rank == 0:
            bitnet.pack(alone)
            bitnet.save(alone, folder / name)
    found["pack"] = refusal(lambda: bitnet.pack(together["fsdp"]))
    (folder / "file").touch()
    found["save"] = refusal(lambda: bitnet.save(together["fsdp"], folder / "file" / "below"))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
