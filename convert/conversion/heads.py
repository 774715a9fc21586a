"""An output head in 8 bits, made on the way from disk to disk: pack(head="int8"), a few rows at a time."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from bitnet.kernels import ops
from bitnet.linear import BitLinear
from bitnet.packed import PackedEmbedding
from bitnet.packing import to_packed

from ..files.safetensors import DTYPES
from ..hub.values import stored_scale
from ..source import Source
from ..swap.pack import HEAD, find_head
from .jobs import Job, Output

ROWS = 1 << 20  # values that are rounded at once, about


def pack_head(model: nn.Module) -> None:
    """Give a model on the meta device the layers that pack(head="int8") makes. Raises ValueError where it would."""
    _, linear, embedding = find_head(model)
    head = BitLinear.from_linear(linear, HEAD)
    if embedding is not None:
        PackedEmbedding.from_embedding(embedding)
    to_packed(head)


def head_job(source: Source) -> tuple[str, Job]:
    """The key of the head's weight in the source, and the job that writes it in 8 bits, with its scales."""
    name, _, embedding = find_head(source.model)
    homes = [name] if embedding is None else [module_name(source.model, embedding), name]
    stored = source.stored()
    key = next((f"{home}.weight" for home in homes if f"{home}.weight" in stored), None)
    if key is None or not DTYPES[stored[key][0]].is_floating_point:
        raise ValueError(f"convert: {source.path} has no float output head that could become int8")
    rows, width = stored[key][1]
    codes = Output(source.file_key(f"{homes[0]}.weight"), "I8", (rows, width))
    scales = [Output(source.file_key(f"{home}.weight_scale"), "F32", (rows,)) for home in homes]

    def run() -> list[Iterable[Tensor]]:
        found: list[Tensor] = []  # known once the codes have been made, which are written first

        def quantized() -> Iterator[Tensor]:
            for block in blocks(source.pieces(key), width):
                if not bool(block.isfinite().all()):
                    raise ValueError(f"{key}: the output head holds NaN or Inf")
                codes, scale = ops.quantize_weight(block, kind="int8", per_row=True)
                found.append(stored_scale(scale))
                yield codes

        return [quantized(), *((part for part in found) for _ in homes)]

    return key, Job(key, [codes, *scales], source.nbytes(key), 8 * ROWS, run)


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
