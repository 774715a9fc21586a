"""A packed output head, made on the way from disk to disk: pack(head=...), a few rows at a time."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from bitnet.kernels import layout
from bitnet.kernels.ops import all_finite
from bitnet.linear import BitLinear
from bitnet.packed import PackedEmbedding, packed_zeros
from bitnet.packing import quantize_matrix, to_packed

from ..files.safetensors import DTYPES
from ..hub.values import stored_scale
from ..source import Source
from ..swap.pack import find_head, head_spec
from .jobs import Job, Output

ROWS = 1 << 20  # values that are rounded at once, about


def pack_head(model: nn.Module, kind: str) -> None:
    """Give a model on the meta device the layers that pack(head=kind) makes. Raises ValueError where it would."""
    _, linear, embedding = find_head(model, kind)
    spec = head_spec(model, kind)
    head = BitLinear.from_linear(linear, spec)
    if embedding is not None:
        PackedEmbedding.from_embedding(embedding, spec)
    to_packed(head)


def head_job(source: Source, kind: str, weight_bits: float) -> tuple[str, Job]:
    """The key of the head's weight in the source, and the job that writes it packed, with its scales.

    weight_bits: of a weight in the files
    """
    name, _, embedding = find_head(source.model, kind)
    spec = head_spec(source.model, kind)
    dense = layout.dense(weight_bits, spec.weights)
    homes = [name] if embedding is None else [module_name(source.model, embedding), name]
    stored = source.stored()
    key = next((f"{home}.weight" for home in homes if f"{home}.weight" in stored), None)
    if key is None or not DTYPES[stored[key][0]].is_floating_point:
        raise ValueError(f"convert: {source.path} has no float output head that could become {kind}")
    rows, width = stored[key][1]
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    weight, scale = packed_zeros(width, rows, spec, "meta")
    shape = (rows, -(-width // dense.per_byte)) if dense else tuple(weight.shape)
    outputs = [Output(source.file_key(f"{homes[0]}.weight"), spelled[weight.dtype], shape)]
    like = spelled[scale.dtype], tuple(scale.shape)
    outputs += [Output(source.file_key(f"{home}.weight_scale"), *like) for home in homes]
    whole = spec.weights == "ternary" and not dense  # rows far from each other share bytes

    def run() -> list[Iterable[Tensor]]:
        found: list[Tensor] = []  # known once the codes have been made, which are written first

        def quantized() -> Iterator[Tensor]:
            stored, at = packed_zeros(width, rows, spec, "cpu")[0] if whole else None, 0
            for block in blocks(source.pieces(key), width):
                if not all_finite(block):
                    raise ValueError(f"{key}: the output head holds NaN or Inf")
                codes, scale = quantize_matrix(block, spec)
                found.append(stored_scale(scale))
                if stored is None:
                    yield dense.pack(codes) if dense else layout.pack_codes(codes, spec.weights)
                else:
                    layout.put_rows(stored, at, codes)
                    at += len(codes)
            if stored is not None:
                yield stored

        return [quantized(), *((part for part in found) for _ in homes)]

    return key, Job(key, outputs, source.nbytes(key), 12 * ROWS + whole * weight.nbytes, run)


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Its name in the model."""
    return next(name for name, each in model.named_modules() if each is module)


def blocks(pieces: Iterable[Tensor], width: int) -> Iterator[Tensor]:
    """Flat pieces of a matrix as blocks of whole rows."""
    rest: list[Tensor] = []
    held = 0
    for piece in pieces:
        rest.append(piece.reshape(-1))
        held += piece.numel()
        if held >= max(ROWS, width):
            flat = torch.cat(rest)
            whole = held // width * width
            yield flat[:whole].view(-1, width)
            rest, held = [flat[whole:]], held - whole
    if held:
        yield torch.cat(rest).view(-1, width)
