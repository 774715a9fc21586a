"""The native library that kernels/csrc builds: found, loaded, and what to do where it is missing.

The library knows pointers only. ctypes releases the interpreter's lock during a call: other Python threads (a server's
event loop) run meanwhile.
"""

import ctypes
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

_ABI = 25  # bitnet_abi() of a library built from these sources


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4, torch.int16: 5}


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_ERRORS = {1: "unsupported dtype", 2: "unsupported shape", 3: "unknown instruction set", 4: "out of memory"}
BAD_CODE = 5  # status of a weight with codes that the form does not hold


# Forms; 8-bit and 4-bit weights get their own whichever is asked for.
TWO_BITS, BASE3, EIGHT_BITS, ONE_BIT, FOUR_BITS, ONE_BIT_TABLES = 0, 1, 2, 3, 4, 5


def missing(
    device: torch.device, activation_bits: int | None = 8, groups: bool = False, form: int = TWO_BITS
) -> str | None:
    """None if this backend can run layers with these activations there, else why not and what to do."""
    if device.type not in ("cpu", "meta"):
        return f"it runs on CPU tensors; on {device.type} choose 'auto'"
    if activation_bits is None:
        return "it multiplies integers, but activation_bits=None keeps activations float; choose 'auto' or 'torch'"
    library = load()
    if isinstance(library, str):
        return library
    return None if isas(form) else "this CPU has no AVX512-VBMI; choose 'auto' or 'cpu'"


def description(form: int = TWO_BITS) -> str:
    """What runs here, in words."""
    bits = {TWO_BITS: "2 bits", BASE3: "1.6 bits"}.get(form, "1 bit")
    wanted = torch.get_num_threads()
    threads = native().bitnet_threads(wanted)
    used = f"{threads} thread{'s' * (threads > 1)}" + (f", not {wanted}: this process was forked" * (threads < wanted))
    return f"native kernels, {bits} a weight ({isas(form)[0]}, {used})"


@torch.compiler.assume_constant_result  # run it while tracing, do not trace into it
def form_of_backend(name: str) -> int | None:
    """The form in which a backend keeps ternary or binary weights here; None if it is none of these.

    Of the forms of 1 bit, ONE_BIT_TABLES is faster where vectors have 256 bits, and other ones take ONE_BIT.
    """
    if name != "cpu-binary":
        return {"cpu": TWO_BITS, "cpu-base3": BASE3}.get(name)
    tables = not isinstance(load(), str) and isas(ONE_BIT_TABLES) and isas(ONE_BIT)[:1] in ([], ["scalar"])
    return ONE_BIT_TABLES if tables else ONE_BIT


def isas(form: int = TWO_BITS) -> list[str]:
    """The instruction sets that multiply a form and this CPU can run, best first."""
    return list(all_isas(form))


@lru_cache
def all_isas(form: int) -> tuple[str, ...]:
    library = native()
    names: list[str] = []
    while name := library.bitnet_isa(form, len(names)):
        names.append(name.decode())
    return tuple(names)


def isa_index(form: int = TWO_BITS, isa: str | None = None) -> int:
    """By which the library knows an instruction set; by default the best."""
    return all_isas(form).index(isa or isas(form)[0])


def native() -> ctypes.CDLL:
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"the native CPU library is missing: {library}")
    return library


@lru_cache(1)
def load() -> ctypes.CDLL | str:
    """The library, or why there is none and what to do. Loaded after torch, it shares torch's OpenMP threads."""
    package = sys.modules[__name__.partition(".")[0]]
    here = Path(str(package.__file__)).parent.parent
    build = f"pip install -e {here}" if (here / "pyproject.toml").exists() else "install the package again"
    folders = [Path(folder) / "_native" for folder in package.__path__]
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
    library.bitnet_step.argtypes = (pointer, pointer, pointer, int64, pointer, pointer, pointer, int32)
    library.bitnet_attention.argtypes = (pointer, int32)
    library.bitnet_norm.argtypes = (pointer, pointer, int32, int64, int64, pointer, int32)
    library.bitnet_prepack.argtypes = (pointer, int32, int64, int64, pointer, int32, int32)
    library.bitnet_unprepack.argtypes = (pointer, int64, int64, pointer, int32, int32)
    library.bitnet_quantize.argtypes = (pointer, int32, int64, int64, int64, int32, pointer, pointer, int32, int32)
    where = (pointer, int32, int64, int64, int64)  # x, its type, stride, M, K
    library.bitnet_hadamard.argtypes = (*where, int64, pointer, ctypes.c_float, pointer, int32, int32)
    library.bitnet_ternary_codes.argtypes = (pointer, int32, int64, int64, pointer, int32, pointer, int32, int32)
    library.bitnet_pack_ternary.argtypes = (pointer, int32, int64, int64, pointer, int32, pointer, int32, int32)
    library.bitnet_magnitudes.argtypes = (pointer, int32, int64, int64, pointer, int32, int32)
    library.bitnet_choose.argtypes = (pointer, int32)
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


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"native CPU kernel: {_ERRORS.get(status, status)}")


def read(weight: Tensor) -> None:
    """Read a tensor's memory once, with all threads: the yardstick of benchmarks."""
    native().bitnet_read(weight.data_ptr(), weight.nbytes, torch.get_num_threads())
