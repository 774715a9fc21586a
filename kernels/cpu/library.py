"""The `cpu` backend: launcher of the native library that kernels/csrc builds.

The library knows pointers only. This file finds it, describes layers to it, owns the memory of prepacked weights, and
says what to do where it is missing. The layouts, of 2, of 1.6 ("base3") and of 8 bits a weight, are described in
csrc/bitnet_cpu.h.

ctypes releases the interpreter's lock during a call: other Python threads (a server's event loop) run meanwhile.
"""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from .. import reference

_ABI = 8  # bitnet_abi() of a library built from these sources
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ERRORS = {1: "unsupported dtype", 2: "unsupported shape", 3: "unknown instruction set", 4: "out of memory"}
TWO_BITS, BASE3, _EIGHT_BITS = 0, 1, 2  # layouts; int8 weights get the third whichever is asked for


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("per_row", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


# Finding and loading


def missing(device: torch.device, activation_bits: int | None = 8, layout: int = TWO_BITS) -> str | None:
    """None if this backend can run layers with these activations there, else why not and what to do."""
    if device.type not in ("cpu", "meta"):
        return f"it runs on CPU tensors; on {device.type} choose 'auto'"
    if activation_bits is None:
        return "it multiplies integers, but activation_bits=None keeps activations float; choose 'auto' or 'torch'"
    library = _load()
    if isinstance(library, str):
        return library
    return None if isas(layout) else "this CPU has no AVX512-VBMI; choose 'auto' or 'cpu'"


def description(layout: int = TWO_BITS) -> str:
    """What runs here, in words."""
    bits = "1.6 bits" if layout == BASE3 else "2 bits"
    wanted = torch.get_num_threads()
    threads = _library().bitnet_threads(wanted)
    used = f"{threads} thread{'s' * (threads > 1)}" + (f", not {wanted}: this process was forked" * (threads < wanted))
    return f"native kernels, {bits} a weight ({isas(layout)[0]}, {used})"


def isas(layout: int = TWO_BITS) -> list[str]:
    """The instruction sets that multiply a layout and this CPU can run, best first."""
    return list(_isas(layout))


@lru_cache
def _isas(layout: int) -> tuple[str, ...]:
    library = _library()
    names: list[str] = []
    while name := library.bitnet_isa(layout, len(names)):
        names.append(name.decode())
    return tuple(names)


def _index(layout: int = TWO_BITS, isa: str | None = None) -> int:
    """By which the library knows an instruction set; by default the best."""
    return _isas(layout).index(isa or isas(layout)[0])


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the native CPU library is missing: {library}")
    return library


@lru_cache(1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none and what to do. Loaded after torch, it shares torch's OpenMP threads."""
    import bitnet

    here = Path(bitnet.__file__).parent.parent
    build = f"pip install -e {here}" if (here / "pyproject.toml").exists() else "install the package again"
    folders = [Path(folder) / "_native" for folder in bitnet.__path__]
    found = [file for folder in folders for file in sorted(folder.glob("*bitnet_cpu.*"))]
    if not found:
        return _why_missing(here, folders, build)
    try:
        library = ctypes.CDLL(str(found[0]))
        abi = library.bitnet_abi()
    except (OSError, AttributeError) as error:
        return f"{found[0]} does not load ({error}); build it for this machine: {build}"
    if abi != _ABI:
        return f"{found[0]} was built from other sources; build it again: {build}"
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.bitnet_threads.argtypes = (int32,)
    library.bitnet_isa.argtypes, library.bitnet_isa.restype = (int32, int32), ctypes.c_char_p
    library.bitnet_linear.argtypes = (pointer, pointer, int32, int64, pointer, int64, pointer, int32, int32)
    library.bitnet_prepack.argtypes = (pointer, int32, int64, int64, pointer, int32, int32)
    library.bitnet_unprepack.argtypes = (pointer, int64, int64, pointer, int32, int32)
    library.bitnet_quantize.argtypes = (pointer, int32, int64, int64, int64, pointer, pointer, int32, int32)
    library.bitnet_ternary_codes.argtypes = (pointer, int32, int64, int64, pointer, int32, pointer, int32, int32)
    library.bitnet_pack_ternary.argtypes = (pointer, int32, int64, int64, pointer, int32, pointer, int32, int32)
    library.bitnet_magnitudes.argtypes = (pointer, int32, int64, int64, pointer, int32, int32)
    library.bitnet_read.argtypes, library.bitnet_read.restype = (pointer, int64, int32), int64
    return library


def _why_missing(here: Path, folders: list[Path], build: str) -> str:
    for folder in folders:
        if (folder / "why.txt").exists():
            return f"{(folder / 'why.txt').read_text().strip()}, then: {build}"
    try:
        installed = metadata.distribution("bitnet-toolkit").locate_file("bitnet")
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and list(Path(str(installed)).glob("_native/*bitnet_cpu.*")):
        return (
            f"this is the checkout in {here}, but the library was installed beside another copy, {installed}; "
            f"run from another folder, or: {build}"
        )
    return f"it was never built for {here}; build it: {build}"


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"native CPU kernel: {_ERRORS.get(status, status)}")


# Memory of prepacked weights


class _Arena:
    """Bump allocation from large chunks backed by 2 MB pages, which make M = 1 about a quarter faster.

    Every tensor keeps its chunk's mapping alive, and the arena itself holds only a weak reference: a chunk is
    unmapped when the last tensor in it dies.
    """

    CHUNK, PAGE, ALIGN = 64 << 20, 2 << 20, 256

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None
        self._next = 0
        if hasattr(os, "register_at_fork"):  # another thread may hold the lock when this one forks
            os.register_at_fork(after_in_child=lambda: setattr(self, "_lock", threading.Lock()))

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized uint8 tensor."""
        size = torch.Size(shape).numel()
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=torch.uint8, device="cpu")
        with self._lock:
            chunk = self._chunk()
            if chunk is None or self._next + size > len(chunk):
                # room to start on a page boundary: only aligned 2 MB become a large page
                chunk = mmap.mmap(-1, max(self.CHUNK, size) + self.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(OSError):  # a kernel built without large pages
                    chunk.madvise(mmap.MADV_HUGEPAGE)
                self._next = -torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr() % self.PAGE
                self._chunk = weakref.ref(chunk)
            tensor = torch.frombuffer(chunk, dtype=torch.uint8, count=size, offset=self._next).view(shape)
            self._next += -(-size // self.ALIGN) * self.ALIGN
        return tensor


_arena = _Arena()


def layout_shape(n: int, k: int, layout: int = TWO_BITS) -> tuple[int, int, int]:
    """Shape of the tensor that holds n x k prepacked codes: 32 rows x 16 (base3: 20; int8: 4) features in 128 bytes."""
    return -(-n // 32), -(-k // {TWO_BITS: 16, BASE3: 20, _EIGHT_BITS: 4}[layout]), 128


def layout_of(weight: Tensor, layout: int) -> int:
    """The layout of a weight, stored or prepacked: int8 ones have their own, others the given one."""
    return _EIGHT_BITS if weight.dtype == torch.int8 else layout


def prepack(packed: Tensor, n: int, layout: int = TWO_BITS) -> Tensor:
    """Hub bytes uint8 [ceil(N/4), K] to uint8 layout_shape(N, K), or int8 [N, K] to int8; exact for any N and K."""
    layout = layout_of(packed, layout)
    weight = _arena.empty(*layout_shape(n, packed.shape[1], layout)).view(packed.dtype)
    return _prepack(packed, False, n, layout, weight)


def prepack_codes(codes: Tensor, eight_bits: bool) -> Tensor:
    """Codes int8 [N, K], ternary or eight_bits, for a few products: the same, in memory that goes and comes quickly."""
    layout = _EIGHT_BITS if eight_bits else TWO_BITS
    n, k = codes.shape
    weight = codes.new_empty(layout_shape(n, k, layout), dtype=torch.int8 if eight_bits else torch.uint8)
    return _prepack(codes, True, n, layout, weight)


def _prepack(source: Tensor, from_codes: bool, n: int, layout: int, weight: Tensor) -> Tensor:
    source, k = source.contiguous(), source.shape[1]
    args = (source.data_ptr(), from_codes, n, k, weight.data_ptr(), layout)
    _check(_library().bitnet_prepack(*args, torch.get_num_threads()))
    return weight


def unprepack(weight: Tensor, n: int, k: int, layout: int = TWO_BITS) -> Tensor:
    """The inverse, as codes int8 [N, K]."""
    codes, layout = weight.new_empty(n, k, dtype=torch.int8), layout_of(weight, layout)
    _check(_library().bitnet_unprepack(weight.data_ptr(), n, k, codes.data_ptr(), layout, torch.get_num_threads()))
    return codes


def read(weight: Tensor) -> None:
    """Read a tensor's memory once, with all threads: the yardstick of benchmarks."""
    _library().bitnet_read(weight.data_ptr(), weight.nbytes, torch.get_num_threads())


# Training


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation(x, 8) of float32, bfloat16 or float16 x [M, K]: int8 [M, K], float32 [M, 1]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    q, s = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, 1, dtype=torch.float32)
    args = (x.data_ptr(), _TYPES[x.dtype], x.stride(0), m, k, q.data_ptr(), s.data_ptr(), _index())
    _check(_library().bitnet_quantize(*args, torch.get_num_threads()))
    return q, s


def ternary_codes(weight: Tensor, inv: Tensor) -> Tensor:
    """clamp(round(weight * inv), -1, 1) as int8 [N, K], in one pass over a float32, bfloat16 or float16 weight.

    weight: contiguous [N, K]; inv: float32 [1] or [N, 1]
    """
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    n, k = weight.shape
    args = (weight.data_ptr(), _TYPES[weight.dtype], n, k, inv.data_ptr(), inv.numel() > 1, codes.data_ptr(), _index())
    _check(_library().bitnet_ternary_codes(*args, torch.get_num_threads()))
    return codes


def pack_ternary(weight: Tensor, inv: Tensor) -> Tensor:
    """layout.pack_ternary(ternary_codes(weight, inv)), uint8 [ceil(N/4), K], in one pass."""
    n, k = weight.shape
    packed = weight.new_empty(-(-n // 4), k, dtype=torch.uint8)
    args = (weight.data_ptr(), _TYPES[weight.dtype], n, k, inv.data_ptr(), inv.numel() > 1, packed.data_ptr(), _index())
    _check(_library().bitnet_pack_ternary(*args, torch.get_num_threads()))
    return packed


def magnitudes(weight: Tensor) -> Tensor:
    """The sum of |W| over each row of a contiguous float32, bfloat16 or float16 weight: float64 [N].

    The order of summation depends on nothing but K. Not finite where the row is not.
    """
    n, k = weight.shape
    sums = weight.new_empty(n, dtype=torch.float64)
    args = (weight.data_ptr(), _TYPES[weight.dtype], n, k, sums.data_ptr(), _index())
    _check(_library().bitnet_magnitudes(*args, torch.get_num_threads()))
    return sums


# Multiplying


def _layer(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    layout: int = TWO_BITS,
    isa: str | None = None,
) -> ctypes.Structure:
    """The C description of a layer. It holds the tensors it points to; of a bias in a rare dtype, a float32 copy."""
    layout = layout_of(weight, layout)
    needed = layout_shape(n, k, layout)
    if tuple(weight.shape) != needed:  # C would read beyond it
        found = list(weight.shape)
        raise ValueError(f"native CPU kernel: weight is prepacked as {found}, but {n} x {k} needs {list(needed)}")
    if (scale is not None and scale.numel() not in (1, n)) or (bias is not None and bias.numel() != n):
        sizes = [None if t is None else t.numel() for t in (scale, bias)]
        raise ValueError(f"native CPU kernel: scale and bias of sizes {sizes} do not fit {n} rows")
    if bias is not None:
        bias = (bias if bias.dtype in FLOATS else bias.float()).contiguous()
    scale = None if scale is None else scale.contiguous()
    layer = _Layer(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        n,
        k,
        scale is not None and scale.numel() > 1,
        0 if bias is None else _TYPES[bias.dtype],
        layout,
        _index(layout, isa),
    )
    layer.alive = (weight, scale, bias)
    return layer


def _multiply(layer: ctypes.Structure, q: Tensor, s: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes q int8 [M, K] with scales s float32 [M, 1] times a layer, as dtype [M, N]."""
    q = q.contiguous()
    s = None if s is None else s.contiguous()
    y = q.new_empty(len(q), layer.n, dtype=dtype)
    pointer = None if s is None else s.data_ptr()
    args = (q.data_ptr(), _TYPES[q.dtype], layer.k, pointer, len(q), y.data_ptr(), _TYPES[dtype])
    _check(_library().bitnet_linear(ctypes.byref(layer), *args, torch.get_num_threads()))
    return y


def int_matmul(q: Tensor, weight: Tensor, n: int, layout: int = TWO_BITS, isa: str | None = None) -> Tensor:
    """reference.int_matmul of codes q int8 [M, K] and prepacked ones: int32 [M, N]. isa: a name from isas(layout)."""
    return _multiply(_layer(weight, None, None, n, q.shape[1], layout, isa), q, None, torch.int32)


def codes_linear(
    q: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    """reference.rescale of int_matmul(q, weight, n): dtype [M, N]."""
    y = _multiply(_layer(weight, scale, bias, n, q.shape[1]), q, s, dtype if dtype in FLOATS else torch.float32)
    return y.to(dtype)


def bind(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int | None,
    layout: int = TWO_BITS,
    isa: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function x [..., K] -> [..., N] with everything about the layer looked up beforehand.

    weight: prepacked; scale: float32 [1] or [N]; bias: floating [N] or None; isa: a name from isas(layout), by
    default the best. The function keeps the tensors alive and sees what is later written into them.
    """
    if weight.is_meta:
        return lambda x: x.new_empty(*x.shape[:-1], n)
    layer = _layer(weight, scale, bias, n, k, layout, isa)
    run, pointer, types, threads = _library().bitnet_linear, ctypes.byref(layer), _TYPES, torch.get_num_threads

    def linear(x: Tensor) -> Tensor:
        kind = types.get(x.dtype)
        if kind is None:  # float64 and exotic ones: the definition computes in float32, too
            return linear(x.float()).to(x.dtype)
        if not x.is_cpu:
            raise ValueError(f"x is on {x.device}, but this layer is on cpu; move one of them")
        y = x.new_empty(*x.shape[:-1], n)
        stride = k
        if not x.is_contiguous():
            if x.ndim == 2 and x.stride(1) == 1:
                stride = x.stride(0)
            else:
                x = x.contiguous()
        status = run(pointer, x.data_ptr(), kind, stride, None, x.numel() // k, y.data_ptr(), kind, threads())
        if status:
            _check(status)
        return y

    def linear_4_bits(x: Tensor) -> Tensor:
        # rare enough for a pass of torch's before the product
        q, s = reference.quantize_activation(x.reshape(-1, k), 4)
        y = _multiply(layer, q, s, x.dtype if x.dtype in FLOATS else torch.float32)
        return y.to(x.dtype).reshape(*x.shape[:-1], n)

    return linear if bits == 8 else linear_4_bits
