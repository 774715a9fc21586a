"""Backends are proved before "auto" trusts them, and the fastest exact product is found."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bitnet
from bitnet import BitLinear, PackedBitLinear
from bitnet.kernels import backends, ops, products, proof, reference
from bitnet.kernels.cpu import latent as cpu_latent
from bitnet.kernels.cpu import library as cpu_library
from bitnet.kernels.cpu import linear as cpu_linear

CPU = torch.device("cpu")
NATIVE = cpu_library.missing(CPU) is None
needs_native = pytest.mark.skipif(not NATIVE, reason=str(cpu_library.missing(CPU)))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Verdicts are for the process; here each test has its own."""
    forget()
    yield
    forget()


def forget() -> None:
    backends._FAULTS.clear()
    backends._choose.cache_clear()
    backends._say_once.cache_clear()


def off_by_one(tokens: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bind whose functions are wrong in one output of one number of tokens."""

    def of(bind: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any, **options: Any) -> Callable[[Tensor], Tensor]:
            run = bind(*args, **options)

            def call(x: Tensor) -> Tensor:
                y = run(x)
                if len(x) == tokens:
                    y[-1, 13] += 1
                return y

            return call

        return wrong

    return of


@needs_native
@pytest.mark.parametrize("m", [1, 2, 5, 67])
def test_a_kernel_that_is_wrong_in_one_output_is_not_used(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if any of the kernels of one, few or many tokens goes without proof."""
    isa = cpu_library.isas()[0]
    monkeypatch.setitem(
        backends.BACKENDS, "cpu", backends.BACKENDS["cpu"]._replace(bind=off_by_one(m)(backends.BACKENDS["cpu"].bind))
    )
    said = rf"backend 'cpu' is not used: its results are wrong .* \({isa}\): ternary weights with .* times {m} "
    with pytest.warns(UserWarning, match=said + rf".*: 1 of {m * proof.N} values differ .* at \[{m - 1}, 13\]"):
        assert backends.choose_backend("auto", CPU) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert backends.choose_backend("auto", CPU, 4) == "torch"
        assert PackedBitLinear(8, 4).prepack()[1] == "torch"
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run on cpu: its results are wrong .*{isa}.*; choose"):
        PackedBitLinear(8, 4, backend="cpu").prepack()
    rows = {row.name: row for row in bitnet.backends()}
    assert not rows["cpu"].ready
    assert "its results are wrong on this hardware" in rows["cpu"].detail


@needs_native
@pytest.mark.parametrize("name", ["ternary_codes", "pack_ternary", "magnitudes", "quantize_tokens", "codes_linear"])
def test_training_does_without_native_kernels_of_which_one_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one of the kernels that training uses goes without proof."""
    module = cpu_linear if hasattr(cpu_linear, name) else cpu_latent
    right = getattr(module, name)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        first = result[0] if isinstance(result, tuple) else result
        first[-1] += 1
        return result

    monkeypatch.setattr(module, name, wrong)
    layer, x = BitLinear(40, 6), torch.randn(3, 40)
    with pytest.warns(UserWarning, match="backend 'cpu' is not used"):
        y = layer(x)
    codes, scale = reference.quantize_weight(layer.weight)
    assert torch.equal(y, reference.ternary_linear(x, codes, scale, layer.bias))


@needs_native
def test_a_kernel_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*args: Any) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cpu"]._replace(bind=bind))
    with pytest.warns(UserWarning, match="after the first case: RuntimeError: no such instruction. Please report it"):
        assert backends.choose_backend("auto", CPU) == "torch"


@pytest.mark.parametrize("fails", [False, True])
def test_the_proof_takes_one_thread_and_leaves_their_number(fails: bool) -> None:
    """Where another process has a core, two threads took 7 seconds for it, most of them waiting, instead of 0.06."""
    seen: list[int] = []

    def results(device: torch.device) -> proof.Results:
        seen.append(torch.get_num_threads())
        yield "one case", torch.ones(1), torch.ones(1)
        if fails:
            raise RuntimeError("no kernel")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert (proof.fault(results, torch.device("cpu")) is not None) == fails
        assert seen == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@needs_native
def test_the_proof_runs_once_and_is_not_seen_by_what_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a first call inside an export leaves the proof in the graph, or in the program's random numbers."""
    proved: list[str] = []
    prove = backends._prove
    monkeypatch.setattr(backends, "_prove", lambda name, *args: proved.append(name) or prove(name, *args))
    layer, x = PackedBitLinear(40, 6), torch.randn(2, 40)
    before = torch.random.get_rng_state()
    exported = torch.export.export(layer, (x,))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert proved == ["cpu"]
    assert len([node for node in exported.graph.nodes if node.op == "call_function"]) < 10
    with torch.inference_mode(), torch.device("meta"):
        forget()
        assert backends.choose_backend("auto", CPU) == "cpu"


@needs_native
def test_where_kernels_have_to_be_compiled_those_asked_for_are_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[Any] = []
    layers, native = proof.layers, backends.BACKENDS["cpu"]

    def noted(*args: Any) -> Any:
        proved.append(args[3:5])
        return layers(*args)

    def training(device: torch.device) -> proof.Results:
        proved.append("training")
        yield from native.others(device)

    monkeypatch.setattr(proof, "layers", noted)
    for compiles, expected in (
        (True, [((False,), (8,)), ((True,), (16,)), "training"]),
        (False, [((False, True), (8, 16)), "training"]),
    ):
        forget()
        proved.clear()
        monkeypatch.setitem(backends.BACKENDS, "cpu", native._replace(others=training, compiles=compiles))
        for asked in ({}, {"activation_bits": 4}, {"activation_bits": 16, "groups": True}, {"trains": True}):
            for name in ("auto", "cpu"):
                assert backends.choose_backend(name, CPU, **asked) == "cpu"
        assert proved == expected
    monkeypatch.setitem(backends.BACKENDS, "cpu", native._replace(bind=off_by_one(2)(native.bind), compiles=True))
    forget()
    with pytest.warns(UserWarning, match="backend 'cpu' is not used"):
        assert backends.choose_backend("auto", CPU, groups=True) == "torch"
    assert backends.choose_backend("auto", CPU, trains=True) == "cpu"


# Products


@pytest.mark.parametrize("way", ["native", "int8", "float32"])
@pytest.mark.parametrize("eight_bits", [False, True], ids=["ternary", "int8"])
def test_every_way_to_a_product_gives_the_definitions_bits(
    way: str, eight_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "native" and not NATIVE:
        pytest.skip(str(cpu_library.missing(CPU)))
    if way == "int8" and not products._int8_is_exact():
        pytest.skip("torch._int_mm is not exact on this machine")
    monkeypatch.setattr(products, "fastest", lambda m, native: way if native or way != "native" else "float32")
    top = 128 if eight_bits else 2
    for m, n, k in [(1, 1, 1), (1, 33, 70), (3, 5, 7), (17, 66, 1), (40, 35, 1500), (0, 4, 8)]:
        q, codes = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(1 - top, top, (n, k)).char()
        s, scale = torch.rand(m, 1) + 0.5, torch.rand(n)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            y = products.linear(q, s, codes, scale, torch.ones(n), dtype, eight_bits, native=NATIVE)
            expected = reference.rescale(reference.int_matmul(q, codes), s, scale, torch.ones(n), dtype)
            assert y.dtype == dtype
            assert torch.equal(y, expected), (m, n, k, dtype)


def test_the_fastest_way_is_measured_once_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a slow product is taken because its name sounds fast, or if every step measures anew."""
    products._rates.cache_clear()
    times = iter([1.0, 3.0, 2.0])  # of float32, int8, native
    monkeypatch.setattr(products, "_seconds", lambda run: next(times))
    monkeypatch.setattr(products, "_int8_is_exact", lambda: True)
    assert list(products.rates(64, native=NATIVE)) == (["float32", "native", "int8"] if NATIVE else ["float32", "int8"])
    assert products.fastest(1000, native=NATIVE) == "float32"
    products._rates.cache_clear()


def test_a_product_of_torch_that_saturates_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if oneDNN's AVX2 kernel, whose sums of two products saturate at 16 bits, is trusted because it is fast."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        pairs = (a.int() + 128)[:, None, ::2] * b.int()[None, :, ::2] + (a.int() + 128)[:, None, 1::2] * b[
            :, 1::2
        ].int()
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * b.int().sum(1)

    a, b = torch.randint(-9, 9, (3, 64)).char(), torch.randint(-1, 2, (5, 64)).char()
    assert torch.equal(saturating(a, b).int(), reference.int_matmul(a, b)), "right for small codes"
    caches = (products._rates, products._int8_is_exact)
    for cache in caches:
        cache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(products, "_by_int8", lambda a, b: saturating(a, b).int())
        assert "int8" not in products.rates(64, native=False)
    for cache in caches:
        cache.cache_clear()


@needs_native
def test_a_training_step_multiplies_by_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_by_native", "_by_int8"):
        right = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, name=name, right=right: calls.append(name) or right(*args))
    layer, x = BitLinear(40, 24), torch.randn(3, 40, requires_grad=True)
    for way in ("native", "int8", "float32"):
        monkeypatch.setattr(products, "fastest", lambda m, native, way=way: way)
        layer(x).sum().backward()
    assert calls == ["_by_native", "_by_int8"]


def test_a_compiled_step_multiplies_by_the_fastest_way_too() -> None:
    """Fails if a graph holds the product that torch happens to have."""
    targets: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        targets.update(str(node.target) for part in parts for node in part.graph.nodes)
        return graph

    layer, x = BitLinear(40, 24), torch.randn(3, 40)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()
    assert "bitnet.cpu_int_linear" in targets


def test_the_product_of_codes_agrees_with_its_fake() -> None:
    q, s = ops.quantize_activation(torch.randn(3, 40))
    codes = torch.randint(-1, 2, (6, 40), dtype=torch.int8)
    for bias in (None, torch.ones(6)):
        args = (q, s, codes, torch.ones(1), bias, torch.bfloat16, False)
        torch.library.opcheck(torch.ops.bitnet.cpu_int_linear, args)
