"""Muon: the optimizer for the matrices of a model."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Muon, Jordan et al. 2024), for the matrices inside a model's blocks.

    params: 2-D parameters, and 3-D ones as stacks of matrices (fused experts); embedding, head, norms and biases
            belong to AdamW
    lr:     step size on AdamW's scale: updates have a root mean square of about 0.2 (arXiv 2502.16982, sec. 2.2)

    The same method as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), which orthogonalizes one matrix at a time
    and always in bfloat16: on CPUs without bfloat16 instructions that takes longer than the model itself. Here the
    parameter's dtype is used on the CPU, and matrices of one shape go together.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-2, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices only, got a parameter of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape, p.device, p.dtype), []).append(p)
            for (shape, _, _), parameters in shapes.items():
                updates = []
                for p in parameters:
                    assert p.grad is not None
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    average = state["momentum_buffer"]
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))  # Nesterov
                size = 0.2 * max(shape[-2:]) ** 0.5 * group["lr"]
                matrices = orthogonalize(torch.stack(updates).flatten(0, -3))
                for p, update in zip(parameters, matrices.unflatten(0, (-1, *shape[:-2])), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-size)
        return loss


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Bring the singular values of each matrix [B, M, N] near 1, by Newton-Schulz iteration (Jordan et al. 2024).

    The first step divides by sqrt(||X X^T||_F), a closer bound of the largest singular value than ||X||_F, which
    saves one of the five customary steps.
    """
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for step in range(steps):
        gram = x @ x.mT
        if step == 0:
            norm = gram.flatten(1).norm(dim=1).clamp(min=1e-14).view(-1, 1, 1)
            x, gram = x / norm.sqrt(), gram / norm
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x
