"""What a backend has to show before it is trusted on a kind of hardware: the definition's very bits, in small cases.

Compilers, drivers and hardware that nobody tried may do anything. So the first time that a backend is to run on a kind
of hardware, each of its kernels runs once (where compiling takes a while, each of those that are asked for), with
shapes that divide nothing, rows of only 1 and only -1, tokens of zeros and of one large value, and has to return what
reference.py does on the CPU. Float activations, whose sums a kernel may take in any order, have few bits here, so that
all orders give the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import reference
from .layout import BLOCK, WIDE, pack_codes
from .reference import GROUP_SIZES

N, K = 70, 1100  # more than one tile, step and split of every kernel, and no multiple of any
# tokens and their dtype: one, few, and several of the panels and tiles of many
TOKENS = ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32), (5, torch.float16), (67, torch.bfloat16))

Results = Iterator[tuple[str, Tensor, Tensor]]  # what was computed, the result, and the definition's


def fault(results: Callable[[torch.device], Results], device: torch.device) -> str | None:
    """The first of results(device) that is not what it should be, in words; or the exception raised; or None."""
    what, threads = "the first case", torch.get_num_threads()
    with aside():
        # where other processes have a core, threads wait for each other longer than such small cases take: seconds
        torch.set_num_threads(1)
        try:
            for what, result, expected in results(device):
                if difference := _difference(result.cpu(), expected):
                    return f"{what}: {difference}"
        except Exception as error:
            return f"after {what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        finally:
            torch.set_num_threads(threads)
    return None


@contextmanager
def aside() -> Iterator[None]:
    """What is computed here is not seen by whatever surrounds it: a trace, an export, a default device, autograd."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def _difference(result: Tensor, expected: Tensor) -> str | None:
    if (result.shape, result.dtype) != (expected.shape, expected.dtype):
        return f"{list(result.shape)} {result.dtype} instead of {list(expected.shape)} {expected.dtype}"
    wrong = (result != expected).nonzero()
    if not len(wrong):
        return None
    first = tuple(wrong[0].tolist())
    values = f"{result[first].item():.6g} instead of {expected[first].item():.6g}"
    return f"{len(wrong)} of {expected.numel()} values differ from the definition, the first at {list(first)}: {values}"


def layers(
    prepack: Callable[[Tensor, int, int], Tensor],
    bind: Callable[..., Callable[[Tensor], Tensor]],
    kinds: tuple[str, ...],
    groups: tuple[bool, ...],
    widths: tuple[int | None, ...],
    bind_stack: Callable[..., Callable[[Tensor, Tensor], Tensor] | None] | None = None,
) -> Callable[[torch.device], Results]:
    """Results of a backend's layers, from its prepack and bind functions (backends.Backend), for kinds of weights.

    groups: the scales to look at: whether groups of features have some of their own
    widths: the activation_bits to look at, of which 4 are codes of 8, None floats
    """

    def results(device: torch.device) -> Results:
        for kind in kinds:
            codes, row, bias = example(kind)
            weight = prepack(pack_codes(codes, kind).to(device), N, K)
            narrow = [bits for bits in widths if bits != 16 or kind not in WIDE]
            for i, (m, dtype) in enumerate(TOKENS):
                scale = row if m % 2 else row[:1].clone()
                cases = [(scale, bits) for bits in narrow] if False in groups and kind != "int4" else []
                if True in groups and kind == "int4":
                    cases = [(group_scales(BLOCK) - 1, bits) for bits in narrow]
                elif True in groups and kind != "int8":
                    cases += [(group_scales(GROUP_SIZES[(i + j) % 4]), bits) for j, bits in enumerate(widths)]
                for scale, bits in cases:
                    x = tokens(m, dtype) if bits else tokens(m, dtype).round().clamp(-1, 1) / 2
                    run = bind(weight, scale.to(device), bias.to(device, dtype), N, K, bits)
                    # of such floats every sum is exact in float32, in any order, as the kernels take them
                    exactly = x if bits else x.float()
                    expected = reference.ternary_linear(exactly, codes, scale, bias.to(dtype), bits).to(dtype)
                    width = f"{bits}-bit" if bits else "float"
                    what = f"{kind} weights with {list(scale.shape)} scales times {m} {width} tokens of {dtype}"
                    yield what, run(x.to(device)), expected
            if bind_stack is not None and kind != "int4":
                yield from _chosen(prepack, bind_stack, kind, groups, narrow, device)

    return results


def _chosen(
    prepack: Callable[[Tensor, int, int], Tensor],
    bind_stack: Callable[..., Callable[[Tensor, Tensor], Tensor] | None],
    kind: str,
    groups: tuple[bool, ...],
    widths: list[int | None],
    device: torch.device,
) -> Results:
    """Of a stack of three layers, two for each of two tokens."""
    codes, row, bias = example(kind)
    stack, chosen = [codes, codes.flip(0), codes.roll(1, 0)], [2, 0, 2, 1]
    weights = torch.stack([prepack(pack_codes(each, kind).to(device), N, K) for each in stack])
    shifts = torch.stack([bias, -bias, bias + 1]).bfloat16()
    for scale in [row] * (False in groups) + [group_scales(128)] * (True in groups and kind != "int8"):
        scales = torch.stack([scale, scale * 2, scale + 1])
        for bits in widths:
            run = bind_stack(weights, scales.to(device), shifts.to(device), N, K, bits)
            if run is not None:
                x = tokens(2, torch.bfloat16)
                x = x if bits else x.round().clamp(-1, 1) / 2  # see layers
                found = run(x.to(device), torch.tensor(chosen, device=device))
                exactly = x if bits else x.float()
                parts = [
                    reference.ternary_linear(exactly[i // 2][None], stack[e], scales[e], shifts[e], bits).bfloat16()
                    for i, e in enumerate(chosen)
                ]
                what = f"{kind} weights with {list(scale.shape)} scales chosen from a stack"
                yield f"{what} times {f'{bits}-bit' if bits else 'float'} tokens", found, torch.cat(parts)


def example(kind: str = "ternary") -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], a scale for each row, and a bias."""
    draw = torch.Generator().manual_seed(0)
    low, top = {"int8": (-127, 127), "int4": (-8, 7)}.get(kind, (-1, 1))
    codes = torch.randint(low, top + 1, (N, K), generator=draw, dtype=torch.int8)
    if kind == "binary":
        codes[codes == 0] = 1
    codes[0], codes[1] = top, low
    return codes, torch.rand(N, generator=draw) + 0.5, torch.randn(N, generator=draw)


def group_scales(group_size: int) -> Tensor:
    """float16 [N, G]."""
    shape = N, -(-K // group_size)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(group_size)) + 0.5).half()


def tokens(m: int, dtype: torch.dtype) -> Tensor:
    """[M, K]; the first holds one value only, the largest of its codes."""
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(dtype)
    x[0] = 3.0
    if m > 2:
        x[1], x[2, 5] = 0, 1e4
    return x
