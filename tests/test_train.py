"""Training as a library: schedules, data, the loop, evaluation, monitors, distillation."""

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import gpt2, llama, mixtral
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import bitnet
from bitnet.linear import BitLinear
from bitnet.quantize import quantize_latent
from bitnet.train import texts
from bitnet.train.data import IGNORED, PackedRows, Windows, build_tokenizer, row_at
from bitnet.train.distill import Distillation, attention_relation, logit_kl
from bitnet.train.evaluate import score, spread_loss, windows
from bitnet.train.loop import Loop, next_token_loss
from bitnet.train.monitors import Monitor
from bitnet.train.optimizers import make_optimizers, optimizer_state, restore_optimizers, split_parameters
from bitnet.train.schedule import KINDS, SECOND_PEAK, Schedule
from bitnet.train.strength import set_strength


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_a_learning_rate_rises_and_then_never_does(kind: str, steps: int) -> None:
    schedule = Schedule(steps, kind, warmup=0.1)  # type: ignore[arg-type]
    rates = [schedule.lr(step) for step in range(steps)]
    top = max(1, round(0.1 * steps)) - 1
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[top] == 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_schedules_have_the_values_of_their_formulas() -> None:
    def at(kind: str, step: int) -> float:
        return Schedule(1000, kind, warmup=0.1, final_lr=0.2, decay=0.5).lr(step)  # type: ignore[arg-type]

    assert at("linear", 550) == pytest.approx(0.6)
    assert at("cosine", 550) == pytest.approx(0.6)
    assert at("cosine", 325) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert at("wsd", 549) == 1
    assert at("wsd", 775) == pytest.approx(0.6)
    assert at("two-stage", 499) == pytest.approx(1 - 399 / 900)
    assert at("two-stage", 500) == pytest.approx(SECOND_PEAK * (1 - 400 / 900))
    stages = Schedule(1000, "two-stage")
    assert [stages.weight_decay(step) for step in (0, 499, 500, 999)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 9, "kind": "step"}, "schedule must be one of linear"),
        ({"steps": 9, "warmup": 2}, r"warmup is a share and must lie in \[0, 1\]"),
        ({"steps": 9, "strength_start": 0.8}, r"start=0\.8, end=0\.7"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def flat(rows: Iterable[list[int]]) -> list[int]:
    return [item for row in rows for item in row]


def stream(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Documents whose tokens say which document and which place in it: 100 * document + place."""
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    return torch.cat([100 * i + torch.arange(n) for i, n in enumerate(lengths)]), starts


@pytest.mark.parametrize("lengths", [[50], [3, 4, 1, 20, 2, 2, 9, 8], [7, 7, 7, 7], [1] * 30], ids=str)
@pytest.mark.parametrize("context", [2, 7, 8])
def test_rows_know_their_documents(lengths: list[int], context: int) -> None:
    ids, starts = stream(lengths)
    for first in range(0, len(ids) - context, context):
        row = row_at(ids, starts, first, context)
        assert row["input_ids"].equal(ids[first : first + context])
        for t in range(context):
            token, follower = int(ids[first + t]), int(ids[first + t + 1])
            same = follower // 100 == token // 100
            assert row["labels"][t] == (follower if same else IGNORED)
            begun = max(first, int(starts[token // 100]))  # its document, or the row, begins there
            assert row["position_ids"][t] == first + t - begun


def test_every_row_comes_once_an_epoch_in_another_order() -> None:
    ids, starts = stream([64])
    rows = PackedRows(ids, starts, batch=3, context=7, seed=5)
    assert rows.rows == 9
    seen = [rows[index]["input_ids"][:, 0].tolist() for index in range(6)]
    first, second = flat(seen[:3]), flat(seen[3:])
    assert sorted(first) == sorted(second) == list(range(0, 63, 7))
    assert first != second
    others = PackedRows(ids, starts, batch=3, context=7, seed=6)
    assert first != flat(others[index]["input_ids"][:, 0].tolist() for index in range(3))


@pytest.mark.parametrize("kind", ["windows", "rows"])
def test_a_batch_is_a_function_of_its_number(kind: str) -> None:
    ids, starts = stream([40, 30, 60])

    def batches():  # type: ignore[no-untyped-def]
        return Windows(ids, 4, 8, seed=3) if kind == "windows" else PackedRows(ids, starts, 4, 8, seed=3)

    whole, jumping = batches(), batches()
    expected = {index: whole[index] for index in range(12)}
    for index in (7, 2, 11, 0, 11):
        found = jumping[index]
        assert found.keys() == expected[index].keys()
        assert all(found[key].equal(expected[index][key]) for key in found)


def test_documents_in_a_row_do_not_see_each_other() -> None:
    model = llama()
    first, second = torch.randint(0, 64, (2, 9))
    row = row_at(torch.cat([first, second]), torch.tensor([0, 9]), 0, 17)
    with torch.no_grad():
        together = model(
            input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False
        ).logits
        alone = [model(input_ids=ids[None], use_cache=False).logits for ids in (first, second[:-1])]
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-5)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="has 8 tokens, fewer than one row of context 8"):
        PackedRows(*stream([8]), batch=1, context=8)


def test_documents_come_from_every_kind_of_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n\n{"body": "three"}\n')
    data = datasets.Dataset.from_dict({"body": ["four", "five"]})
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "c.parquet")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "saved", "c.parquet")]
    found = list(texts.documents(files, "body"))
    assert found == [
        ("one\n", 0),
        ("two", 1),
        ("three", 1),
        *[(w, 2) for w in ("four", "five")],
        *[(w, 3) for w in ("four", "five")],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "x"}', r"line 2: no text at 'text' \(it has 'content'\).*--column"),
        ("missing.txt", None, "no such file"),
        ("", None, "not one that datasets saved"),
    ],
)
def test_files_without_text_are_refused_by_name(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        list(texts.documents([tmp_path / name]))
    assert str(tmp_path / name) in str(error.value)


def test_what_is_held_out_is_not_trained_on() -> None:
    many = [(f"document {i}\n", 0) for i in range(100)]
    training, held_out = texts.split(many, 0.1, 10**6)
    kept = list(training)
    assert len(held_out) == 10
    assert sorted(kept + held_out) == sorted(text for text, _ in many)
    alone = "".join(f"line {i}\n" for i in range(1000))
    training, held_out = texts.split([(alone, 0), ("short", 1)], 0.1, 10**6)
    kept = list(training)
    assert kept[0] + held_out[0] == alone
    assert 0.08 < len(held_out[0]) / len(alone) < 0.12
    training, held_out = texts.split(many, 0.1, 25)  # the limit
    assert len(list(training)) == 98
    assert len(held_out) == 2
    training, held_out = texts.split(many, 0, 10**6)
    assert len(list(training)) == 100
    assert held_out == []


def test_tokens_on_disk_are_those_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["one", "", "zwölf", "x" * 50]
    found = texts.tokenize(words, build_tokenizer(), tmp_path / "t.bin")
    expected = [[256, *word.encode(), 256] for word in words if word]
    assert found.ids.tolist() == flat(expected)
    assert found.starts.tolist() == [0, 5, 13]
    assert found.text_bytes == 59
    assert texts.mapped(tmp_path / "t.bin").ids.equal(found.ids)
    monkeypatch.setattr(texts, "BATCH", 7)  # longer documents in pieces
    assert texts.tokenize([*words, "ab\n" * 9], build_tokenizer(), tmp_path / "p.bin").ids.tolist() == [
        *flat(expected),
        *[256, *b"ab\n" * 9, 256],
    ]
    (tmp_path / "t.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="has 4 bytes"):
        texts.mapped(tmp_path / "t.bin")


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    for model in (llama(), llama(tie_word_embeddings=True), gpt2(), mixtral()):
        matrices, others = split_parameters(model)
        names = {id(p): name for name, p in model.named_parameters()}
        assert {id(p) for p in matrices} | {id(p) for p in others} == set(names)
        assert all("embed" not in names[id(p)] and "lm_head" not in names[id(p)] and p.ndim > 1 for p in matrices)
        assert all(p.ndim == 1 or any(w in names[id(p)] for w in ("embed", "lm_head", "wte", "wpe")) for p in others)
        model.requires_grad_(False)
        assert split_parameters(model) == ([], [])


def test_norms_and_biases_do_not_decay() -> None:
    for kind in ("muon", "adamw"):
        optimizers = make_optimizers(gpt2(), kind, lr=1e-3)
        decays = {(p.ndim > 1, g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]}
        assert decays == {(True, 0.1), (False, 0.0)}
    with pytest.raises(ValueError, match="optimizer must be 'muon' or 'adamw'"):
        make_optimizers(gpt2(), "sgd", lr=1)


def loop(steps: int = 8, seed: int = 0, **options) -> Loop:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    model = options.pop("model", None) or llama()
    bitnet.replace_linear(model)
    ids = torch.randint(0, 64, (600,), generator=torch.Generator().manual_seed(1))
    batches = options.pop("batches", None) or Windows(ids, options.pop("batch", 2), 16)
    return Loop(model, batches, make_optimizers(model, lr=1e-2), Schedule(steps), **options)


def test_a_run_goes_on_from_its_state_bit_for_bit() -> None:
    whole = loop(monitor=None)
    whole.run()
    part = loop()
    for _ in range(5):
        part.one_step()
    tensors, facts = part.state()
    weights = {name: value.clone() for name, value in part.model.state_dict().items()}
    later = loop(seed=9)
    later.model.load_state_dict(weights)
    later.restore(tensors, facts)
    assert later.run() == whole.losses
    for name, value in whole.model.state_dict().items():
        assert later.model.state_dict()[name].equal(value)


def test_a_state_of_another_model_is_refused() -> None:
    one = loop()
    one.one_step()
    tensors, numbers = optimizer_state(one.model, one.optimizers)
    other = llama(hidden_size=32)
    with pytest.raises(ValueError, match="of shape"):
        restore_optimizers(other, make_optimizers(other, lr=1), tensors, numbers)
    other = gpt2()
    with pytest.raises(ValueError, match="not of this model"):
        restore_optimizers(other, make_optimizers(other, lr=1), tensors, numbers)


class Halves:
    """Each batch of another in two parts, with different numbers of labels."""

    def __init__(self, batches: Windows) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index // 2]
        part = {key: value.split([1, 3])[index % 2] for key, value in batch.items()}
        return part


def test_accumulation_takes_the_step_of_one_large_batch() -> None:
    ids = torch.randint(0, 64, (600,))
    batches = Windows(ids, 4, 16)
    together, parts = loop(batches=batches), loop(batches=Halves(batches), accumulation=2)
    for each in (together, parts):
        set_strength(each.model, 0)
        each.schedule = Schedule(8, strength_start=0.9, strength_end=0.9)  # float: sums in another order stay close
        each.one_step()
    assert parts.losses == pytest.approx(together.losses, rel=1e-5)
    for a, b in zip(together.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_schedule_moves_learning_rates_weight_decay_and_strength() -> None:
    run = loop(10)
    run.schedule = Schedule(10, "two-stage", warmup=0.1, strength_start=0.2, strength_end=0.6)
    layer = next(m for m in run.model.modules() if isinstance(m, BitLinear))
    seen = []
    run.run(after=[lambda each: seen.append((float(layer.strength), each.optimizers[0].param_groups[0]))])  # type: ignore[arg-type]
    assert [strength for strength, _ in seen] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    group = run.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(1e-2 * run.schedule.lr(9))
    assert group["weight_decay"] == 0


def test_clipping_autocast_and_checkpointing_train() -> None:
    run = loop(4, clip=1e-9, autocast=torch.bfloat16)
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.run()
    total = torch.stack([s["exp_avg"].abs().max() for s in run.optimizers[1].state.values()]).max()
    assert total < 1e-9
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    run = loop(4, loss=lambda model, batch: next_token_loss(model, batch) * (math.nan if run.step == 2 else 1))
    with pytest.raises(RuntimeError, match="the loss of step 3 is nan: training diverged"):
        run.run()


def test_a_run_that_is_told_to_stop_finishes_its_step() -> None:
    run = loop(6)

    def stop(each: Loop) -> None:
        each.stop = each.step == 3

    assert len(run.run(after=[stop])) == 3


@pytest.mark.parametrize(("length", "context", "stride"), [(2, 8, 4), (9, 8, 8), (30, 8, 3), (31, 8, 1), (5, 8, 8)])
def test_windows_score_every_token_once_behind_enough_text(length: int, context: int, stride: int) -> None:
    ids = torch.arange(length)
    inputs, labels = windows(ids, context, stride)
    scored = labels[labels != IGNORED]
    assert sorted(scored.tolist()) == list(range(1, length))
    for row, targets in zip(inputs, labels, strict=True):
        for t in (targets != IGNORED).nonzero().flatten().tolist():
            assert targets[t] == row[t] + 1
            assert t + 1 >= min(int(targets[t]), context - stride + 1)


def test_a_score_is_the_sum_over_tokens_of_the_models_own_logits() -> None:
    one, other = llama(), llama()
    ids = torch.randint(0, 64, (41,))
    found = score([one, other], [(ids, 100), (ids[:5], 10)], context=64, stride=64)
    with torch.no_grad():
        logs = [[model(part[None]).logits[0, :-1].log_softmax(-1) for part in (ids, ids[:5])] for model in (one, other)]
    targets = torch.cat([ids[1:], ids[1:5]])
    a, b = (torch.cat(rows) for rows in logs)
    assert found.tokens == 44
    assert found.text_bytes == 110
    assert found.nats[0] == pytest.approx(F.nll_loss(a, targets, reduction="sum").item(), rel=1e-5)
    assert found.kl == pytest.approx((b.exp() * (b - a)).sum(-1).mean().item(), rel=1e-3)
    assert found.agreement == (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    assert found.perplexity() == pytest.approx(math.exp(found.nats[0] / 44))
    assert found.bits_per_byte(1) == pytest.approx(found.nats[1] / math.log(2) / 110)


def test_evaluation_quantizes_fully_in_the_middle_of_a_ramp_and_leaves_the_mode() -> None:
    model = llama()
    bitnet.replace_linear(model)
    ids = torch.randint(0, 64, (200,))
    full = spread_loss(model, ids, 16)
    model.train()
    set_strength(model, 0.0)
    assert spread_loss(model, ids, 16) == full
    assert model.training
    starts = torch.tensor([0, 90, 140])
    assert spread_loss(model, ids, 16, starts=starts) != full


def test_a_monitor_counts_what_a_step_changes() -> None:
    model = nn.Sequential(BitLinear(8, 4, bias=False), nn.ReLU(), BitLinear(4, 4, weights="binary"))
    monitor = Monitor(model, every=2)
    layer = model[0]
    layer.weight.data[0] = 1e-6  # dead
    for step in (1, 2):
        monitor.before_step(step)
        before, _ = quantize_latent(layer.weight, layer.spec)
        layer.weight.data[1] *= -1
        found = monitor.after_step(step)
        assert (found is None) == (step != 2)
    (look,) = monitor.history
    assert look["step"] == 2
    first, second = look["layers"]
    codes, scale = quantize_latent(layer.weight, layer.spec)
    assert first["flips"] == int((before[1] != 0).sum()) / 32
    assert second["flips"] == 0
    assert first["shares"] == [float((codes == code).float().mean()) for code in (-1, 0, 1)]
    assert second["shares"][1] == 0
    assert first["dead_rows"] == 0.25
    error = (layer.weight - codes * scale).norm() / layer.weight.norm()
    assert first["error"] == pytest.approx(error.item(), rel=1e-5)
    assert first["scale"] == pytest.approx(scale.item())


def test_a_monitor_sees_experts() -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    monitor = Monitor(model, every=1)
    monitor.before_step(1)
    assert set(monitor.after_step(1) or {}) == {
        f"bitnet/{n}" for n in ("zeros", "dead_rows", "error", "scale", "flips")
    }
    assert any("experts" in layer["name"] for layer in monitor.history[0]["layers"])


def test_logit_kl_is_its_formula() -> None:
    s, t = torch.randn(2, 5, 7)
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    assert logit_kl(s, t, 3.0).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert logit_kl(t, t, 2.0).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="one vocabulary"):
        logit_kl(s, t[:, :-1])


def test_attention_relation_is_its_formula_whatever_the_padding() -> None:
    s, t = torch.randn(2, 3, 6, 8)
    total = 0.0
    for b in range(3):
        for head in range(2):
            a, c = (x[b, :, 4 * head : 4 * head + 4] for x in (s, t))
            r, q = ((x @ x.T / 2).softmax(-1) for x in (a, c))
            total += (q * (q / r).log()).sum(-1).mean().item()
    assert attention_relation(s, t, 2).item() == pytest.approx(total / 6, rel=1e-4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    assert attention_relation(s, t, 2, mask).item() == pytest.approx(
        attention_relation(s[:, :4], t[:, :4], 2).item(), rel=1e-4
    )
    wide = torch.randn(3, 6, 12)  # a teacher of another width
    assert attention_relation(s, wide, 2) > 0


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}


@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
def test_a_model_that_is_its_teacher_has_nothing_to_learn_from_it(model) -> None:  # type: ignore[no-untyped-def]
    student = model()
    loss = Distillation(student, ce=0, kl=1, relation=1, hidden=1, cosine=1)
    total = loss(student, batch_of(torch.randint(0, 64, (2, 9))))
    assert set(loss.parts) == {"kl", "relation", "hidden", "cosine"}
    assert total.item() == pytest.approx(0, abs=1e-4)


def test_terms_add_up_and_reach_the_student_only() -> None:
    teacher, student = llama(), llama()
    loss = Distillation(teacher, ce=0.5, kl=2, temperature=5, relation=3, hidden=0.1, cosine=0.2)
    batch = batch_of(torch.randint(0, 64, (2, 9)))
    batch["labels"][0, :4] = IGNORED
    total = loss(student, batch)
    assert total.item() == pytest.approx(sum(loss.weights[name] * float(part) for name, part in loss.parts.items()))
    assert loss.parts["ce"].item() == pytest.approx(next_token_loss(student, batch).item(), rel=1e-5)
    total.backward()
    assert all(p.grad is not None for name, p in student.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():  # tokens without labels do not count
        keep = batch["labels"] != IGNORED
        y, t = (m(input_ids=batch["input_ids"]).logits[keep] for m in (student, teacher))
    assert loss.parts["kl"].item() == pytest.approx(logit_kl(y, t, 5.0).item(), rel=1e-4)


def test_relations_train_through_gradient_checkpointing() -> None:
    teacher, gradients = llama(), []
    student = llama().train()
    batch = batch_of(torch.randint(0, 64, (2, 9)))
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.zero_grad()
        Distillation(teacher, ce=0, kl=0, relation=1, layer=1)(student, batch).backward()
        gradients.append([p.grad for p in student.model.layers[0].parameters()])
    assert all(a.abs().sum() > 0 and torch.allclose(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[union-attr]


def test_encoders_learn_hidden_states() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    teacher, student = (BertModel(BertConfig(**sizes, num_hidden_layers=n)) for n in (4, 2))
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    loss = Distillation(teacher, ce=0, kl=0, hidden=1, cosine=1, relation=1, heads=4)
    total = loss(student, {"input_ids": ids, "attention_mask": mask})
    total.backward()
    assert set(loss.parts) == {"relation", "hidden", "cosine"}
    other = ids.clone()
    other[1, 5:] = 1  # padding
    again = loss(student, {"input_ids": other, "attention_mask": mask})
    assert again.item() == pytest.approx(total.item(), rel=1e-3)


def test_distillations_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="one of them not 0"):
        Distillation(llama(), ce=0, kl=0)
    with pytest.raises(ValueError, match="Linear has no projections that are known"):
        Distillation(nn.Linear(2, 2), relation=1)
    with pytest.raises(ValueError, match="no layer 7"):
        Distillation(llama(), relation=1, layer=7)
    with pytest.raises(ValueError, match="ce=0 does without"):
        Distillation(llama())(llama(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_a_student_comes_closer_to_its_teacher() -> None:
    teacher = llama()
    student = llama()
    bitnet.replace_linear(student)
    ids = torch.randint(0, 64, (600,))
    loss = Distillation(teacher, ce=0)
    run = Loop(student, Windows(ids, 8, 16), make_optimizers(student, lr=1e-2), Schedule(60), loss=loss)
    losses = run.run()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
