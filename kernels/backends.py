"""Which backends there are, which of them can run here and are right, and which one a layer takes.

Every backend keeps a layer's weight in a form of its own, made once from the Hub bytes by `prepack` and never
saved, and implements one function: `bind`, which takes all that a layer consists of and returns the function of x.
The plain-torch definitions in reference.py say what that function must return; proof.py sees whether it does.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import proof, reference
from . import torch_int8 as int8
from .cpu import latent as cpu_latent
from .cpu import library as cpu_library
from .cpu import linear as cpu_linear
from .gpu import backend as gpu_backend
from .gpu import layout as gpu_layout
from .layout import check_rows, check_stored, codes_of, pack_ternary

Linear = Callable[[Tensor], Tensor]  # x [..., K] -> [..., N]
Chosen = Callable[[Tensor, Tensor], Tensor]  # x [M, K] and layers int64 [P], P / M a token -> [P, N]


_KINDS = ("ternary", "int8")


class Backend(NamedTuple):
    """How one backend does the job."""

    description: Callable[[], str]
    missing: Callable[[torch.device, int | None, bool], str | None]
    # (device, activation_bits, are there scales of groups) -> None where it can run, else why not and what to do
    prepack: Callable[[Tensor, int, int], Tensor]  # (stored weight, N, K) -> the backend's own form, one tensor
    unprepack: Callable[[Tensor, int, int], Tensor]  # (own form, N, K) -> int8 codes [N, K]
    bind: Callable[[Tensor, Tensor, Tensor | None, int, int, int | None], Linear]
    # bind(own form, scale, bias, N, K, activation_bits)
    check: Callable[[Tensor, Tensor, Tensor | None, int, int], None]
    # check(own form, scale, bias, N, K) raises ValueError for tensors that are not those of such a layer
    weights: tuple[str, ...] = _KINDS  # kinds it multiplies with kernels of its own
    groups: tuple[bool, ...] = (False,)  # scales that it has kernels for: of groups, or not
    strict: bool = False  # whether prepack refuses stored bytes that encode no ternary value
    widths: tuple[int | None, ...] = (8,)  # activation_bits for which it has kernels, beside 4
    hardware: Callable[[torch.device], str] = str  # what decides whether its kernels are right, in words
    others: Callable[[torch.device], proof.Results] = lambda device: iter(())  # results of training's kernels
    bind_stack: Callable[[Tensor, Tensor, Tensor | None, int, int, int | None], Chosen | None] | None = None
    # the same for layers in a stack, of which a tensor says which are taken; None for those it has no such kernel for
    compiles: bool = False  # whether a kernel's first call takes so long that only those asked for are proved


# Converters that graphs may hold, registered with torch; ops.py has all else.

_LIBRARY = torch.library.Library("bitnet", "DEF")
_LIBRARY.define("cpu_prepack(Tensor packed, SymInt out_features, int form, SymInt? in_features=None) -> Tensor")
_LIBRARY.define("cpu_unprepack(Tensor weight, SymInt out_features, SymInt in_features, int form) -> Tensor")
_LIBRARY.impl("cpu_prepack", cpu_linear.prepack, "CPU")
_LIBRARY.impl("cpu_unprepack", cpu_linear.unprepack, "CPU")


@torch.library.register_fake("bitnet::cpu_prepack", lib=_LIBRARY)
def _(packed: Tensor, n: int, form: int, k: int | None = None) -> Tensor:
    form, (_, features) = cpu_linear.form_of(packed, form), check_stored(packed, n, k)
    return packed.new_empty(cpu_linear.form_shape(n, features, form), dtype=cpu_linear.form_dtype(form))


@torch.library.register_fake("bitnet::cpu_unprepack", lib=_LIBRARY)
def _(weight: Tensor, n: int, k: int, form: int) -> Tensor:
    return weight.new_empty(n, k, dtype=torch.int8)


def _bind_torch(
    codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, activation_bits: int | None
) -> Linear:
    return lambda x: int8.linear(x.reshape(-1, k), codes, scale, bias, activation_bits).reshape(*x.shape[:-1], n)


def _bind_reference(
    packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, activation_bits: int | None
) -> Linear:
    return lambda x: reference.ternary_linear(x, codes_of(packed, n, k), scale, bias, activation_bits)


def _check_codes(codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int) -> None:
    if tuple(codes.shape) != (n, k):
        raise ValueError(f"the weight's codes are {list(codes.shape)}, not {n} x {k}")
    check_rows(scale, bias, n)


def _check_packed(packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int) -> None:
    check_stored(packed, n, k)
    check_rows(scale, bias, n)


def _quantizers(
    device: torch.device, quantize: Callable, ternary_codes: Callable, magnitudes: Callable, widths: tuple[int, ...]
) -> proof.Results:
    """Results of what a library has in common with the others: activation codes, ternary codes, sums of magnitudes."""
    for dtype in cpu_library.FLOATS:
        x = proof.tokens(5, dtype)
        here = x.to(device)
        for bits in widths:
            pairs = zip(quantize(here, bits), reference.quantize_activation(x, bits), strict=True)
            for what, (got, expected) in zip(("codes", "scales"), pairs, strict=True):
                yield f"{bits}-bit {what} of tokens of {dtype}", got, expected
        codes, _ = reference.quantize_weight(x, per_row=True)
        inv = reference.inverse_scale(x, per_row=True)
        yield f"ternary codes of {dtype}", ternary_codes(here, inv.to(device)), codes
        yield f"inverse scales of {dtype}", reference.inverse_of_mean(magnitudes(here) / x.shape[1]), inv


def _cpu_quantizers(device: torch.device) -> proof.Results:
    functions = cpu_latent.quantize_tokens, cpu_latent.ternary_codes, cpu_latent.magnitudes
    yield from _quantizers(device, *functions, widths=(16, 8, 4))
    for dtype in cpu_library.FLOATS:
        x = proof.tokens(5, dtype)
        inv = reference.inverse_scale(x, per_row=True)
        expected = pack_ternary(reference.quantize_weight(x, per_row=True)[0])
        yield f"packed codes of {dtype}", cpu_latent.pack_ternary(x, inv), expected
    codes, scale, bias = proof.example()
    q, s = reference.quantize_activation(proof.tokens(5, torch.float32))
    weight = cpu_linear.prepack_codes(codes, eight_bits=False)
    expected = reference.rescale(reference.int_matmul(q, codes), s, scale, bias, torch.float32)
    yield "codes times codes", cpu_linear.codes_linear(q, s, weight, scale, bias, len(codes), torch.float32), expected


def _triton_quantizers(device: torch.device) -> proof.Results:
    from .gpu import groups, linear
    from .gpu.quantize import dequantize, magnitudes, quantize_activation, ternary_codes

    yield from _quantizers(device, quantize_activation, ternary_codes, magnitudes, widths=(16, 8, 4))
    for dtype in cpu_library.FLOATS:
        q, s = reference.quantize_activation(proof.tokens(5, dtype))
        yield f"tokens from codes as {dtype}", dequantize(q.to(device), s.to(device), dtype), (q / s).to(dtype)
    codes, scale, bias = proof.example()
    for bits in (8, 16):
        q, s = reference.quantize_activation(proof.tokens(67, torch.float32), bits)
        there = q.to(device), s.to(device), codes.to(device)
        expected = reference.rescale(reference.int_matmul(q, codes), s, scale, bias, torch.bfloat16)
        found = linear.int_linear(*there, scale.to(device), bias.to(device), torch.bfloat16)
        yield f"codes times {bits}-bit codes", found, expected
        for size in reference.GROUP_SIZES:
            scales = proof.group_scales(size)
            expected = reference.group_linear(q, s, codes, scales, bias, torch.bfloat16)
            found = groups.int_linear(*there, scales.to(device), bias.to(device), torch.bfloat16)
            yield f"codes in groups of {size} times {bits}-bit codes", found, expected


def _cpu(name: str, weights: tuple[str, ...]) -> Backend:
    form = partial(cpu_library.form_of_backend, name)
    return Backend(
        lambda: cpu_library.description(form()),
        missing=lambda device, activation_bits, groups: cpu_library.missing(device, activation_bits, groups, form()),
        prepack=lambda packed, n, k: torch.ops.bitnet.cpu_prepack(packed, n, form(), k),
        unprepack=lambda weight, n, k: torch.ops.bitnet.cpu_unprepack(weight, n, k, form()),
        bind=lambda weight, scale, bias, n, k, bits: cpu_linear.bind(weight, scale, bias, n, k, bits, form()),
        check=lambda weight, scale, bias, n, k: cpu_linear.check_prepacked(weight, scale, bias, n, k, form()),
        weights=weights,
        groups=(False, True),
        strict=True,
        widths=(8, 16),
        hardware=lambda device: cpu_library.isas(form())[0],
        others=_cpu_quantizers if name == "cpu" else lambda device: iter(()),
    )


def _triton(planes: int) -> Backend:
    return Backend(
        partial(gpu_backend.description, planes),
        missing=partial(gpu_backend.missing, planes=planes),
        prepack=lambda packed, n, k: gpu_layout.prepack(packed, n, planes),
        unprepack=partial(gpu_layout.unprepack, planes=planes),
        bind=partial(gpu_backend.bind, planes=planes),
        check=partial(gpu_backend.check, planes=planes),
        weights=(*_KINDS, "int4") if planes == gpu_layout.TWO_BITS else ("ternary",),
        groups=(False, True) if planes == gpu_layout.TWO_BITS else (False,),
        widths=(8, 16, None),
        hardware=gpu_backend.hardware,
        others=_triton_quantizers if planes == gpu_layout.TWO_BITS else lambda device: iter(()),
        bind_stack=partial(gpu_backend.bind_stack, planes=planes),
        compiles=True,
    )


# In the order in which "auto" prefers them. NAME-base3 and NAME-binary store 1.6 bits a weight and 1: by name only.
_SUFFIXES = {1.6: "-base3", 1: "-binary"}  # by weight_bits
BACKENDS = {
    "cpu": _cpu("cpu", (*_KINDS, "int4")),
    "cpu-base3": _cpu("cpu-base3", ("ternary",)),
    "cpu-binary": _cpu("cpu-binary", ("binary",)),
    "triton": _triton(gpu_layout.TWO_BITS),
    "triton-base3": _triton(gpu_layout.BASE3),
    "torch": Backend(
        lambda: "int8 codes kept in memory, torch's fastest exact product",
        missing=lambda device, activation_bits, groups: None,
        prepack=codes_of,
        unprepack=lambda codes, n, k: codes,
        bind=_bind_torch,
        check=_check_codes,
    ),
    "reference": Backend(
        lambda: "the plain-torch definition; unpacks on every call",
        missing=lambda device, activation_bits, groups: None,
        prepack=lambda packed, n, k: packed,
        unprepack=codes_of,
        bind=_bind_reference,
        check=_check_packed,
    ),
}


class BackendStatus(NamedTuple):
    """One row of backends()."""

    name: str
    ready: bool
    detail: str  # what it is, or why it is not ready and what to do


def backends(
    device: str | torch.device = "cpu", activation_bits: int | None = 8, groups: bool = False
) -> list[BackendStatus]:
    """Which backends can run on `device`, best first, and for the others why not and what to do.

    Those that could are proved first (proof.py), which takes seconds on a GPU that has not compiled their kernels yet.
    """
    device = torch.device(device)
    rows = []
    for name, backend in BACKENDS.items():
        obstacle = backend.missing(device, activation_bits, groups) or _fault(name, device, activation_bits, groups)
        rows.append(BackendStatus(name, obstacle is None, obstacle or backend.description()))
    return rows


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or the name of a backend, whether or not that one can run here."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")


@torch.compiler.assume_constant_result  # run it while tracing, do not trace into it
def choose_backend(
    backend: str,
    device: torch.device,
    activation_bits: int | None = 8,
    weight_bits: float = 2,
    groups: bool = False,
    trains: bool = False,
) -> str:
    """The backend to use on `device` for such activations: the named one, or for "auto" the first that is ready.

    groups: whether groups of features have scales of their own
    trains: whether it is for what a training step is made of, not for packed layers
    weight_bits: 1.6 turns a backend into its "-base3" form if that can run, 1 into its "-binary" form, and either warns
        if it cannot

    Raises ValueError for an unknown name and RuntimeError, with the remedy, for one that cannot run here.
    """
    name = _choose(backend, device, activation_bits, groups, trains)
    suffix = _SUFFIXES.get(weight_bits, "")
    if suffix and not name.endswith(suffix):
        form = BACKENDS.get(name + suffix)
        why = form.missing(device, activation_bits, groups) if form else "that backend has no such form"
        why = why or _fault(name + suffix, device, activation_bits, groups)
        if why is None:
            return name + suffix
        warnings.warn(
            f"weight_bits={weight_bits}: {why.partition(';')[0]}; weights keep the form of backend {name!r}",
            stacklevel=2,
        )
    return name


@lru_cache
def _choose(backend: str, device: torch.device, activation_bits: int | None, groups: bool, trains: bool) -> str:
    check_backend(backend)
    asked = activation_bits, groups, trains
    if backend == "auto":
        for name, one in BACKENDS.items():
            if name.endswith(tuple(_SUFFIXES.values())) or one.missing(device, activation_bits, groups):
                continue
            if (fault := _fault(name, device, *asked)) is None:
                return name
            _say_once(f"backend {name!r} is not used: {fault.partition(';')[0]}. Please report it.")
        raise AssertionError("the definition runs everywhere")
    obstacle = BACKENDS[backend].missing(device, activation_bits, groups) or _fault(backend, device, *asked)
    if obstacle:
        raise RuntimeError(f"backend {backend!r} cannot run on {device.type}: {obstacle}")
    return backend


def _fault(
    name: str, device: torch.device, activation_bits: int | None, groups: bool, trains: bool = False
) -> str | None:
    """What is wrong with a backend's results on this hardware; None if nothing is. Looked at once in a process."""
    if name == "reference" or device.type == "meta":
        return None
    if device.type == "cuda":
        if not torch.cuda.is_available():  # a layer of fake tensors
            return None
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first call of a low-bit layer cannot be captured; run the model once before")
    hardware = BACKENDS[name].hardware(device)
    asked: _Asked = None
    if BACKENDS[name].compiles:
        asked = "training" if trains else (8 if activation_bits == 4 else activation_bits, groups)
    if (name, hardware, asked) not in _FAULTS:
        _FAULTS[name, hardware, asked] = _prove(name, hardware, device, asked)
    return _FAULTS[name, hardware, asked]


_Asked = tuple[int | None, bool] | str | None  # layers of such activation_bits and groups, "training", or everything
_FAULTS: dict[tuple[str, str, _Asked], str | None] = {}  # by hardware, as there may be several devices alike


def _prove(name: str, hardware: str, device: torch.device, asked: _Asked) -> str | None:
    backend, every = BACKENDS[name], []
    if asked != "training":
        widths, groups = backend.widths, backend.groups
        if isinstance(asked, tuple):
            widths, groups = (asked[0],), (asked[1],)
        every.append(proof.layers(backend.prepack, backend.bind, backend.weights, groups, widths, backend.bind_stack))
    if not isinstance(asked, tuple):
        every.append(backend.others)
    for results in every:
        if fault := proof.fault(results, device):
            return f"its results are wrong on this hardware ({hardware}): {fault}; choose 'auto'"
    return None


@lru_cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)
