"""Whether a call may go straight to a kernel, or something looks at the operations that run."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_observed() -> bool:
    """Whether something looks at the operations that run, and would not see a native kernel: a trace, a mode, forward
    differentiation, a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def needs_operator(x: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether a call must run as the registered operator: it is observed, or x is no plain float tensor."""
    return (
        type(x) is not Tensor
        or not x.is_floating_point()
        or is_observed()
        or (
            torch.is_grad_enabled()
            and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad))
        )
    )
