"""`bitnet train` and `bitnet eval`: options, runs that go on where they were killed, reports, comparisons."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import llama
from transformers import BertConfig, BertForMaskedLM, BertModel

import bitnet
from bitnet import cli
from bitnet.convert import checkpoint
from bitnet.jobs import checkpoints, evaluate, models
from bitnet.jobs import train as job
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear
from bitnet.train.loop import Loop
from bitnet.train.options import TrainOptions, from_yaml
from bitnet.train.stdlib import build_tokenizer

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
DROPOUT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "a.py"
    file.write_text("\n".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n" for i in range(200)))
    return str(file)


def options(text: str, out: Path, **changes) -> TrainOptions:  # type: ignore[no-untyped-def]
    small = {
        "context": 32,
        "batch": 2,
        "steps": 12,
        "lr": 1e-2,
        "held_out": 0.1,
        "eval_tokens": 200,
        "monitor_every": 5,
    }
    chosen = {"architecture": LLAMA, "device": "cpu", "data": text, "out": str(out), **small, **changes}
    return TrainOptions(**chosen)


def test_a_run_leaves_a_packed_model_that_is_the_trained_one(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = job.train(options(text, out), QUIET)
    assert report == json.loads((out / "report.json").read_text())
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report["logits_difference"] == 0
    assert len(report["losses"]) == 12
    assert [row["step"] for row in report["layers"]] == [5, 10]
    packed = bitnet.load(out / "model")
    assert any(isinstance(module, PackedBitLinear) for module in packed.modules())
    assert cli.main(["generate", str(out / "model"), "def ", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    found = evaluate.evaluate(out / "model", [text], against=out / "checkpoints" / "step-00000012", device="cpu")
    assert found["kl"] == 0
    assert found["agreement"] == 1
    assert report["bits_per_byte"] == pytest.approx(found["models"][str(out / "model")]["bits_per_byte"], rel=0.2)


class Killed(BaseException):
    """What a kill is to the code under test: nothing after it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """The call-th call of a function, from 1 on, does not happen, and nothing after it."""
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def whole(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    report = job.train(options(text, out, architecture=DROPOUT, checkpoint_every=4), QUIET)
    return report, (out / "model" / "model.safetensors").read_bytes()


KILLS = [
    *[(Loop, "one_step", call) for call in (1, 4, 5, 7, 12)],
    *[(checkpoints, "save", call) for call in (1, 2)],
    *[(checkpoints, "save_file", call) for call in (1, 2)],
    *[(checkpoints.os, "rename", call) for call in (1, 3)],
    (checkpoints.shutil, "rmtree", 4),
    (job, "pack", 1),
    (job, "save", 1),
    (job, "plot", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), KILLS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_killed_run_goes_on_to_the_very_same_end(
    owner: object, name: str, call: int, text: str, whole: tuple[dict, bytes], tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            job.train(options(text, out, architecture=DROPOUT, checkpoint_every=4), QUIET)
    torch.rand(3)  # other random numbers than those of the run
    report = job.resume(out, QUIET)
    expected, weights = whole
    for key in ("losses", "metrics", "layers", "bits_per_byte"):
        assert report[key] == expected[key]
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="this run is finished"):
        job.resume(out, QUIET)


OTHERS = [
    {"per_row": True, "rms_norm": True, "activation_bits": 4, "accumulation": 2, "documents": "joined"},
    {"group_size": 32, "activation_bits": None, "precision": "bf16", "optimizer": "adamw"},
    {"weights": "binary", "hadamard": 8, "hadamard_signs": True, "schedule": "two-stage"},
    {"weights": "float", "gradient_checkpointing": True},
    {"architecture": {"model_type": "mixtral", **{k: v for k, v in LLAMA.items() if k != "model_type"}}},
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda c: "-".join(c))
def test_whatever_the_options_a_killed_run_goes_on_to_the_same_end(
    changes: dict, text: str, tmp_path: Path, monkeypatch
) -> None:
    expected = job.train(options(text, tmp_path / "whole", **changes), QUIET)
    with monkeypatch.context() as patch:
        kill_at(patch, Loop, "one_step", 9)
        with pytest.raises(Killed):
            job.train(options(text, tmp_path / "run", checkpoint_every=4, **changes), QUIET)
    report = job.resume(tmp_path / "run", QUIET)
    assert report["losses"] == expected["losses"]
    assert report["layers"] == expected["layers"]
    names = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_process_that_is_killed_goes_on_to_the_very_same_end(by: signal.Signals, text: str, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        flags = ["--architecture", json.dumps(DROPOUT), "--data", text, "--out", str(tmp_path / out), "--device", "cpu"]
        flags += ["--steps", "400", "--context", "32", "--batch", "2", "--lr", "1e-2", "--checkpoint-every", "30"]
        return [sys.executable, "-m", "bitnet", "train", *flags]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment)
    with subprocess.Popen(command("killed"), env=environment) as process:
        while not list((tmp_path / "killed" / "checkpoints").glob("step-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(by)
        assert process.wait(60) == (130 if by != signal.SIGKILL else -by)
    resume = [sys.executable, "-m", "bitnet", "train", "--resume", str(tmp_path / "killed")]
    subprocess.run(resume, check=True, env=environment)
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed"))
    assert one["losses"] == other["losses"]
    assert one["metrics"] == other["metrics"]


def test_only_the_last_checkpoints_stay_and_each_can_be_trained_on(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job.train(options(text, out, checkpoint_every=3, keep=2), QUIET)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000009", "step-00000012"]
    assert not list(out.rglob("*.pt")) + list(out.rglob("*.bin.pickle")) + list(out.rglob("*.pkl"))
    start = out / "checkpoints" / "step-00000009"
    again = job.train(options(text, tmp_path / "again", architecture=None, model=str(start), steps=2), QUIET)
    assert again["low_bit_weights"] > 0


def test_a_damaged_checkpoint_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, Loop, "one_step", 6)
        with pytest.raises(Killed):
            job.train(options(text, out, checkpoint_every=4), QUIET)
    (out / "checkpoints" / "step-00000004" / "training.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000004: cannot be read .*remove it"):
        job.resume(out, QUIET)


def test_a_float_model_follows_its_teacher_into_ternary(text: str, tmp_path: Path) -> None:
    job.train(options(text, tmp_path / "float", weights="float", steps=20), QUIET)
    teacher = str(tmp_path / "float" / "model")
    assert not any(isinstance(module, BitLinear | PackedBitLinear) for module in bitnet.load(teacher).modules())
    changes = {"architecture": None, "model": teacher, "teacher": teacher, "relation": 1.0, "ce": 0.5}
    report = job.train(options(text, tmp_path / "ternary", **changes), QUIET)
    assert report["logits_difference"] == 0
    other = tmp_path / "other"
    bitnet.replace_linear(model := llama(vocab_size=300))
    bitnet.save(model, other)
    with pytest.raises((ValueError, RuntimeError), match="vocabulary"):
        job.train(options(text, tmp_path / "x", **changes | {"teacher": str(other)}), QUIET)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulation": 2, "optimizer": "adamw", "schedule": "two-stage"},
        {"precision": "bf16", "gradient_checkpointing": True, "documents": "joined"},
        {"per_row": True, "rms_norm": True, "activation_bits": 4, "head": "int8", "schedule": "wsd"},
        {"group_size": 32, "activation_bits": None, "skip": ["k_proj"], "schedule": "cosine"},
        {"weights": "binary", "steps": None, "epochs": 0.1, "clip": None},
    ],
    ids=lambda c: "-".join(c),
)
def test_options_reach_what_they_name(changes: dict, text: str, tmp_path: Path) -> None:
    report = job.train(options(text, tmp_path / "run", **{"steps": 4} | changes), QUIET)
    assert all(math.isfinite(loss) for loss in report["losses"])
    model = bitnet.load(tmp_path / "run" / "model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}
    spec = layers["model.layers.0.mlp.up_proj"].spec
    for name in {"per_row", "rms_norm", "activation_bits", "group_size"} & changes.keys():
        assert getattr(spec, name) == changes[name]
    assert bool((layers["model.layers.0.mlp.up_proj"].codes() == 0).any()) == ("weights" not in changes)
    assert ("lm_head" in layers) == ("head" in changes)
    assert ("model.layers.0.self_attn.k_proj" in layers) == ("skip" not in changes)
    if changes.get("accumulation"):
        assert report["tokens_per_step"] == 2 * 2 * 32


FAMILIES = [
    {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    {"model_type": "mixtral", "num_local_experts": 4, **{k: v for k, v in LLAMA.items() if k != "model_type"}},
    {"model_type": "gemma3_text", "head_dim": 8, **{k: v for k, v in LLAMA.items() if k != "model_type"}},
]


@pytest.mark.parametrize("architecture", FAMILIES, ids=lambda a: a["model_type"])
def test_models_of_other_families_train(architecture: dict, text: str, tmp_path: Path) -> None:
    report = job.train(options(text, tmp_path / "run", architecture=architecture, steps=3), QUIET)
    assert report["logits_difference"] == 0


@pytest.mark.parametrize(
    ("kind", "message"), [(BertForMaskedLM, "sees the tokens that it would"), (BertModel, "does not predict tokens")]
)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind, message: str, text: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    kind(BertConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "encoder")
    build_tokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=message):
        job.train(options(text, tmp_path / "run", architecture=None, model=str(tmp_path / "encoder")), QUIET)


def test_a_run_goes_on_from_another_folder_without_what_it_was_made_from(
    text: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama(vocab_size=257).save_pretrained("start")
    build_tokenizer().save_pretrained("start")
    Path("mine.txt").write_text(Path(text).read_text())
    with monkeypatch.context() as patch:
        kill_at(patch, Loop, "one_step", 6)
        with pytest.raises(Killed):
            job.train(options("mine.txt", Path("run"), architecture=None, model="start", checkpoint_every=4), QUIET)
    assert from_yaml("run/options.yaml").model == str(tmp_path / "start")
    shutil.rmtree("start")
    Path("mine.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(job.resume("../run", QUIET)["losses"]) == 12


def test_a_rehearsal_measures_and_writes_nothing(text: str, tmp_path: Path) -> None:
    facts = job.rehearse(options(text, tmp_path / "run"), QUIET)
    assert facts["steps"] == 12
    assert facts["seconds_per_step"] > 0
    assert facts["tokens_per_step"] == 64
    assert list(tmp_path.iterdir()) == []


def test_yaml_and_flags_are_two_ways_into_one_set_of_options(tmp_path: Path, text: str, monkeypatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"architecture: {json.dumps(LLAMA)}\ndata: {text}\nlr: 1e-3\nper-row: true\nactivation_bits: null\nsteps: 9\n"
    )
    seen: list[TrainOptions] = []
    monkeypatch.setattr(job, "train", seen.append)
    assert cli.main(["train", str(file), "--steps", "7", "--out", "x"]) == 0
    flags = ["--architecture", json.dumps(LLAMA), "--data", text, "--lr", "1e-3", "--per-row"]
    assert cli.main(["train", *flags, "--activation-bits", "none", "--steps", "7", "--out", "x"]) == 0
    assert seen[0].lr == 1e-3
    assert seen[0].data == [text]
    one, two = ({f.name: getattr(found, f.name) for f in fields(found)} for found in seen)
    assert json.loads(two.pop("architecture")) == one.pop("architecture")
    assert one == two
    (tmp_path / "again.yaml").write_text(seen[0].to_yaml())
    assert from_yaml(tmp_path / "again.yaml") == seen[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "there is no option 'learning_rate'"),
        ("leranin: 1\nwarmupp: 0.1", "there is no option 'leranin'"),
        ("warmupp: 0.1", "there is no option 'warmupp'; did you mean warmup"),
        ("strength-begin: 0.1", "did you mean strength_end"),
        ("steps: many", "--steps takes a whole number, got 'many'"),
        ("steps: 1.5", "--steps takes a whole number, got 1.5"),
        ("schedule: warm", "--schedule must be one of linear"),
        ("per_row: 1", "--per-row is true or false, got 1"),
        ("- 1", "must be a mapping"),
        ("a: [", "not YAML"),
        ("{}", "give either --model DIR"),
        ("model: x", "give text to train on"),
        ("model: x\ndata: y\nbatch: 0", "--batch must be at least 1"),
        ("model: no/such\ndata: y\nout: z", "no/such"),
        ("architecture: {model_type: lama}\ndata: TEXT\nout: z", "no model_type 'lama'; did you mean llama"),
        ("architecture: {model_type: llama, hiden_size: 8}\ndata: TEXT\nout: z", "did you mean hidden_size"),
        ("architecture: {hidden_size: 8}\ndata: TEXT\nout: z", "has no model_type"),
        (
            "architecture: {model_type: llama, hidden_size: 7, num_attention_heads: 2}\ndata: TEXT\nout: z",
            "cannot build",
        ),
        (f"architecture: {json.dumps(LLAMA)}\ndata: [TEXT, gone.txt]\nout: z", "gone.txt: no such file"),
        (f"architecture: {json.dumps(LLAMA)}\ndata: TEXT\ncontext: 9000\nout: z/y", "fewer than one row"),
        ("architecture: no.json\ndata: TEXT\nout: z", "no.json: no such file"),
        ("architecture: {model_type: gpt2, n_embd: 24, n_positions: 16}\ndata: TEXT\nout: z", "16 positions"),
    ],
    ids=lambda value: value.replace("\n", " ")[:40],
)
def test_mistakes_end_in_one_line_that_helps(
    content: str, message: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(content.replace("TEXT", text))
    assert cli.main(["train", "run.yaml"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bitnet train: ")
    assert message in error
    assert [path.name for path in Path().iterdir()] == ["run.yaml"], "nothing is half-written"


def test_a_run_is_not_written_over(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already; name another folder"):
        job.train(options(text, tmp_path), QUIET)
    (tmp_path / "options.yaml").touch()
    with pytest.raises(ValueError, match=r"go on with it: bitnet train --resume"):
        job.train(options(text, tmp_path), QUIET)
    assert cli.main(["train", "--resume", str(tmp_path), "--steps", "3"]) == 1
    assert "it takes no others" in capsys.readouterr().err
    assert cli.main(["train"]) == 1
    with pytest.raises(FileNotFoundError, match="no run to go on with"):
        job.resume(tmp_path / "nothing", QUIET)


def test_packed_models_cannot_be_trained_and_say_what_to_do(text: str, tmp_path: Path) -> None:
    bitnet.replace_linear(model := llama(vocab_size=257))
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "packed")
    build_tokenizer().save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"packed, which cannot be trained.*--to bf16"):
        job.train(options(text, tmp_path / "run", architecture=None, model=str(tmp_path / "packed")), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float model and its packed twin, with byte tokenizers."""
    folder = tmp_path_factory.mktemp("pair")
    model = llama(vocab_size=257, hidden_size=64, intermediate_size=64)
    model.save_pretrained(folder / "float")
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, folder / "packed")
    for name in ("float", "packed"):
        build_tokenizer().save_pretrained(folder / name)
    return folder / "float", folder / "packed"


def test_eval_prints_both_models_and_their_distance(pair, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    full, packed = map(str, pair)
    command = ["eval", packed, "--text", text, "--against", full, "--context", "64", "--device", "cpu"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["models"]) == [packed, full]
    size = len(Path(text).read_bytes())
    for found in report["models"].values():
        assert found["tokens"] == found["bytes"] == size  # bytes are tokens, and the first follows the token before it
        assert found["bits_per_byte"] == pytest.approx(math.log2(found["perplexity"]))
    assert report["kl"] > 0
    assert 0 <= report["agreement"] <= 1
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"KL({full} || {packed}): {report['kl']:.4g} nats a token" in printed
    assert "windows of 64 tokens, every 32" in printed


def test_eval_reads_a_gguf_file_as_what_it_holds(pair, text: str, tmp_path: Path) -> None:
    floats = bitnet.convert_checkpoint(pair[1], tmp_path / "floats", to="bf16", console=QUIET)
    for source, form in ((pair[1], "gguf-q2_0"), (floats, "gguf-bf16")):
        file = tmp_path / f"{form}.gguf"
        bitnet.convert_checkpoint(source, file, to=form, console=QUIET)
        found = evaluate.evaluate(file, [text], against=source, context=64, stride=64, device="cpu")
        low_bit = any(isinstance(m, PackedBitLinear) for m in models.runnable(file, device="cpu")[0].modules())
        assert low_bit == (form == "gguf-q2_0"), "a float file is not rounded"
        assert found["kl"] < 2e-3


def test_eval_of_other_vocabularies_compares_bytes_only(pair, text: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    words = {letter: index for index, letter in enumerate(["?", *sorted(set(Path(text).read_text()))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    llama(vocab_size=64).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    report = evaluate.evaluate(pair[1], [text], against=tmp_path, context=64, device="cpu")
    assert "kl" not in report
    one, other = report["models"].values()
    assert other["tokens"] == one["tokens"] - 1  # nothing comes before the first token there
    assert other["bytes"] == one["bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --text FILE"),
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--text", "TEXT", "--context", "0"], "--context must be at least 1"),
        (["--text", "TEXT", "--context", "9999"], "more than the 2048 positions"),
        (["--text", "TEXT", "--context", "8", "--stride", "9"], "stride must lie between 1 and the context, 8"),
        (["--text", "EMPTY"], "no text to score"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_says_what_is_wrong(arguments, message: str, pair, text: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").touch()
    given = [text if a == "TEXT" else str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    assert cli.main(["eval", str(pair[1]), *given, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_tasks_need_lm_eval_and_say_so(pair, capsys, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", str(pair[1]), "--tasks", "arc_easy", "--device", "cpu"]) == 1
    assert "pip install 'bitnet-toolkit[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_of_lm_eval_run_on_our_layers(pair, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [{"question": f"{i} + 1 =", "choices": [str(i + 1), "cat"], "answer": 0} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
    }
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    command = [
        "eval",
        str(pair[1]),
        "--tasks",
        str(tmp_path / "sums.yaml"),
        "--limit",
        "4",
        "--device",
        "cpu",
        "--json",
    ]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "sums" in json.loads(printed[printed.index("{") :])["tasks"]


@pytest.mark.parametrize("fast", [True, False])
def test_float_checkpoints_run_in_float32_where_a_cpu_has_no_bfloat16(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(vocab_size=257).bfloat16()
    model.save_pretrained(tmp_path / "float")
    bitnet.replace_linear(model)
    bitnet.pack(model)
    model.save_pretrained(tmp_path / "packed")
    for name in ("float", "packed"):
        build_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setattr(checkpoint, "_multiplies_bfloat16", lambda: fast)
    found = {name: models.runnable(tmp_path / name, device="cpu")[0].dtype for name in ("float", "packed")}
    assert found == {"float": torch.bfloat16 if fast else torch.float32, "packed": torch.bfloat16}
    assert bitnet.load(tmp_path / "float").dtype == torch.bfloat16, "a load is what was saved"
