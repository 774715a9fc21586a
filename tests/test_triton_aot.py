"""The Triton kernels compiled ahead of time for GPUs that are not here: what the compiler made of them.

Triton's wheel brings the assembler and the disassembler, so none of this needs a driver. The configurations are those
that kernels/gpu/configs.py would choose on such a GPU.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitnet.kernels.gpu import configs as configs  # noqa: E402
from bitnet.kernels.gpu import floats, groups, linear, parts, quantize  # noqa: E402
from bitnet.kernels.gpu.layout import BASE3, FOUR_BITS, INT8, TWO_BITS, row_bytes  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
MATRIX = {"sm_80": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_120": "IMMA", "gfx942": "v_mfma_i32_"}
if triton.__version__.startswith(("3.6.", "3.7.")):
    MATRIX["sm_100"] = "IMMA"  # those versions have no int8 products in tensor memory
K, N = 4096, 14336

SLOW = ("sm_80", "sm_100", "sm_120")  # for the time of it: minutes on a slow CPU
each_arch = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch in SLOW else arch for arch in ARCHS]
)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter has replaced the compiler")


class Program(NamedTuple):
    """A kernel's binary, in words."""

    ttgir: str
    assembly: str  # SASS, or AMD's
    usage: dict[str, int]

    def opcodes(self) -> list[str]:
        return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", self.assembly, re.M)

    def loop_conversions(self) -> int:
        """convert_layout operations inside of the loop over K, which is the one that multiplies."""
        loops = re.findall(r"scf\.for.*?^    }", self.ttgir, re.M | re.S)
        found = [loop.count("convert_layout") for loop in loops if "dot" in loop or "mma" in loop]
        assert found
        return sum(found)


def build(
    kernel: Any, arch: str, types: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3
) -> Program:
    """Compile for one GPU. types: of the arguments; those not named are constants, None by default."""
    asm = {"ASM": not arch.startswith("gfx")} if "ASM" in kernel.arg_names else {}
    values = {name: None for name in kernel.arg_names if name not in types} | constants | asm
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    index = kernel.arg_names.index
    aligned = [
        name for name, t in types.items() if t.startswith("*") or name in ("n", "x_stride", "q_stride", "w_stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(index(name),): value for name, value in values.items()},
        attrs={(index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    gfx = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if gfx else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    if gfx:
        text = compiled.asm["amdgcn"]
        usage = {
            name: int(value)
            for name, value in re.findall(r"\.(\w+_spill_count|private_segment_fixed_size):\s*(\d+)", text)
        }
        return Program(compiled.asm["ttgir"], text, usage | {"SHARED": compiled.metadata.shared})
    binary = Path(triton.knobs.cache.dir) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    text = run("-sass", binary)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run("-res-usage", binary))}
    usage["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Program(compiled.asm["ttgir"], text, usage | {"SHARED": compiled.metadata.shared})


def run(option: str, binary: Path) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, binary], capture_output=True, text=True, check=True).stdout


def gpu(arch: str) -> configs.Gpu:
    return configs.Gpu("some GPU", arch, 304 if arch.startswith("gfx") else 132)


def dot(arch: str, m: int, planes: int, n: int = N, k: int = K, **options: Any) -> tuple[Program, configs.Dot]:
    """The matrix kernel as chosen for m tokens, and its configuration."""
    config = configs.heuristic(gpu(arch), m, n, k, planes, options.get("PER_ROW", False), options.get("LIMBS", 1))
    assert isinstance(config, configs.Dot)
    types = {"q": "*i8", "s": "*fp32", "w": "*i8" if planes == INT8 else "*u8", "scale": "*fp32", "y": "*bf16"}
    types |= {"m": "i32", "n": "i32", "q_stride": "i32"} | ({} if planes == INT8 else {"sums": "*i32"})
    if config.split > 1:
        types |= {"partial": "*i32", "counters": "*i32"}
    constants = {"K": k, "PLANES": planes, "BYTES": row_bytes(k, planes), "BLOCK_N": config.block_n}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_B": config.block_k // (1 if planes == INT8 else 4)}
    constants |= {"SPLIT": config.split, "GROUP": 16, "PER_ROW": False, "LIMBS": 1} | options
    return build(linear._dot, arch, types, constants, config.warps, config.stages), config


def gemv(
    arch: str, planes: int, tokens: int = 1, n: int = N, k: int = K, limbs: int = 1, chosen: bool = False
) -> Program:
    """The kernel for one or two tokens as chosen."""
    config = configs.heuristic(gpu(arch), tokens, n, k, planes, False, limbs)
    assert isinstance(config, configs.Gemv)
    types = {"x": "*bf16", "w": "*i32", "scale": "*fp32", "y": "*bf16", "m": "i32", "n": "i32", "x_stride": "i32"}
    types |= {"chosen": "*i64"} if chosen else {}
    size = row_bytes(k, planes)
    constants = {"K": k, "PLANES": planes, "BYTES": size, "TOKENS": tokens, "BLOCK_N": config.block_n}
    constants |= {
        "REPEAT": config.repeat,
        "BLOCK_W": triton.next_power_of_2(size // 4),
        "PER_ROW": False,
        "LIMBS": limbs,
        "SHARE": 8,
    }
    return build(linear._gemv, arch, types, constants, config.warps)


def group_dot(
    arch: str,
    m: int,
    size: int,
    limbs: int = 1,
    planes: int = TWO_BITS,
    n: int = N,
    k: int = K,
    chosen: bool = False,
) -> Program:
    """The kernel for scales of groups as chosen for m tokens."""
    config = configs.group_heuristic(gpu(arch), m, n, k, planes, size, limbs)
    types = {"q": "*i8", "s": "*fp32", "w": "*i8" if planes == INT8 else "*u8", "scale": "*fp16", "y": "*bf16"}
    types |= {"m": "i32", "n": "i32", "q_stride": "i32"} | ({} if planes == INT8 else {"sums": "*i32"})
    if config.split > 1:
        types |= {"partial": "*fp32", "counters": "*i32"}
    constants = {"K": k, "PLANES": planes, "BYTES": row_bytes(k, planes), "SIZE": size, "SPAN": 1024, "LIMBS": limbs}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "SPLIT": config.split, "GROUP": 16}
    types, constants = types | ({"chosen": "*i64"} if chosen else {}), constants | {"EXPERTS": 8}
    return build(groups._group_dot, arch, types, constants, config.warps, config.stages)


def float_dot(
    arch: str, m: int, size: int = 0, dtype: str = "bf16", planes: int = TWO_BITS, chosen: bool = False
) -> Program:
    """The kernel for float activations as chosen for m tokens; of dtype fp32 these are three bfloat16 each."""
    pieces = 3 if dtype == "fp32" else 1
    config = configs.float_heuristic(gpu(arch), m, N, K, planes, size, pieces)
    types = {"x": "*bf16" if pieces > 1 else f"*{dtype}", "w": "*i8" if planes == INT8 else "*u8", "y": f"*{dtype}"}
    types |= {"scale": "*fp16" if size else "*fp32", "m": "i32", "n": "i32", "x_stride": "i32"}
    if config.split > 1:
        types |= {"partial": "*fp32", "counters": "*i32"}
    constants = {"K": K, "PLANES": planes, "BYTES": row_bytes(K, planes), "SIZE": size, "PARTS": pieces, "GROUP": 16}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "SPLIT": config.split, "PER_ROW": True}
    constants["BLOCK_B"] = config.block_k // min(planes, 4)
    types, constants = types | ({"chosen": "*i64"} if chosen else {}), constants | {"SHARE": 8}
    return build(floats._float_dot, arch, types, constants, config.warps, config.stages)


def check(program: Program, arch: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing in local memory, shared memory within the GPU's, and no word from the compiler."""
    usage = dict(program.usage)
    limit = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}[arch] << 10
    assert usage.pop("SHARED") <= limit
    assert usage.pop("REG", 0) <= 255
    assert set(usage.values()) == {0}, usage
    assert capfd.readouterr().err == ""


@each_arch
def test_row_kernels_compile_without_stack(arch: str, capfd: pytest.CaptureFixture[str]) -> None:
    pointers = {"q": "*i8", "s": "*fp32", "sums": "*i32", "counters": "*i32", "x_stride": "i32", "q_stride": "i32"}
    rows = {"K": K, "BLOCK": 4096}
    pointers["m"] = "i32"
    eight, sixteen = {"SIZE": 0, "LIMBS": 1, "TOP": 127.0}, {"SIZE": 128, "LIMBS": 2, "TOP": 32639.0}
    for options in (eight, sixteen):
        constants = {"COUNTERS": 448, **rows, **options}
        check(build(quantize._quantize, arch, {"x": "*bf16", **pointers}, constants), arch, capfd)
    types = {"x": "*fp32", "parts": "*bf16", "m": "i32", "x_stride": "i32", "parts_stride": "i32"}
    check(build(floats._three_bfloat16s, arch, types, {"K": K, "BLOCK": 2048}), arch, capfd)
    types = {"w": "*bf16", "inv": "*fp32", "codes": "*i8", "w_stride": "i32"}
    check(build(quantize._ternary_codes, arch, types, {"PER_ROW": False, **rows}), arch, capfd)
    check(build(quantize._magnitudes, arch, {"w": "*bf16", "sums": "*fp64", "w_stride": "i32"}, rows), arch, capfd)
    check(build(quantize._dequantize, arch, {"q": "*i8", "s": "*fp32", "x": "*bf16"}, rows), arch, capfd)
    for planes in (TWO_BITS, BASE3):
        constants = {"K": K, "PLANES": planes, "BYTES": row_bytes(K, planes), "BLOCK_N": 16, "BLOCK_B": 128}
        check(build(linear._unpack, arch, {"w": "*u8", "codes": "*i8", "n": "i32"}, constants), arch, capfd)


@each_arch
@pytest.mark.parametrize("planes", [TWO_BITS, BASE3, INT8])
def test_gemv_compiles_without_stack_and_with_wide_loads(
    arch: str, planes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    program = gemv(arch, planes)
    check(program, arch, capfd)
    assert ("global_load_dwordx4" if arch.startswith("gfx") else "LDG.E.128") in program.assembly
    if not arch.startswith("gfx"):
        assert "IDP.4A.S8.S8" in program.opcodes()


@each_arch
@pytest.mark.parametrize(
    ("m", "planes"), [(16, TWO_BITS), (64, TWO_BITS), (4096, TWO_BITS), (16, BASE3), (4096, INT8)],
    ids=["16", "64", "4096", "16_base3", "4096_int8"],
)  # fmt: skip
def test_products_run_on_tensor_cores_with_no_conversion_in_the_loop(
    arch: str, m: int, planes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    program, config = dot(arch, m, planes)
    check(program, arch, capfd)
    assert MATRIX[arch] in program.assembly
    assert program.loop_conversions() == 0
    if planes != BASE3:
        assert config.split > 1 if m == 16 else m < 4096 or config.split == 1  # both ways of finishing a tile are here


# (M, size of groups, layout): every tile of group_heuristic and float_heuristic; and all that there are
GROUPS = [(1, 32, TWO_BITS), (1, 128, TWO_BITS), (64, 256, TWO_BITS), (4096, 64, TWO_BITS), (4096, 128, TWO_BITS)]
GROUPS += [(1, 32, FOUR_BITS)]
ALL_GROUPS = [(m, size, TWO_BITS) for m in (1, 64, 4096) for size in (32, 64, 128, 256)]
ALL_GROUPS += [(4096, size, INT8) for size in (32, 64, 128, 256)] + [(m, 32, FOUR_BITS) for m in (1, 64, 4096)]
FLOATS = [(1, 0, TWO_BITS), (64, 128, TWO_BITS), (4096, 0, TWO_BITS), (1, 32, FOUR_BITS)]
ALL_FLOATS = [(m, size, TWO_BITS) for m in (1, 64, 4096) for size in (0, 32, 64, 128, 256)]
ALL_FLOATS += [(m, 0, planes) for m in (1, 64, 4096) for planes in (BASE3, INT8)]
ALL_FLOATS += [(m, 32, FOUR_BITS) for m in (1, 64, 4096)]
FLOAT_MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma_f32_"}

some_groups = [GROUPS, pytest.param(ALL_GROUPS, marks=pytest.mark.slow)]
some_floats = [FLOATS, pytest.param(ALL_FLOATS, marks=pytest.mark.slow)]


@each_arch
@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize("cases", some_groups, ids=["some", "all"])
def test_groups_take_tensor_cores_and_no_stack(
    arch: str, limbs: int, cases: list[tuple[int, int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    for m, size, planes in cases:
        program = group_dot(arch, m, size, limbs, planes)
        check(program, arch, capfd)
        assert MATRIX[arch] in program.assembly
        if arch == "sm_90" and m > 1:  # few tokens store a span's sums within the loop
            assert program.loop_conversions() == 0


@each_arch
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("cases", some_floats, ids=["some", "all"])
def test_floats_take_tensor_cores_and_no_stack(
    arch: str, dtype: str, cases: list[tuple[int, int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    for m, size, planes in cases:
        program = float_dot(arch, m, size, dtype, planes)
        check(program, arch, capfd)
        assert FLOAT_MATRIX[arch] in program.assembly
        if arch == "sm_90" and planes != INT8 and not triton.__version__.startswith("3.6."):
            assert (
                program.loop_conversions() == 0
            )  # 3.6 writes some between two names of one layout, which cost nothing


def test_two_codes_become_floats_in_one_multiplication() -> None:
    """And no conversion, of which a processor does a quarter or an eighth as many."""
    program = float_dot("sm_90", 1)
    weights = 8 * sum("HGMMA" in opcode for opcode in program.opcodes())  # 64 rows x 16 features, held by 128 threads
    assert weights
    assert sum("HFMA2" in opcode for opcode in program.opcodes()) == weights // 2
    program = group_dot("sm_90", 1, 128)
    assert not [
        opcode for opcode in (*program.opcodes(), *float_dot("sm_90", 1).opcodes()) if re.match("I2FP?\\.[FSU]", opcode)
    ]


TIGHT: dict[str, tuple[str, Callable[[str], Program]]] = {
    "a_division_each_output": ("sm_90", lambda arch: dot(arch, 4096, TWO_BITS, 6912, 2560, PER_ROW=True)[0]),
    "base3_at_64_tokens": ("sm_80", lambda arch: dot(arch, 64, BASE3)[0]),
    "long_rows": ("sm_90", lambda arch: gemv(arch, TWO_BITS, 1, 8192, 28672)),
    "two_tokens": ("sm_90", lambda arch: gemv(arch, TWO_BITS, 2, 14336, 8192)),
    "16_bits_of_long_rows": ("sm_90", lambda arch: gemv(arch, TWO_BITS, 1, 4096, 14336, 2)),
    "16_bits_of_base3": ("sm_90", lambda arch: gemv(arch, BASE3, 1, 14336, 4096, 2)),
    "16_bits_of_many_tokens": ("sm_90", lambda arch: dot(arch, 4096, TWO_BITS, PER_ROW=True, LIMBS=2)[0]),
    "16_bits_of_many_tokens_and_base3": ("sm_90", lambda arch: dot(arch, 4096, BASE3, PER_ROW=True, LIMBS=2)[0]),
    "16_bits_of_many_tokens_on_sm_80": ("sm_80", lambda arch: dot(arch, 4096, TWO_BITS, PER_ROW=True, LIMBS=2)[0]),
    "16_bits_of_few_tokens_on_sm_80": ("sm_80", lambda arch: dot(arch, 16, TWO_BITS, PER_ROW=True, LIMBS=2)[0]),
    "16_bits_of_few_tokens": ("sm_90", lambda arch: dot(arch, 16, TWO_BITS, PER_ROW=True, LIMBS=2)[0]),
    "plain_dot_products": ("gfx942", lambda arch: gemv(arch, TWO_BITS, 1, 14336, 8192)),
}


@pytest.mark.parametrize(("arch", "make"), TIGHT.values(), ids=TIGHT.keys())
def test_what_takes_most_registers_has_enough(
    arch: str, make: Callable[[str], Program], capfd: pytest.CaptureFixture[str]
) -> None:
    check(make(arch), arch, capfd)


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (lambda chosen: gemv("sm_90", TWO_BITS, 1, 768, 2048, chosen=chosen), "LDG.E.128"),
        (lambda chosen: float_dot("sm_90", 1, chosen=chosen), "LDGSTS.E.BYPASS.128"),
        pytest.param(
            lambda chosen: group_dot("sm_90", 1, 128, chosen=chosen),
            "LDGSTS.E.BYPASS.128",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gemv", "floats", "groups"],
)
def test_layers_chosen_from_a_stack_are_read_as_a_layer_is(
    make: Callable[[bool], Program], load: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """16 bytes a load, and no spills, though where a layer begins is not known before."""
    plain, chosen = make(False), make(True)
    check(chosen, "sm_90", capfd)
    loads = [sum(load in opcode for opcode in program.opcodes()) for program in (plain, chosen)]
    assert loads[0] == loads[1] > 0


def unpacking(program: Program) -> int:
    """Instructions that take two-bit codes apart: masks with 0x03030303, and shifts by 2, 4 and 6."""
    masks = re.findall(r"LOP3\.LUT [^;]*\b0x3030303\b", program.assembly)
    shifts = re.findall(r"SHF\.R\.[US]32\.HI [^;]*, 0x[246], [^;]*;", program.assembly)
    return len(masks) + len(shifts)


def test_unpacking_costs_less_than_half_an_instruction_a_weight() -> None:
    """Counted in SASS for sm_90, against the multiplications that follow.

    A dp4a multiplies 4 weights of a thread. An IGMMA multiplies 64 rows x 32 features, held by 128 threads: 16 weights
    each. Plain Triton takes 2.5 instructions a weight.
    """
    program = gemv("sm_90", TWO_BITS)
    weights = 4 * program.opcodes().count("IDP.4A.S8.S8")
    assert weights
    assert 0.4 < unpacking(program) / weights <= 0.5
    for m in (16, 64, 4096):
        program, _ = dot("sm_90", m, TWO_BITS)
        weights = 16 * sum("IGMMA" in opcode for opcode in program.opcodes())
        assert weights
        assert 0.4 < unpacking(program) / weights <= 0.5


def test_scales_are_divided_and_rounded_as_ieee_says() -> None:
    """No flushing of subnormal numbers, no approximate division, no fused product and sum, bf16 rounded to nearest."""
    types = {"x": "*bf16", "q": "*i8", "s": "*fp32", "m": "i32", "x_stride": "i32", "q_stride": "i32"}
    for options in ({"LIMBS": 1, "TOP": 127.0}, {"LIMBS": 2, "TOP": 32639.0}):
        source = build_ptx(quantize._quantize, types, {"COUNTERS": 0, "K": K, "BLOCK": 4096, "SIZE": 0, **options})
        assert "div.rn.f32" in source
        assert not re.search(r"\bfma\.|\.ftz|div\.(full|approx)", source)
    types = {"q": "*i8", "s": "*fp32", "sums": "*i32", "w": "*u8", "scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    types |= {"m": "i32", "n": "i32", "q_stride": "i32"}
    constants = {"K": K, "PLANES": 4, "BYTES": K // 4, "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_B": 64, "SPLIT": 1}
    source = build_ptx(linear._dot, types, {**constants, "GROUP": 16, "PER_ROW": True, "LIMBS": 1, "ASM": True})
    sources = [source]
    types["scale"] = "*fp16"
    del constants["BLOCK_B"]
    for size, limbs in [(128, 1), (256, 2)]:
        options = {"SIZE": size, "SPAN": 1024, "LIMBS": limbs, "GROUP": 16, "ASM": True}
        sources.append(build_ptx(groups._group_dot, types, constants | options))
    for source in sources:
        assert "div.rn.f32" in source
        assert "cvt.rn.bf16" in source
        assert not re.search(r"\bfma\.|\.ftz|div\.(full|approx)", source)


def build_ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    values = {name: None for name in kernel.arg_names if name not in types} | constants
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]


@pytest.mark.parametrize("kernel", ["integers", "groups", "floats"])
def test_partial_sums_are_written_before_they_are_counted_and_read_after(kernel: str) -> None:
    """The last program of a tile may only add up what all threads of the others have stored."""
    types = {"q": "*i8", "s": "*fp32", "sums": "*i32", "w": "*u8", "scale": "*fp32", "y": "*bf16", "partial": "*i32"}
    types |= {"counters": "*i32", "m": "i32", "n": "i32", "q_stride": "i32"}
    constants = {"K": K, "PLANES": 4, "BYTES": K // 4, "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_B": 64, "SPLIT": 4}
    constants |= {"GROUP": 16, "ASM": True}
    if kernel == "integers":
        source = build_ptx(linear._dot, types, constants | {"PER_ROW": False, "LIMBS": 1})
    elif kernel == "groups":
        del constants["BLOCK_B"]
        types |= {"scale": "*fp16", "partial": "*fp32"}
        source = build_ptx(groups._group_dot, types, constants | {"SIZE": 128, "SPAN": 1024, "LIMBS": 1})
    else:
        types = {"x": "*bf16", "w": "*u8", "scale": "*fp32", "y": "*bf16", "partial": "*fp32", "counters": "*i32"}
        types |= {"m": "i32", "n": "i32", "x_stride": "i32"}
        source = build_ptx(floats._float_dot, types, constants | {"PER_ROW": False, "SIZE": 0, "PARTS": 1})
    pattern = r"st\.global|bar\.sync|atom\.\S+|ld\.global\.cg"
    order = [re.sub(r"atom.*acq_rel.*", "count", found.group()) for found in re.finditer(pattern, source)]
    count = order.index("count")
    assert "st.global" in order[:count]
    assert order[count - 1] == "bar.sync"
    assert order[count + 1] == "bar.sync"  # the count reaches all threads
    assert "ld.global.cg" in order[count:]
    assert "ld.global.cg" not in order[:count]


# The assembly strings, run by a PTX machine of a few lines


def execute(source: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run an assembly string on arrays of 32-bit registers, uint32. Results of fma are float32 pairs [..., 2]."""
    registers: dict[str, np.ndarray] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0) & 0xFFFFFFFF)

    for line in source.replace("{", "").replace("}", "").split(";"):
        opcode, _, operands = line.strip().partition(" ")
        names = [name.strip() for name in operands.split(",")]
        if opcode in ("", ".reg"):
            continue
        a, *rest = (value(name) for name in names[1:])
        if opcode == "and.b32":
            result = a & rest[0]
        elif opcode == "shr.u32":
            result = a >> rest[0]
        elif opcode == "mov.b32":
            result = a
        elif opcode == "mul.lo.u32":
            result = a * rest[0]
        elif opcode == "mad.lo.s32":
            result = a * rest[0] + rest[1]
        elif opcode == "prmt.b32":
            pool = [a >> 8 * i & 255 for i in range(4)] + [rest[0] >> 8 * i & 255 for i in range(4)]
            result = sum((pool[int(rest[1]) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)), np.uint32(0))
        elif opcode == "dp4a.s32.s32":
            products = [signed(a, i) * signed(rest[0], i) for i in range(4)]
            result = (sum(products) + rest[1].view(np.int32)).astype(np.int32).view(np.uint32)
        elif opcode == "lop3.b32":
            assert int(names[4], 0) == 0xEA
            result = a & rest[0] | rest[1]
        elif opcode.startswith("fma.rn."):
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[opcode]
            x, y, z = (halves(np.broadcast_to(t, registers["low"].shape), dtype) for t in (a, *rest[:2]))
            exact = x.double() * y.double() + z.double()
            assert torch.equal(exact.to(dtype).double(), exact)  # so that one rounding, or two, are none
            registers[names[0]] = exact.numpy()
            continue
        else:
            raise AssertionError(f"no such instruction here: {opcode}")
        registers[names[0]] = np.asarray(result, dtype=np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The two floats in each register: [..., 2]."""
    return torch.from_numpy(words[..., None].copy().view(np.int16)).view(dtype)


def signed(word: np.ndarray, i: int) -> np.ndarray:
    return (word >> 8 * i & 255).astype(np.uint8).view(np.int8).astype(np.int64)


def words() -> np.ndarray:
    """Every byte in every place of a word, beside random others."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (4, 256, 4), dtype=np.uint8)
    for place in range(4):
        found[place, :, place] = np.arange(256)
    return found.reshape(-1, 4)


@pytest.mark.parametrize("planes", [FOUR_BITS, TWO_BITS, BASE3])
def test_assembly_unpacks_like_the_plain_path(planes: int) -> None:
    packed = words()
    source = {FOUR_BITS: parts._FOUR_BITS, TWO_BITS: parts._TWO_BITS, BASE3: parts._BASE3}[planes]
    found = [
        word.view(np.uint8).reshape(-1, 4) for word in execute(source.value, [packed.view(np.uint32)[:, 0]], planes)
    ]
    wide = packed.astype(np.int64)
    if planes == FOUR_BITS:
        expected = [wide & 15, wide >> 4]
    elif planes == TWO_BITS:
        expected = [wide >> 2 * p & 3 for p in range(4)]
    else:
        expected = [(wide * 3 ** (p + 1) >> 8) - 3 * (wide * 3**p >> 8) for p in range(5)]
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("source", [parts._TWO_BITS_AS_BFLOAT16, parts._TWO_BITS_AS_FLOAT16], ids=["bf16", "fp16"])
def test_assembly_makes_codes_floats(source: triton.language.constexpr) -> None:
    packed = words()
    found = execute(source.value, [packed.view(np.uint32)[:, 0]], 8)
    for plane in range(4):
        codes = np.concatenate(found[2 * plane : 2 * plane + 2], axis=1)
        fields = packed >> 2 * plane & 3
        assert (codes[fields < 3] == fields[fields < 3].astype(int) - 1).all()  # 3 is no code


def test_assembly_adds_four_signed_products() -> None:
    a, b = words(), words()[::-1].copy()
    acc = np.arange(len(a), dtype=np.int32) - 500
    found = execute(parts._DOT4.value, [a.view(np.uint32)[:, 0], b.view(np.uint32)[:, 0], acc.view(np.uint32)], 1)[0]
    assert (found.view(np.int32) == acc + (a.view(np.int8).astype(int) * b.view(np.int8).astype(int)).sum(1)).all()


# Configurations


@each_arch
def test_every_shape_has_a_configuration_that_fits(arch: str) -> None:
    """Pipelines within the GPU's shared memory, by the bytes of their tiles; at most 8 candidates, all different."""
    limit = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}[arch] << 10
    for m in configs.BUCKETS:
        for n, k in [(1, 1), (30, 130), (2560, 2560), (1024, 4096), (4096, 14336), (28672, 8192), (64, 300000)]:
            for planes in (TWO_BITS, BASE3, INT8):
                config = configs.heuristic(gpu(arch), m, n, k, planes)
                if isinstance(config, configs.Dot):
                    size = (
                        config.block_n * config.block_k // (1 if planes == INT8 else 4)
                        + config.block_m * config.block_k
                    )
                    assert size * (config.stages - 1) <= limit
                else:
                    assert k <= 32768
                chosen = [configs.heuristic(gpu(arch), m, n, k, planes, True, 2)]
                chosen += [configs.float_heuristic(gpu(arch), m, n, k, planes, 0, pieces) for pieces in (1, 3)]
                for size in (32, 64, 128, 256):
                    if planes != BASE3 and k > size:
                        chosen += [configs.group_heuristic(gpu(arch), m, n, k, planes, size, x) for x in (1, 2)]
                        chosen += [configs.float_heuristic(gpu(arch), m, n, k, planes, size, x) for x in (1, 3)]
                assert all(one.split <= -(-k // 128) for one in chosen if isinstance(one, configs.Dot))
                found = configs.candidates(gpu(arch), m, n, k, planes)
                assert found[0] == config
                assert len(found) == len(set(found)) <= 8


def test_tuned_configurations_are_kept_per_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.tuned.cache_clear()
    mine, other = gpu("sm_90"), configs.Gpu("another GPU", "sm_90", 132)
    best = configs.Dot(64, 16, 256, 4, 3, split=4)
    assert configs.save(mine.name, {(16, N, K, TWO_BITS): best}) == tmp_path / "bitnet" / "triton.json"
    configs.save(mine.name, {(1, N, K, TWO_BITS): configs.Gemv(8, 2, 4)})
    assert configs.choose(mine, 9, N, K, TWO_BITS) == best  # 9 tokens are in the bucket of 16
    assert configs.choose(mine, 1, N, K, TWO_BITS) == configs.Gemv(8, 2, 4)
    assert configs.choose(mine, 17, N, K, TWO_BITS) == configs.heuristic(mine, 32, N, K, TWO_BITS)
    assert configs.choose(other, 9, N, K, TWO_BITS) == configs.heuristic(other, 16, N, K, TWO_BITS)
    configs.tuned.cache_clear()
    monkeypatch.setattr(triton, "__version__", "0")
    assert configs.choose(mine, 9, N, K, TWO_BITS) == configs.heuristic(mine, 16, N, K, TWO_BITS)
    configs.tuned.cache_clear()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"some GPU, triton V": {"1,2": ["dot", 1]}}', '{"some GPU, triton V": 3}']
)
def test_a_damaged_cache_is_reported_and_not_used(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bitnet").mkdir()
    (tmp_path / "bitnet" / "triton.json").write_text(text.replace("V", triton.__version__))
    configs.tuned.cache_clear()
    with pytest.warns(UserWarning, match="is damaged.*bitnet tune"):
        assert configs.choose(gpu("sm_90"), 16, N, K, TWO_BITS) == configs.heuristic(gpu("sm_90"), 16, N, K, TWO_BITS)
    configs.tuned.cache_clear()


def test_importing_the_package_imports_no_kernel() -> None:
    """The first layer that runs on a GPU does; before that, Triton is not needed and its import not waited for."""
    code = "import bitnet.packed, sys; print(sorted(m for m in sys.modules if m.startswith('bitnet.kernels.gpu.')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "['bitnet.kernels.gpu.backend', 'bitnet.kernels.gpu.layout']"
