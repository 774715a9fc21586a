"""The options of a training run: one dataclass, which a YAML file and the flags of `bitnet train` fill alike.

Nothing here takes time to import: `bitnet train --help` is made of it.
"""

import argparse
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

START, DATA, LAYERS, OPTIMIZATION = "start", "data", "layers", "optimization"
TEACHER, MACHINE, OUTPUT = "teacher", "machine", "output"
GROUPS = {
    START: "what is trained: a checkpoint (--model), or a new model (--architecture)",
    DATA: "files of text, cut into rows of CONTEXT tokens",
    LAYERS: "which layers become low-bit, and how; see bitnet.replace_linear",
    OPTIMIZATION: "steps, optimizer, and how learning rate and quantization move through the run",
    TEACHER: "learning from another model's predictions as well; see bitnet.Distillation",
    MACHINE: "where and how it runs",
    OUTPUT: "what is written to OUT, and how often",
}


def _option(group: str, default: Any, text: str, choices: tuple[str, ...] = (), metavar: str | None = None) -> Any:
    metadata = {"group": group, "help": text, "choices": choices, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainOptions:
    """Everything that decides what `bitnet train` does; each field's help is in its metadata."""

    model: str | None = _option(
        START,
        None,
        "checkpoint to start from, float or in training: a folder, a GGUF file, org/name",
    )
    architecture: str | dict[str, Any] | None = _option(
        START,
        None,
        "a new model: a config.json or its folder, or a mapping of transformers' options, "
        "'{model_type: llama, hidden_size: 256, num_hidden_layers: 4}'; the vocabulary is the tokenizer's",
        metavar="CONFIG",
    )
    tokenizer: str | None = _option(START, None, "its folder (default: the model's; of a new model: bytes are tokens)")
    embedding_std: float | None = _option(
        START, None, "of a new model: standard deviation of the embeddings at the start (0.2 suits small ones)"
    )

    data: list[str] = _option(
        DATA,
        [],
        "text files, one document each; .jsonl and .parquet, one a row; folders that `datasets` saved",
        metavar="FILE",
    )
    eval_data: list[str] = _option(DATA, [], "the same, to evaluate on (default: a part of DATA)", metavar="FILE")
    held_out: float = _option(DATA, 0.02, "without --eval-data, the share of DATA that is held out, up to 4 MB")
    column: str = _option(DATA, "text", "where rows of .jsonl, .parquet and datasets have their text", metavar="NAME")
    context: int = _option(DATA, 512, "tokens in a row")
    documents: str = _option(
        DATA,
        "separate",
        "whether attention sees a row's other documents; models without attention do",
        ("separate", "joined"),
    )
    seed: int = _option(DATA, 0, "of a new model's weights, and of the order of rows")

    weights: str = _option(LAYERS, "ternary", "float trains a twin in full precision", ("ternary", "binary", "float"))
    per_row: bool = _option(LAYERS, False, "one scale per output row instead of one per matrix")
    group_size: int | None = _option(LAYERS, None, "one scale per output row and so many features: 32, 64, 128 or 256")
    activation_bits: int | None = _option(LAYERS, 8, "16, 8, 4, or none for float activations")
    rms_norm: bool = _option(LAYERS, False, "an RMSNorm inside each layer")
    hadamard: int | None = _option(LAYERS, None, "rotate activations in blocks of so many features, a power of two")
    hadamard_signs: bool = _option(LAYERS, False, "multiply features by fixed random signs before they are rotated")
    skip: list[str] = _option(LAYERS, [], "layers to leave float besides head and routers", metavar="REGEX")
    include: list[str] = _option(LAYERS, [], "only these layers", metavar="REGEX")

    steps: int | None = _option(OPTIMIZATION, None, "how many steps (default: as many as EPOCHS take)")
    epochs: float = _option(OPTIMIZATION, 1.0, "without --steps: how often each row is seen")
    batch: int = _option(OPTIMIZATION, 8, "rows that go through the model together")
    accumulation: int = _option(OPTIMIZATION, 1, "batches a step")
    optimizer: str = _option(OPTIMIZATION, "muon", "muon: Muon for the matrices, AdamW for the rest", ("muon", "adamw"))
    lr: float | None = _option(
        OPTIMIZATION, None, "peak learning rate (default: 0.004 for a new model, 0.0001 for a checkpoint)"
    )
    adamw_lr: float | None = _option(OPTIMIZATION, None, "with muon: AdamW's (default: LR)")
    momentum: float = _option(OPTIMIZATION, 0.95, "Muon's")
    weight_decay: float = _option(OPTIMIZATION, 0.1, "not of norms and biases")
    clip: float | None = _option(OPTIMIZATION, 1.0, "greatest norm of the gradient, or none")
    schedule: str = _option(
        OPTIMIZATION,
        "linear",
        "how the learning rate falls after the warm-up; wsd: late; two-stage: BitNet b1.58's, which also ends weight "
        "decay at half",
        ("linear", "cosine", "wsd", "two-stage", "constant"),
    )
    warmup: float = _option(OPTIMIZATION, 0.04, "share of the steps in which it rises")
    final_lr: float = _option(OPTIMIZATION, 0.05, "the last learning rate as a share of the peak")
    decay: float = _option(OPTIMIZATION, 0.2, "of wsd: share of the steps in which it falls")
    strength_start: float | None = _option(
        OPTIMIZATION,
        None,
        "share of the steps in full precision; then quantization sets in, more and more, until (default: 0.2; 0 where "
        "the start is low-bit already)",
    )
    strength_end: float | None = _option(
        OPTIMIZATION,
        None,
        "this share of the steps, from where on layers are fully quantized; 0 and 0: from the start (default: 0.7, or "
        "0)",
    )

    teacher: str | None = _option(TEACHER, None, "checkpoint of a model with the same vocabulary, named as --model is")
    ce: float = _option(TEACHER, 1.0, "weight of the text itself; 0: of the teacher alone")
    kl: float = _option(TEACHER, 1.0, "weight of KL(teacher || model)")
    temperature: float = _option(TEACHER, 1.0, "of both in it")
    relation: float = _option(TEACHER, 0.0, "weight of the difference of attention relations in one layer")
    relation_layer: int = _option(TEACHER, -1, "that layer; -1 is the last")
    reconstruct: int = _option(
        TEACHER,
        0,
        "before the run, train each block of layers by itself, so many steps, to give what the teacher's gives",
    )
    reconstruct_rows: int = _option(TEACHER, 128, "rows of the text for it")
    reconstruct_lr: float = _option(TEACHER, 1e-4, "peak learning rate of it, AdamW's")

    device: str | None = _option(MACHINE, None, "cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    precision: str = _option(
        MACHINE,
        "auto",
        "bf16: what is not quantized in bfloat16, weights and optimizer in float32; fp32; auto: bf16 on GPUs",
        ("auto", "bf16", "fp32"),
    )
    gradient_checkpointing: bool = _option(MACHINE, False, "less memory, more time: activations are computed twice")
    compile: bool = _option(MACHINE, False, "torch.compile; the first steps take minutes")

    out: str | None = _option(OUTPUT, None, "a new folder for the model, report.json, report.png and checkpoints")
    eval_every: int | None = _option(OUTPUT, None, "steps from one evaluation to the next (default: a tenth of all)")
    eval_tokens: int = _option(OUTPUT, 65536, "about how many tokens each scores")
    monitor_every: int | None = _option(
        OUTPUT, None, "steps from one look at the codes to the next (default: a fiftieth of all, 10 at least)"
    )
    checkpoint_every: int | None = _option(OUTPUT, None, "steps from one checkpoint to the next")
    checkpoint_minutes: float = _option(OUTPUT, 15.0, "minutes from one to the next, whichever is sooner")
    keep: int = _option(OUTPUT, 2, "checkpoints to keep")
    head: str | None = _option(
        OUTPUT, None, "how to store the output head of the packed model", ("int8", "int4", "ternary")
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            setattr(self, each.name, coerce(each, getattr(self, each.name)))

    def check(self) -> None:
        """Raise ValueError for what cannot be, before anything is read or written."""
        if (self.model is None) == (self.architecture is None):
            raise ValueError(
                "give either --model DIR, to start from a checkpoint, or --architecture CONFIG, a new model"
            )
        if not self.data:
            raise ValueError("give text to train on: --data FILE ...")
        if self.reconstruct < 0 or (self.reconstruct and (self.teacher is None or self.weights == "float")):
            raise ValueError(
                "--reconstruct N needs N of 0 or more, a --teacher whose blocks are followed, and low-bit layers"
            )
        for name in ("context", "batch", "accumulation", "keep", "eval_tokens", "reconstruct_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "eval_every", "monitor_every", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "checkpoint_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{flag(name)} must be positive, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out is a share and must lie in [0, 1), got {self.held_out}")
        if self.context < 2:
            raise ValueError(f"--context must be at least 2, got {self.context}")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else 4e-3 if self.model is None else 1e-4

    def to_yaml(self) -> str:
        """What from_yaml reads; options that have their default value are left out."""
        import yaml

        default = asdict(TrainOptions())
        return yaml.safe_dump({k: v for k, v in asdict(self).items() if v != default[k]}, sort_keys=False)


def from_yaml(file: str | Path, **changes: Any) -> TrainOptions:
    """Options from a YAML file, and others that override them.

    Paths in the file are relative to where the command runs. Raises ValueError naming the file and the key, and what is
    spelt like it.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a mapping, 'option: value' lines; it is {type(found).__name__}")
    names = [each.name for each in fields(TrainOptions)]
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise ValueError(f"{file}: there is no option {key!r}; {nearest(name, names)}")
        values[name] = value
    try:
        return TrainOptions(**{**values, **changes})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """Names that are spelt like one that does not exist, in words."""
    names = sorted(names)
    if close := difflib.get_close_matches(name, names, 3, 0.6):
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(names)}"


def flag(name: str) -> str:
    """An option's name on the command line."""
    return name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option as a flag; those that were not given do not appear in the namespace."""
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    for each in fields(TrainOptions):
        kind, default = _kind(each), _default(each)
        shown = "" if default in (None, False, []) or "(default" in each.metadata["help"] else f" (default: {default})"
        text = (each.metadata["help"] + shown).replace("%", "%%")
        settings: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["metavar"] = (
                each.metadata["metavar"]
                or "|".join(each.metadata["choices"])
                or {int: "N", float: "X"}.get(kind, "DIR")
            )
            if kind is list:
                settings["nargs"] = "+"
        groups[each.metadata["group"]].add_argument(f"--{flag(each.name)}", **settings)


def given(args: argparse.Namespace) -> Mapping[str, Any]:
    """The options that were given as flags."""
    return {each.name: getattr(args, each.name) for each in fields(TrainOptions) if hasattr(args, each.name)}


def coerce(each: "Field[Any]", value: Any) -> Any:
    """A value as its field holds it: numbers from strings ("1e-3" is one in YAML), one file for a list of files."""
    kind, optional = _kind(each), type(None) in typing.get_args(each.type)
    where = f"--{flag(each.name)}"
    if value is None or (optional and isinstance(value, str) and value.lower() == "none"):
        if optional:
            return None
        raise ValueError(f"{where} cannot be empty")
    if kind is list:
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str | Path) for item in items):
            raise ValueError(f"{where} takes text, got {value!r:.80}")
        return [str(item) for item in items]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} is true or false, got {value!r:.80}")
        return value
    if kind in (int, float):
        try:
            if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
                raise ValueError
            return kind(float(value))
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{where} takes {what}, got {value!r:.80}") from None
    if isinstance(value, dict) and kind is dict:
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"{where} takes text, got {value!r:.80}")
    choices = each.metadata["choices"]
    if choices and str(value) not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}; got {str(value)!r:.80}")
    return str(value)


def _kind(each: "Field[Any]") -> Any:
    """bool, int, float, str, list, or dict for a string or a mapping."""
    options = [each.type]
    if isinstance(each.type, types.UnionType):
        options = [option for option in typing.get_args(each.type) if option is not type(None)]
    origins = [typing.get_origin(option) or option for option in options]
    return dict if dict in origins else origins[0]


def _default(each: "Field[Any]") -> Any:
    return each.default if each.default is not MISSING else []
