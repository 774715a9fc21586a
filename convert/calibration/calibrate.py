"""Low-bit rounding of a trained checkpoint, calibrated on text: block by block, with the model never whole in memory.

Each block is loaded alone, its low-bit layers are rounded so that their outputs on the text change least
(gptq.py has the arithmetic), and its outputs become the inputs of the next block. Within a block, layers are rounded in
the order in which they run, those that share an input together, so that each makes up for the errors before it.

What it costs is measured on held-out stretches of the text; training is what closes the gap. To train on from a result,
start from latent_weight: absmean rounding would make a smaller scale of codes * scale alone.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoTokenizer

from bitnet import tables
from bitnet.decode.sequences import positions
from bitnet.kernels import layout, reference
from bitnet.linear import BitLayer, BitLinear
from bitnet.packed import PackedBitLinear
from bitnet.progress import Progress
from bitnet.train.texts import documents

from ..rounding import Quantized
from ..source import Source
from ..writing import write_whole
from .blocks import CALIBRATED, FLOAT, PLAIN, STREAMS, BlockModel, ObservedLinear
from .gptq import round_matrix

SETTINGS = "calibration.json"
MEASURED = 16  # stretches on which layers are compared, which takes as long as to run them


@dataclass
class LayerReport:
    """Signal-to-noise ratio of a layer's outputs on MEASURED stretches of the calibration text, against the float
    model's, in dB.

    plain, calibrated: with this layer rounded that way, behind calibrated earlier layers; NaN where not measured
    reason:            why it got plain rounding only; empty for the others
    """

    name: str
    plain: float
    calibrated: float
    reason: str = ""


@dataclass
class Calibration:
    """What a calibration achieved; print it for a table.

    layers:                                in the order of the model
    bits_per_byte, perplexity (per token): of held-out text, by stream: "float", "plain", "calibrated"; empty for models
                                           that do not write
    similarity:                            mean cosine similarity of a token's last hidden states to the float model's
                                           instead; empty for models that write
    tokens:                                how many were scored for them
    """

    layers: list[LayerReport]
    bits_per_byte: dict[str, float]
    perplexity: dict[str, float]
    similarity: dict[str, float]
    tokens: int

    def __str__(self) -> str:
        lines = [("output SNR on the calibration text, dB", "plain", "calibrated", "")]
        lines += [(row.name, _decibels(row.plain), _decibels(row.calibrated), row.reason) for row in self.layers]
        scores = [
            f"{name:10} {self.bits_per_byte[name]:7.3f} bits per byte, perplexity {self.perplexity[name]:,.2f}"
            for name in self.perplexity
        ]
        scores += [f"{name:10} {cosine:7.4f} cosine similarity to float" for name, cosine in self.similarity.items()]
        return "\n".join([tables.text(lines, right=(1, 2)), f"{self.tokens:,} held-out tokens:", *scores])


def _decibels(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.1f}"


def calibrate(
    source: Source,
    text: str | Path,
    store: str | Path,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = False,
    console: Console | None = None,
) -> Calibration:
    """Round the low-bit layers of a float checkpoint, calibrated on a text; results go to `store`.

    source:   a float checkpoint of a model that reads one text, a sentence encoder, say; its layers' options (weights,
              per_row, activation_bits, ...) decide what is computed
    text:     of (samples + samples / 4) * length tokens or more, in a file that train.texts.documents reads; stretches
              are drawn from all of it
    store:    a directory for one file per block, which `calibrated` reads
    samples:  stretches to calibrate on; a quarter as many others are held out for the scores
    length:   of a stretch in tokens, at most what the model was trained on
    seed:     of the draw; one seed, device and number of threads give the same bytes
    resume:   go on after the last finished block of `store`; otherwise it must be empty or missing
    console:  where the progress goes; default nowhere

    Memory, in bytes: 4 * length * hidden size * 2.75 * samples for the hidden states of all streams, on the CPU; and on
    `device` either the embedding and the head in float32, or one block (6 a weight) with the arithmetic of one of its
    layers [N, K], about 40 K^2 + 48 N K.

    Raises ValueError for models whose blocks cannot be run one by one, for text that is too short or not UTF-8, for
    NaN, and for a store that belongs to other inputs.
    """
    device, store, text = torch.device(device), Path(store), Path(text)
    _check(source, samples, length)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    writes = source.model.can_generate()
    texts, held_out = read_text(text, tokenizer, samples, length, seed, closed=not writes)
    reports: list[LayerReport] = []
    with torch.no_grad():
        model = BlockModel(source, device)
        model.learn_calls(torch.stack([texts[0], held_out[0]]))
        _open_store(store, _fingerprint(source, texts, held_out, device), len(model.blocks), resume)
        files = [store / f"block-{index:05}.safetensors" for index in range(len(model.blocks))]
        done = sum(file.exists() for file in files)
        with Progress("calibrating", len(files), "blocks", console or Console(quiet=True), done=done) as bar:
            seen = {stream: torch.cat([model.embed(ids, stream) for ids in texts]) for stream in (FLOAT, CALIBRATED)}
            unseen = {stream: torch.cat([model.embed(ids, stream) for ids in held_out]) for stream in STREAMS}
            model.unload()
            for index, file in enumerate(files):
                if file.exists():
                    sizes, rows = _facts(file)
                    model.restore(index, {name: _read_layer(file, name, size) for name, size in sizes.items()})
                    _advance(model, index, seen)
                else:
                    reasons = _round_block(model, index, seen, bar.advance)
                    rows = _advance_and_compare(model, index, seen, reasons)
                    _save_block(file, model, index, rows)
                    bar.update(index + 1)
                reports += rows
                _advance(model, index, unseen)
                model.unload()
        # low-bit layers around the blocks
        reports += [
            LayerReport(model.names[layer], math.nan, math.nan, "outside the blocks") for layer in model.outside
        ]
        if not writes:
            return Calibration(reports, {}, {}, _similarity(model, held_out, unseen), held_out.numel())
        losses = _losses(model, held_out, unseen)
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in held_out)
    tokens = held_out[:, 1:].numel()
    bits = {stream: loss / size / math.log(2) for stream, loss in losses.items()}
    return Calibration(reports, bits, {stream: math.exp(loss / tokens) for stream, loss in losses.items()}, {}, tokens)


def calibrated(store: str | Path) -> dict[str, Callable[[], Quantized]]:
    """How to read what calibrate left in `store`, by layer; layers that got plain rounding are not there.

    Raises ValueError if the calibration did not get to the last block.
    """
    settings = Path(store) / SETTINGS
    blocks = json.loads(settings.read_text())["blocks"] if settings.exists() else 0
    files = [Path(store) / f"block-{index:05}.safetensors" for index in range(blocks)]
    if not files or not all(file.exists() for file in files):
        done = sum(file.exists() for file in files)
        raise ValueError(f"{store}: holds {done} of {blocks or '?'} calibrated blocks; go on with resume")
    return {name: partial(_read_layer, file, name, size) for file in files for name, size in _facts(file)[0].items()}


def _check(source: Source, samples: int, length: int) -> None:
    """Refuse what cannot be calibrated before anything is read."""
    kind = type(source.model).__name__
    layers = source.layers()
    if samples < 1 or length < 2:
        raise ValueError(f"calibrate: samples must be at least 1 and length at least 2, got {samples} and {length}")
    if source.model.main_input_name != "input_ids" or source.model.config.is_encoder_decoder:
        raise ValueError(f"calibrate: {kind} does not read one text alone; convert it without calibration")
    if any(isinstance(layer, PackedBitLinear) for layer in layers.values()) or getattr(source, "settings", None):
        raise ValueError(f"calibrate: {source.path} is low-bit already; start from a float checkpoint")
    if any(layer.spec.rms_norm for layer in layers.values()):
        raise ValueError(
            "calibrate: rms_norm=True adds norms, which change the model until it is trained; leave it out"
        )
    modules = source.model.named_modules()
    if other := [name for name, m in modules if isinstance(m, BitLayer) and not isinstance(m, BitLinear)]:
        raise ValueError(
            f"calibrate: {other[0]} is no nn.Linear (fused experts, or a Conv1D), and only those are calibrated; keep "
            f"such layers float (skip={other[0].rpartition('.')[2]!r}), or convert without calibration"
        )
    limit = positions(source.model.config) or length
    if length > limit:
        raise ValueError(f"calibrate: length={length} is more than the {limit} positions of the model")


def read_text(
    file: Path, tokenizer: Any, samples: int, length: int, seed: int, closed: bool = False
) -> tuple[Tensor, Tensor]:
    """Stretches of a text as ids, [samples, length] to calibrate on and ceil(samples / 4) others.

    Each has the special tokens before it that the tokenizer puts there, which models never miss; and if `closed`, as
    encoders know texts, those behind it.
    """
    texts = [text for text, _ in documents([file])]
    start, close = _special_tokens(tokenizer)
    close = close if closed else []
    own = length - len(start) - len(close)
    if own < 1:
        raise ValueError(f"calibrate: length={length} leaves no room for text between special tokens; make it larger")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    # between documents the end-of-text token
    ids = torch.tensor(list(itertools.chain(*rows[:1], *(end + row for row in rows[1:]))), dtype=torch.long)
    wanted = samples + -(-samples // 4)
    count = len(ids) // own
    if count < wanted:
        raise ValueError(
            f"{file}: has {len(ids):,} tokens, but {samples} samples of {length} and a quarter more, held out, need "
            f"{wanted * own:,}; give more text, or fewer or shorter samples"
        )
    stretches = ids[: count * own].view(count, own)
    chosen = stretches[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]]
    ends = [torch.tensor(some, dtype=torch.long).expand(wanted, -1) for some in (start, close)]
    chosen = torch.cat([ends[0], chosen, ends[1]], dim=1)
    return chosen[:samples], chosen[samples:]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before a text, and behind it."""
    marks = tokenizer("a", return_special_tokens_mask=True)
    pairs = list(zip(marks.input_ids, marks.special_tokens_mask, strict=True))
    start, close = ([token for token, _ in itertools.takewhile(lambda p: p[1], some)] for some in (pairs, pairs[::-1]))
    return start, close[::-1]


def _losses(model: BlockModel, held_out: Tensor, unseen: dict[str, Tensor]) -> dict[str, float]:
    """The sum of -ln p of all tokens but the first, by stream, from what the last block gives."""
    losses = {}
    for stream, hidden in unseen.items():
        logits = (model.output(ids, hidden[i : i + 1], stream)[0, :-1] for i, ids in enumerate(held_out))
        pairs = zip(logits, held_out[:, 1:].to(model.device), strict=True)
        losses[stream] = sum(F.cross_entropy(y.float(), ids, reduction="sum").item() for y, ids in pairs)
    model.unload()
    return losses


def _similarity(model: BlockModel, held_out: Tensor, unseen: dict[str, Tensor]) -> dict[str, float]:
    """The mean cosine similarity of a token's last hidden states to the float model's, by stream."""
    sums = dict.fromkeys(STREAMS, 0.0)
    for i, ids in enumerate(held_out):
        outputs = {stream: model.output(ids, hidden[i : i + 1], stream).float() for stream, hidden in unseen.items()}
        for stream, output in outputs.items():
            sums[stream] += F.cosine_similarity(output, outputs[FLOAT], dim=-1).mean().item()
    model.unload()
    return {stream: total / len(held_out) for stream, total in sums.items()}


def _fingerprint(source: Source, texts: Tensor, held_out: Tensor, device: torch.device) -> str:
    """Changes with anything that decides the results, but for the tensors' values, told by their files' times."""
    facts: list[Any] = [source.fingerprint(), source.signs_seed]
    facts += [[name, asdict(layer.spec)] for name, layer in source.layers().items()]
    facts += [texts.tolist(), held_out.tolist(), source.model.config.to_json_string(), device.type]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open_store(store: Path, fingerprint: str, blocks: int, resume: bool) -> None:
    """Make the directory, or see that what it holds comes from the same inputs and may be continued."""
    settings = {"fingerprint": fingerprint, "blocks": blocks}
    file = store / SETTINGS
    store.mkdir(parents=True, exist_ok=True)
    if not any(store.iterdir()):
        write_whole(file, json.dumps(settings).encode())
    elif not resume:
        raise ValueError(f"calibrate: {store} is not empty; ask to resume, or name another directory")
    elif not file.exists() or json.loads(file.read_text()) != settings:
        done = len(list(store.glob("block-*.safetensors")))
        raise ValueError(
            f"calibrate: {store}, with {done} of {blocks} blocks, was made from another checkpoint, text, or options; "
            "restore those to go on, or start anew in another directory"
        )


def _save_block(file: Path, model: BlockModel, index: int, rows: list[LayerReport]) -> None:
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for layer in model.layers(index):
        if CALIBRATED in layer.rounded and layer.rounded[CALIBRATED] is not layer.rounded[PLAIN]:
            name, (codes, scale) = model.names[layer], layer.rounded[CALIBRATED]
            tensors |= {f"{name}.weight": layout.pack_ternary(codes).cpu(), f"{name}.weight_scale": scale.cpu()}
            sizes[name] = layer.out_features
    # one entry, because safetensors writes several in any order
    facts = json.dumps({"out_features": sizes, "layers": [asdict(row) for row in rows]})
    write_whole(file, save(tensors, {"calibration": facts}))


def _facts(file: Path) -> tuple[dict[str, int], list[LayerReport]]:
    """The out_features of a block's calibrated layers, by name, and the reports of all of its layers."""
    with safe_open(file, "pt") as stream:
        facts = json.loads(stream.metadata()["calibration"])
    return facts["out_features"], [LayerReport(**row) for row in facts["layers"]]


def _read_layer(file: Path, name: str, out_features: int) -> Quantized:
    with safe_open(file, "pt") as stream:
        codes = layout.unpack_ternary(stream.get_tensor(f"{name}.weight"), out_features)
        return Quantized(codes, stream.get_tensor(f"{name}.weight_scale"))


def _round_block(
    model: BlockModel, index: int, seen: dict[str, Tensor], advance: Callable[[float], None]
) -> dict[str, str]:
    """Round all layers of a block; returns the reasons why some got plain rounding, by name."""
    groups, reasons = model.groups(index, seen[FLOAT][:1])
    for group in groups:
        leader, k = group[0], group[0].in_features
        h, c = torch.zeros(2, k, k, device=model.device)
        for before, after in zip(seen[FLOAT].split(1), seen[CALIBRATED].split(1), strict=True):
            x = model.inputs(index, before, FLOAT, leader)
            y = model.inputs(index, after, CALIBRATED, leader)
            if leader.spec.activation_bits is not None:
                q, s = reference.quantize_activation(y, leader.spec.activation_bits)
                y = q / s
            h.addmm_(y.T, y)
            c.addmm_(y.T, x)
        if not bool(h.isfinite().all() & c.isfinite().all()):
            raise ValueError(f"calibrate: {model.names[leader]}: its inputs are NaN or too large to square in float32")
        for layer in group:
            try:
                layer.rounded[CALIBRATED] = Quantized(*round_matrix(layer.weight, h, c, layer.spec))
            except ValueError as error:
                raise ValueError(f"calibrate: {model.names[layer]}: {error}") from None
        advance(1 / (len(groups) + 1))
    for layer in reasons:
        model.load(layer)
        layer.rounded[CALIBRATED] = layer.rounded[PLAIN]
    return {model.names[layer]: reason for layer, reason in reasons.items()}


def _advance(model: BlockModel, index: int, streams: dict[str, Tensor]) -> None:
    """Put the outputs of a block in the place of its inputs."""
    for stream, hidden in streams.items():
        for one in hidden.split(1):
            one.copy_(model.block(index, one, stream))


def _advance_and_compare(
    model: BlockModel, index: int, streams: dict[str, Tensor], reasons: dict[str, str]
) -> list[LayerReport]:
    """_advance, and how far the layers' outputs for the first of the stretches are from those of the float model."""
    sums = {layer: torch.zeros(3, dtype=torch.float64) for layer in model.layers(index)}
    wanted: dict[ObservedLinear, Tensor] = {}

    def watch(layer: ObservedLinear, input: Tensor) -> None:
        if model.stream == FLOAT:
            wanted[layer] = layer.output(input, FLOAT)
            return
        y = wanted.pop(layer, None)
        if y is not None and y.shape[:-1] == input.shape[:-1]:
            parts = (y, y - layer.output(input, PLAIN), y - layer.output(input, CALIBRATED))
            sums[layer] += torch.stack([part.square().sum(dtype=torch.float64).cpu() for part in parts])

    try:
        for at, pair in enumerate(zip(streams[FLOAT].split(1), streams[CALIBRATED].split(1), strict=True)):
            model.watch = watch if at < MEASURED else None
            _advance(model, index, dict(zip((FLOAT, CALIBRATED), pair, strict=True)))
    finally:
        model.watch = None
    rows = []
    for layer, (signal, plain, calibrated) in sums.items():
        name = model.names[layer]
        before, after = (10 * (signal.log10() - noise.log10()).item() for noise in (plain, calibrated))
        rows.append(LayerReport(name, before, after, reasons.get(name, "")))
    return rows
