"""Which kernel with which tile sizes multiplies M tokens by an N x K weight: a table, a heuristic, and what was tuned.

Nothing is ever tuned while a model runs. `bitnet tune` measures a handful of candidates and writes the best to file(),
which is read once per process; for what is not in it `heuristic` decides. The reasons below are counts of registers,
shared memory and bytes, from kernels compiled for each architecture; of these sm_90's have been measured (README.md).
"""

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .layout import BASE3, FOUR_BITS, INT8, TWO_BITS, row_bytes


class Gemv(NamedTuple):
    """A dot product a row, activations quantized by every program; block_n * repeat rows a program."""

    block_n: int
    repeat: int
    warps: int


class Dot(NamedTuple):
    """Tensor cores, one tile of block_n rows x block_m tokens a program."""

    block_n: int
    block_m: int
    block_k: int  # features a step
    warps: int
    stages: int  # steps in flight
    split: int = 1  # programs that share a tile, each a part of K
    dense: bool = False  # unpack the weight to int8 first, in a kernel of its own


Config = Gemv | Dot


class Gpu(NamedTuple):
    """What configurations depend on."""

    name: str  # as the vendor writes it
    arch: str  # "sm_90", "gfx942"
    processors: int


BUCKETS = (1, 2, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers of tokens that share a configuration

# (largest M, tile), in rising M. The weight is the first operand, so block_n is the side that tensor cores fix (64 or
# 128 rows) and block_m the free one. Where few tokens meet many weights, wide steps (512 features: whole 128-byte lines
# of packed weights) and deep pipelines keep memory busy; a large block_n halves how often the activations are read.
_TILES: dict[str, list[tuple[int, Dot]]] = {
    "sm_90": [
        (16, Dot(128, 16, 512, 8, 4)),  # 80 KB, 114 registers: two programs a processor, 96 KB of weights in flight
        (32, Dot(128, 32, 256, 8, 5)),  # 72 KB: as above with half the step, for the wider activations
        (64, Dot(128, 64, 256, 8, 4)),  # 88 KB, 110 registers: two programs
        (512, Dot(128, 128, 128, 4, 4)),  # 76 KB, 228 registers, 4 warps: one program unpacks, another multiplies
        (4096, Dot(256, 128, 128, 8, 4)),  # 88 KB, 240 registers: one program; L2 reads are what limits, X above all
    ],
    "sm_100": [
        (16, Dot(128, 16, 512, 8, 3)),  # 56 KB; accumulators live in tensor memory
        (64, Dot(128, 64, 256, 8, 3)),  # 64 KB
        (4096, Dot(128, 128, 256, 8, 3)),  # steps of 128 features would convert layouts in the loop
    ],
    "sm_80": [  # and all other NVIDIA GPUs: at most 99 KB of shared memory a program on 8.6, 8.9 and 12.0
        (16, Dot(128, 16, 512, 8, 3)),  # 48 KB, 64 registers
        (64, Dot(128, 64, 256, 8, 3)),  # 48 KB, 128 registers
        (4096, Dot(128, 128, 128, 8, 3)),  # 40 KB, 150 registers
    ],
    "gfx": [  # 64 KB of shared memory, wavefronts of 64
        (16, Dot(64, 16, 512, 4, 2)),  # 124 registers
        (64, Dot(64, 32, 256, 4, 2)),  # 114 registers
        (4096, Dot(128, 128, 128, 8, 2)),  # 96 registers
    ],
}


def family(arch: str) -> str:
    """The key of _TILES for an architecture."""
    if arch.startswith("gfx"):
        return "gfx"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(arch, "sm_80")


def bucket(m: int) -> int:
    """The first of BUCKETS that holds m tokens; the last for all beyond."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def heuristic(gpu: Gpu, m: int, n: int, k: int, planes: int, per_row: bool = False, limbs: int = 1) -> Config:
    """The configuration for m tokens where nothing was tuned; per_row says that each row has a scale.

    limbs: int8 limbs of a token's codes, each with accumulators of its own
    """
    amd = family(gpu.arch) == "gfx"
    # longer rows would not fit registers, nor would two tokens on AMD; with three the integer units fall behind memory
    if limbs * k <= {1: 8192 if amd else 32768, 2: 0 if amd else 8192}.get(m, 0):
        return _gemv(gpu, n, row_bytes(k, planes))
    tiles = _TILES[family(gpu.arch)]
    tile = next((tile for most, tile in tiles if limbs * m <= most), tiles[-1][1])
    tile = tile._replace(block_m=max(16, tile.block_m // limbs))
    if planes == INT8 and tile.block_k > 128:
        tile = tile._replace(block_k=128)  # four times the bytes a feature
    if planes == BASE3 and 16 < limbs * m <= 64:
        tile = tile._replace(block_k=128)  # decoding takes more registers
    elif planes == BASE3 and limbs * m <= 16 and family(gpu.arch) == "sm_80":
        tile = tile._replace(block_n=64)  # with 128 rows Triton 3.8 takes 116 KB of shared memory
    if per_row and limbs * tile.block_n * tile.block_m > 2048 * tile.warps:
        tile = tile._replace(block_n=128, warps=8)  # a division for each output takes registers, too
    return tile._replace(split=_split(gpu, tile, m, n, k))


def _gemv(gpu: Gpu, n: int, size: int) -> Gemv:
    """128 bytes of weights a thread and turn (64 on AMD); turns so that three programs a processor make one wave.

    Each turn spreads the cost of quantizing the token: on sm_90, K = 4096, a weight takes 2.1 instructions with one
    turn, 1.6 with two, 1.3 with four; memory at full speed leaves time for 1.9 on an H200.
    """
    words = max(triton.next_power_of_2(size // 4), 32)
    warps = 8 if words > 512 else 4
    block_n = max(1, min(32, 1024 * warps // words))
    repeat = max(1, min(8, n // (block_n * 3 * gpu.processors)))
    return Gemv(block_n, 1 << repeat.bit_length() - 1, warps)


def _split(gpu: Gpu, tile: Dot, m: int, n: int, k: int) -> int:
    """Parts of K so that each processor has about two programs, all with as many steps; 1 above 64 tokens.

    There the partial sums, 4 bytes for each output and part, would outweigh the weights.
    """
    if m > 64:
        return 1
    tiles, steps = -(-n // tile.block_n) * -(-m // tile.block_m), -(-k // tile.block_k)
    most = max(1, min(2 * gpu.processors // tiles, steps, 16))
    return -(-steps // -(-steps // most))


def group_heuristic(gpu: Gpu, m: int, n: int, k: int, planes: int, size: int, limbs: int = 1) -> Dot:
    """The configuration for m tokens and a weight with a scale for each row and group of `size` features.

    Steps are fixed: a group, or a block of 32 bytes. Programs that share a tile have whole spans of 1024.
    """
    kind = family(gpu.arch)
    stages = 2 if kind == "gfx" else 3 if limbs * size == 512 else 6  # on sm_90 27 KB for groups of 128, at most 49
    # registers decide: four groups a step take many, and so does a whole one of 256 or, on AMD, a pair
    narrow = size == 32 or (kind != "sm_90" and limbs * size == 512) or (kind == "gfx" and size == 64)
    if m <= 16 or narrow:
        tile = Dot(64, 16, size, 4, stages)
    elif m <= 64 or kind == "gfx":
        tile = Dot(64, 32, size, 4, min(stages, 4))
    elif size == 64 or kind != "sm_90":
        tile = Dot(128, 32, size, 8, min(stages, 4))
    else:
        tile = Dot(128, 64, size, 8, min(stages, 4))
    if planes == INT8 and size == 256:
        tile = tile._replace(stages=2)  # four times the bytes
    count, spans = -(-n // tile.block_n) * -(-m // tile.block_m), -(-k // 1024)
    most = max(1, min(4 * gpu.processors // count, spans)) if m <= 64 else 1
    return tile._replace(split=-(-spans // -(-spans // most)))


def float_heuristic(gpu: Gpu, m: int, n: int, k: int, planes: int, size: int = 0, parts: int = 1) -> Dot:
    """The configuration for m tokens of floats; size: features of a group, 0 without; parts: bfloat16s of a float32."""
    kind = family(gpu.arch)
    step = 64 if planes == FOUR_BITS else max(size, 128) if planes != INT8 or not size else size
    if m <= 16 or size == 32 or (kind == "gfx" and size == 256):
        tile = Dot(64, 16, step, 4, 8)  # 48 KB, of which 14 KB are weights in flight
    elif m <= 64 or size == 64:
        tile = Dot(128, 32, step, 8, 3) if kind == "sm_80" else Dot(64, 32, step, 4, 3)
    elif m <= 256 or kind != "sm_90" or size or parts > 1 or planes != TWO_BITS:
        tile = Dot(128, 64 if parts == 1 and (kind != "sm_80" or size) else 32, step, 8, 3)
    else:
        tile = Dot(128, 128, step, 8, 3)  # 108 KB
    if kind == "gfx" or planes == INT8 or (step == 256 and parts > 1):
        tile = tile._replace(stages=2)
    elif step == 256 or parts > 1:
        tile = tile._replace(stages=3)
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    return tile._replace(split=_even(-(-k // tile.block_k), 4 * gpu.processors // tiles if m <= 64 else 1))


def _even(steps: int, most: int) -> int:
    """Parts, at most 16 and `most`, that have as many steps, at least two."""
    most = max(1, min(most, steps // 2, 16))
    return -(-steps // -(-steps // most))


def choose(gpu: Gpu, m: int, n: int, k: int, planes: int, per_row: bool = False, limbs: int = 1) -> Config:
    """The tuned configuration for bucket(m) if there is one, else the heuristic's; with two limbs that at once."""
    m = bucket(m)
    found = tuned(gpu.name).get((m, n, k, planes)) if limbs == 1 else None
    return found or heuristic(gpu, m, n, k, planes, per_row, limbs)


def candidates(gpu: Gpu, m: int, n: int, k: int, planes: int) -> list[Config]:
    """At most 8 configurations worth measuring for m tokens, the heuristic's first."""
    first = heuristic(gpu, m, n, k, planes)
    found: list[Config] = [first]
    if m <= 4 and k <= 32768:
        gemv = _gemv(gpu, n, row_bytes(k, planes))
        found += [gemv._replace(repeat=r) for r in (1, 2, 4, 8)]
        found += [gemv._replace(block_n=max(1, gemv.block_n // 2)), gemv._replace(warps=12 - gemv.warps)]
    tile = first if isinstance(first, Dot) else heuristic(gpu, 4, n, k, planes)
    assert isinstance(tile, Dot)
    if m > 2:
        found += [tile._replace(stages=tile.stages + 1), tile._replace(stages=tile.stages - 1)]
        found += [tile._replace(block_n=128 if tile.block_n == 64 else 64)]
    if 2 < m <= 128:
        found += [tile._replace(split=split) for split in (2 * tile.split, tile.split // 2) if split]
    if m > 64:
        found += [tile._replace(block_m=64 if tile.block_m == 128 else 128), tile._replace(warps=12 - tile.warps)]
    if m > 512 and planes != INT8:
        found += [tile._replace(dense=True), tile._replace(dense=True, block_n=128, block_m=256)]
    return list(dict.fromkeys(found))[:8]


# What `bitnet tune` found


def file() -> Path:
    """Where tuned configurations are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet" / "triton.json"


Key = tuple[int, int, int, int]  # bucket, N, K, planes


def _section(gpu_name: str) -> str:
    return f"{gpu_name}, triton {triton.__version__}"


def _read() -> dict[str, dict[str, list]]:
    try:
        return json.loads(file().read_text())
    except FileNotFoundError:
        return {}


@lru_cache
def tuned(gpu_name: str) -> dict[Key, Config]:
    """What was tuned on such a GPU with this version of Triton; an unreadable file is reported and not used."""
    try:
        section = _read().get(_section(gpu_name), {})
        return {_key(name): _config(*values) for name, values in section.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        warnings.warn(f"{file()} is damaged ({error}); run `bitnet tune` again, or delete it", stacklevel=2)
        return {}


def save(gpu_name: str, found: dict[Key, Config]) -> Path:
    """Add configurations to the file, which appears complete or not at all; returns its path."""
    path = file()
    everything = _read()
    section = everything.setdefault(_section(gpu_name), {})
    section.update({",".join(map(str, key)): [type(c).__name__.lower(), *c] for key, c in found.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(everything, indent=1))
    new.replace(path)
    tuned.cache_clear()
    return path


def _key(name: str) -> Key:
    m, n, k, planes = map(int, name.split(","))
    return m, n, k, planes


def _config(kind: str, *values: int) -> Config:
    return {"gemv": Gemv, "dot": Dot}[kind](*values)


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU a tensor is on."""
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
    return Gpu(properties.name, arch, properties.multi_processor_count)


def tiles(config: Dot, m: int, n: int) -> int:
    """How many tiles of the output there are."""
    return triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)


def workspace_of(config: Dot, m: int, n: int, device: torch.device) -> Tensor | None:
    """int32: the partial sums of all programs, then a counter for each tile; None where nothing is shared."""
    if config.split == 1:
        return None
    size = config.split * config.block_n * config.block_m + 1
    return torch.empty(tiles(config, m, n) * size, dtype=torch.int32, device=device)


def counters_of(config: Dot, workspace: Tensor | None) -> Tensor | None:
    """The counters in a workspace."""
    if workspace is None:
        return None
    size = config.split * config.block_n * config.block_m
    return workspace[workspace.numel() // (size + 1) * size :]
