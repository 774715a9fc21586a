"""Processes that train one model together, each on its share of every batch."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

LONGEST = timedelta(days=1)  # that the others wait for the first, which reads the text; torchrun ends those of a crash


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: number `rank` of `world`; alone, it is 0 of 1.

    Every method but `first` must be called by all of them, in the same order.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Is this the one that writes and speaks?"""
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of some flags any process has set."""
        return self.sum(torch.tensor(flags, dtype=torch.int32)).bool().tolist() if self.world > 1 else flags

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum gradients; a parameter that some have no gradient of gets the others'."""
        if self.world == 1:
            return
        parameters = list(parameters)
        used = self.any([p.grad is not None for p in parameters])
        running = []
        for p, is_used in zip(parameters, used, strict=True):
            if is_used:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                running.append(dist.all_reduce(p.grad, async_op=True))
        for work in running:
            work.wait()

    def share(self, model: nn.Module) -> None:
        """Give all of them the first one's parameters and buffers."""
        if self.world > 1:
            for t in [*model.parameters(), *model.buffers()]:
                dist.broadcast(t.detach(), 0)

    def each(self, t: Tensor) -> list[Tensor]:
        """What every process has, in their order: CPU tensors of one shape and dtype."""
        if self.world == 1:
            return [t]
        found = [torch.empty_like(t) for _ in range(self.world)]
        dist.all_gather(found, t)
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        self.any([False])


@contextmanager
def together(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, or those of the default process group; else this one alone.

    device: where they train: "cpu", or "cuda", of which each takes its own
    Raises ValueError if there are more of them than GPUs.
    """
    start = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if start:
        backend = "gloo"
        if device != "cpu":
            if device != "cuda":
                raise ValueError(f"--device {device} is for one process; of several, each takes the GPU of its number")
            local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= count:
                raise ValueError(f"there are {count} GPUs for more processes; start {count}, or give --device cpu")
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"  # by the device of a tensor
        dist.init_process_group(backend, timeout=LONGEST)
    yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
    if start:
        dist.destroy_process_group()
