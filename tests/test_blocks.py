"""Block-wise reconstruction: what it changes, that it helps, and that it goes on where it stopped."""

import copy
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import gpt2, llama
from torch import Tensor, nn

import bitnet
from bitnet.jobs import train as job
from bitnet.linear import BitLinear
from bitnet.train import blocks
from bitnet.train.blocks import BlockReport, block_error, reconstruct
from bitnet.train.options import TrainOptions
from bitnet.train.stdlib import build_tokenizer

QUIET = Console(quiet=True)
OPTIONS = {"steps": 40, "lr": 5e-3, "batch": 4}


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = llama()
    student = copy.deepcopy(teacher)
    bitnet.replace_linear(student, **options)
    return student, teacher


def rows(count: int = 16) -> Tensor:
    return torch.randint(64, (count, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module) -> float:
    ids = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(2))
    states = [m.eval().model(ids, output_hidden_states=True).hidden_states[-2] for m in (student, teacher)]
    return block_error(*states).item()


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"group_size": 32}, {"hadamard": 8}, {"rms_norm": True}])
def test_every_block_comes_closer_to_the_float_block_and_so_does_the_model(options: dict[str, object]) -> None:
    student, teacher = pair(**options)
    before = distance(student, teacher)
    student.train()
    reports = reconstruct(student, teacher, rows(), **OPTIONS)
    assert student.training
    assert [report.name for report in reports] == ["model.layers.0", "model.layers.1"]
    assert all(report.after < 0.9 * report.before for report in reports)
    assert distance(student, teacher) < before


def test_only_blocks_change_and_never_the_teacher() -> None:
    student, teacher = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    float_before = {name: value.clone() for name, value in teacher.state_dict().items()}
    reconstruct(student, teacher, rows(), **OPTIONS)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.layers.") for name in changed)
    assert all(torch.equal(value, float_before[name]) for name, value in teacher.state_dict().items())


def test_a_block_whose_error_does_not_fall_stays_as_it_was() -> None:
    student, teacher = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    reports = reconstruct(student, teacher, rows(), steps=2, lr=10.0, batch=4)
    assert all(report.after == report.before for report in reports)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_reconstruction_goes_on_after_the_last_block_bit_for_bit() -> None:
    whole, teacher = pair()
    kept: dict[int, tuple[dict[str, Tensor], BlockReport]] = {}

    def save(index: int, block: nn.Module, report: BlockReport) -> None:
        kept[index] = {name: value.clone() for name, value in block.state_dict().items()}, report

    reports = reconstruct(whole, teacher, rows(), **OPTIONS, save=save)
    student, _ = pair()

    def saved(index: int, block: nn.Module) -> BlockReport | None:
        if index > 0:
            return None
        block.load_state_dict(kept[0][0])
        return kept[0][1]

    assert reconstruct(student, teacher, rows(), **OPTIONS, saved=saved) == reports
    for name, value in whole.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_tokens_count_by_their_own_size() -> None:
    wanted = torch.randn(1, 3, 8)
    wanted[0, 0] *= 1000
    output = wanted * torch.tensor([1.1, 1.0, 1.2])[None, :, None]
    assert block_error(output, wanted).item() == pytest.approx((0.01 + 0 + 0.04) / 3, rel=1e-4)


def test_models_whose_blocks_cannot_run_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="rows must be a multiple of the batch, 4; got 6"):
        reconstruct(student, teacher, rows(6), batch=4)
    flat = nn.Sequential(BitLinear(8, 8), BitLinear(8, 8))
    with pytest.raises(ValueError, match="in 0 lists of modules"):
        reconstruct(flat, flat, rows())
    calls = iter(range(100))
    forward = type(student.model.rotary_emb).forward

    def other_each_time(self: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        return tuple(t + next(calls) for t in forward(self, *args, **kwargs))

    monkeypatch.setattr(type(student.model.rotary_emb), "forward", other_each_time)
    with pytest.raises(ValueError, match="values that depend on the text"):
        reconstruct(student, teacher, rows(), **OPTIONS)


def test_gpt2_has_blocks_too() -> None:
    teacher = gpt2()
    student = copy.deepcopy(teacher)
    bitnet.replace_linear(student)
    reports = reconstruct(student, teacher, rows(8), steps=20, lr=5e-3, batch=4)
    assert [report.name for report in reports] == ["transformer.h.0", "transformer.h.1"]


# In a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    llama(vocab_size=257).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text("\n".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n" for i in range(200)))
    return path


def options(folder: Path, out: Path, **changes: object) -> TrainOptions:
    chosen = {"model": str(folder), "teacher": str(folder), "data": str(folder / "text.txt"), "device": "cpu"}
    chosen |= {"context": 32, "batch": 2, "steps": 3, "eval_tokens": 200, "out": str(out), "held_out": 0.1}
    return TrainOptions(**chosen | {"reconstruct": 6, "reconstruct_rows": 8, "reconstruct_lr": 1e-3} | changes)  # type: ignore[arg-type]


def test_a_run_reconstructs_first_and_then_quantizes_from_its_first_step(folder: Path, tmp_path: Path) -> None:
    report = job.train(options(folder, tmp_path / "run"), QUIET)
    assert report["options"]["strength_start"] == report["options"]["strength_end"] == 0
    assert [row["step"] for row in report["metrics"] if "bits_per_byte" in row][:2] == [0, 0]
    (found,) = [row["blocks"] for row in report["metrics"] if "blocks" in row]
    assert [row["name"] for row in found] == ["model.layers.0", "model.layers.1"]
    assert report["logits_difference"] == 0


def test_a_run_that_was_killed_in_its_reconstruction_repeats_no_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job.train(options(folder, tmp_path / "whole"), QUIET)
    trained: list[nn.Module] = []
    make = blocks.make_optimizers

    def killed(block: nn.Module, *args: object, **kwargs: object) -> object:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(block)
        return make(block, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "make_optimizers", killed)
    with pytest.raises(KeyboardInterrupt):
        job.train(options(folder, tmp_path / "run"), QUIET)
    monkeypatch.setattr(
        blocks, "make_optimizers", lambda *args, **kwargs: (trained.append(args[0]), make(*args, **kwargs))[1]
    )
    report = job.resume(tmp_path / "run", QUIET)
    assert len(trained) == 2
    assert report["losses"] == wanted["losses"]
    assert json.dumps(report["metrics"][-1]) == json.dumps(wanted["metrics"][-1])


def test_options_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    for changes in ({"teacher": None}, {"weights": "float"}, {"reconstruct": -1}):
        with pytest.raises(ValueError, match="--reconstruct N needs"):
            options(folder, tmp_path / "run", **changes).check()
    with pytest.raises(ValueError, match="but 10,000 are asked for"):
        job.train(options(folder, tmp_path / "run", reconstruct_rows=10_000), QUIET)
