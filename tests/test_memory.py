"""What of a loaded model is in memory: the backend's own layout, and not the files' bytes beside it."""

import copy
import ctypes
import mmap
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitnet
from bitnet.kernels import backends, layout, ops
from bitnet.kernels.cpu import library, linear, pages
from bitnet.packed import PackedBitLinear, PackedEmbedding

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/pagemap").exists(), reason="reads what Linux says of pages"
)
native = pytest.mark.skipif(isinstance(library.load(), str), reason="there is no native library")
PAGE = mmap.PAGESIZE
SIZES = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 4096}


def mapped(file: Path, size: int, offset: int = 0) -> Tensor:
    """Bytes of a file, mapped as a checkpoint's are."""
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (size,))


def resident(file: Path) -> int:
    """Bytes of a file's mappings that are in this process's memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            counts = words[-1] == str(file)
        elif counts and words[0] == "Rss:":
            total += 1024 * int(words[1])
    return total


def in_memory() -> int:
    """Bytes of this process."""
    return PAGE * int(Path("/proc/self/statm").read_text().split()[1])


def present(tensor: Tensor, start: int | None = None) -> int:
    """How many pages of a tensor are in memory, or of what lies from `start` on to its end."""
    first, last = (start or tensor.data_ptr()) // PAGE, (tensor.data_ptr() + tensor.nbytes) // PAGE
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(8 * first)
        return sum(byte >> 7 for byte in table.read(8 * (last - first))[7::8])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(torch.randint(256, (1 << 20,), dtype=torch.uint8).numpy().tobytes())
    return path


def test_what_was_only_read_leaves_memory_and_is_still_there(file: Path) -> None:
    expected = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    for offset in (0, 1000):
        tensor = mapped(file, (1 << 20) - offset, offset)
        assert tensor.equal(expected[offset:])
        assert resident(file) >= 1 << 20
        assert pages.drop(tensor) == (1 << 20) - (PAGE if offset else 0)
        assert resident(file) <= 2 * PAGE
        assert tensor.equal(expected[offset:])


def test_what_was_written_stays() -> None:
    """Fails if changes are thrown away with the pages that hold them."""
    for tensor in (torch.ones(1 << 20), torch.ones(5), torch.ones(0)):
        before = tensor.clone()
        assert pages.drop(tensor) == 0
        assert tensor.equal(before)


def test_one_written_byte_of_a_mapped_file_stays(file: Path) -> None:
    tensor = mapped(file, 1 << 20)
    value = int(tensor[70_000])
    tensor[70_000] = 255 - value
    assert pages.drop(tensor) == 0
    assert tensor[70_000] == 255 - value
    assert pages.drop(tensor[1 << 19 :]) == 1 << 19


def test_what_was_freed_leaves_memory() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("another C library than glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    blocks = [libc.malloc(1 << 16) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 16)
    top = libc.malloc(1 << 16)  # without it free would give all back
    before = in_memory()
    for block in blocks:
        libc.free(block)
    pages.trim()
    assert in_memory() < before - (48 << 20)
    libc.free(top)


@native
@pytest.mark.parametrize(("kind", "k"), [("int8", 256), ("int4", 512), ("int4", 500)])
def test_a_stored_head_is_never_in_memory_whole_while_it_is_prepacked(
    kind: str, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 32776  # no multiple of 32
    codes = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    stored = layout.pack_codes(codes, kind)
    (tmp_path / "head").write_bytes(stored.numpy().tobytes())
    head = mapped(tmp_path / "head", stored.nbytes).view(stored.dtype).view(stored.shape)
    counts: list[int] = []
    drop = pages.drop

    def watching(piece: Tensor) -> int:
        counts.append(present(head))
        return drop(piece)

    monkeypatch.setattr(pages, "drop", watching)
    monkeypatch.setattr(linear, "_PIECE", 1 << 21)
    weight = linear.prepack(head, n, k=k)
    assert linear.unprepack(weight, n, k).equal(codes)
    assert len(counts) == 5
    assert max(counts) * PAGE <= 2 * (2 << 20)  # of 8 MB; Linux maps up to 2 at a touch


def checkpoint(folder: Path, **options: Any) -> Path:
    """Of a packed model whose head is float."""
    model = llama(**SIZES | options).bfloat16()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    return bitnet.save(model, folder)


@native
@pytest.mark.parametrize("load", [bitnet.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def test_stored_bytes_are_not_in_memory_beside_the_prepacked_and_come_back_whole(load: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    model(torch.tensor([[1, 2]]))
    layers = [module for module in model.modules() if isinstance(module, PackedBitLinear)]
    assert max(layer.weight.nbytes for layer in layers) == 1 << 18
    # Linux maps 64 kB at a touch, here at both ends
    assert max(present(layer.weight) for layer in layers) * PAGE <= 1 << 17
    bitnet.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == stored.keys()
    assert all(again[key].equal(stored[key]) for key in stored)


@native
@pytest.mark.parametrize(("head", "tied"), [("int8", True), ("int4", False), ("ternary", True)])
def test_a_head_packed_by_load_is_that_of_pack_and_its_float_rows_leave_memory(
    head: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model", tie_word_embeddings=tied, vocab_size=16384)
    ids = torch.tensor([[5, 17, 3000]])
    expected = bitnet.load(folder)
    bitnet.pack(expected, head=head)
    starts: list[int] = []
    counts: list[int] = []  # of the float head's pages that are in memory, block after block
    drop = pages.drop

    def watching(rows: Tensor) -> int:
        if rows.is_floating_point():
            starts.append(rows.data_ptr())
            counts.append(present(rows, starts[0]))
        return drop(rows)

    monkeypatch.setattr(pages, "drop", watching)
    model = bitnet.load(folder, head=head)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert isinstance(model.lm_head, PackedBitLinear)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == tied
    state, same = model.state_dict(), expected.state_dict()
    assert state.keys() == same.keys()
    assert all(state[key].equal(same[key]) for key in same)
    assert len(counts) == 4
    assert 0 < max(counts) <= 2 * (2 << 20) // PAGE  # of four blocks of 2 MB


def held(model: Any) -> int:
    """Bytes of all that a model's modules hold."""
    tensors = [t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())]
    tensors += [m._prepacked.weight for m in model.modules() if isinstance(m, PackedBitLinear) and m._prepacked]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors if tensor is not None}.values())


LOOKS = {
    "read": lambda model: model.lm_head.weight,
    "codes": lambda model: model.lm_head.codes(),
    "saved": lambda model: model.state_dict(),
    "copied": copy.deepcopy,
    "pickled": pickle.dumps,
    "moved": lambda model: model.to("cpu"),
    "on another backend": lambda model: model.lm_head.set_backend("torch"),
    "loaded": lambda model: model.load_state_dict(bitnet.load(model.folder, head=model.kind).state_dict()),
}


@native
@pytest.mark.parametrize(("head", "tied"), [("int8", True), ("int8", False), ("int4", True), ("ternary", True)])
@pytest.mark.parametrize("look", LOOKS)
def test_a_head_packed_by_load_is_in_memory_once_until_it_is_looked_at(
    head: str, tied: bool, look: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model", tie_word_embeddings=tied, vocab_size=5003)
    ids = torch.tensor([[5, 17, 3000, 0, 5002], [31, 32, 5002, 5002, 4999]])
    expected = bitnet.load(folder)
    bitnet.pack(expected, head=head)
    with torch.no_grad():
        logits = expected(ids).logits
    model = bitnet.load(folder, head=head)
    stored = expected.lm_head.weight
    assert held(model) <= held(expected) - stored.nbytes
    assert torch.equal(model(ids).logits, logits)
    assert held(model) <= held(expected) - stored.nbytes
    model.folder, model.kind = folder, head
    LOOKS[look](model)
    assert model.lm_head.weight.equal(stored)
    if tied:
        assert model.get_input_embeddings().weight is model.lm_head.weight
    assert torch.equal(model(ids).logits, logits)


@native
def test_what_is_written_to_a_head_after_it_was_let_go_is_seen(tmp_path: Path) -> None:
    """By the embedding tied to it, too."""
    model = bitnet.load(checkpoint(tmp_path / "model", tie_word_embeddings=True), head="int8")
    ids = torch.tensor([[5, 17]])
    before, prepacked = model(ids).logits, model.lm_head.prepack()[0]
    model.lm_head.weight  # noqa: B018  only looked at
    assert model.lm_head.prepack()[0] is prepacked
    model.lm_head.weight[5] = 0
    embedding = model.get_input_embeddings()
    assert embedding(ids)[0, 0].eq(0).all()
    after = model(ids).logits
    assert after[..., 5].eq(0).all()
    assert not torch.equal(after, before)


@native
def test_rows_of_a_head_that_there_are_not_are_refused(tmp_path: Path) -> None:
    model = bitnet.load(checkpoint(tmp_path / "model", tie_word_embeddings=True), head="int8")
    for bad in (-1, 4096):
        with pytest.raises(IndexError):
            model.get_input_embeddings()(torch.tensor([bad]))


def test_a_packed_head_is_not_packed_again(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    bitnet.save(bitnet.load(folder, head="int8"), tmp_path / "packed")
    with pytest.raises(ValueError, match="output head that is still float, but found PackedBitLinear"):
        bitnet.load(tmp_path / "packed", head="int8")


@native
def test_every_layer_and_the_head_are_prepacked_once_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model")
    name = backends.choose_backend("auto", torch.device("cpu"))
    backend, calls = backends.BACKENDS[name], []
    monkeypatch.setitem(
        backends.BACKENDS,
        name,
        backend._replace(prepack=lambda packed, n, k: calls.append(n) or backend.prepack(packed, n, k)),
    )
    model = bitnet.load(folder, head="int8")
    layers = sum(isinstance(module, PackedBitLinear) for module in model.modules())
    assert len(calls) + 1 == layers == 15  # the head was quantized to that form
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)
    assert len(calls) + 1 == layers


@native
def test_a_weight_that_is_prepacked_next_is_not_read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepacking checks it."""
    folder = checkpoint(tmp_path / "model")
    monkeypatch.setattr(PackedBitLinear, "check", lambda layer: pytest.fail("read twice"))
    monkeypatch.setattr(layout, "validate_packed", lambda packed: pytest.fail("read twice"))
    monkeypatch.setattr(ops, "validate_packed", lambda packed: pytest.fail("read twice"))
    bitnet.load(folder)
