"""Two processes, over gloo on the CPU, train what one trains: FSDP2, DDP, Trainer and `bitnet train`.

They add each other's gradients, so their steps are, to the last bit, those of one process that accumulates their
shares. One process that takes the whole batch at once adds in another order; in float32 that can turn a code over, from
where on the two part. In float64 it does not, as layers round to float32 what they quantize.

All checks run in one pair of processes, which write down what the tests look at.
"""

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import bitnet
from bitnet.jobs import train as job
from bitnet.train.data import PackedRows
from bitnet.train.evaluate import spread_loss
from bitnet.train.loop import Loop
from bitnet.train.monitors import Monitor
from bitnet.train.optimizers import make_optimizers
from bitnet.train.options import TrainOptions
from bitnet.train.processes import Processes
from bitnet.train.schedule import Schedule

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

WORLD, STEPS, BATCH, LENGTH = 2, 20, 8, 12
SPECS: dict[str, dict[str, Any]] = {"tensor": {}, "row": {"per_row": True}, "group": {"group_size": 32}}
QUIET = Console(quiet=True)


def small(dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).to(dtype)
    bitnet.replace_linear(model, **options)
    return model


def batches(seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def trained(
    model: nn.Module, rank: int = 0, world: int = 1, parts: int = 1, optimizer: Any = torch.optim.AdamW
) -> list[float]:
    """The losses of a usual loop, on this process's share of every batch, which is cut into parts that accumulate."""
    stepper, losses = optimizer(model.parameters(), lr=1e-3), []
    for rows in batches():
        total = torch.zeros((), dtype=torch.float64)
        for part in rows.chunk(world)[rank].chunk(parts):
            logits = model(input_ids=part[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / parts
            loss.backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        stepper.step()
        stepper.zero_grad()
        losses.append(total.item() / world)
    return losses


def sharded(model: LlamaForCausalLM, by: str = "block", **options: Any) -> Any:
    for block in model.model.layers if by == "block" else []:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    bitnet.pack(model)
    return {name: t.clone() for name, t in model.state_dict().items()}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "was not refused"


# What the two processes do. Each returns what the first's tests look at.


def fsdp(rank: int, folder: Path) -> dict[str, Any]:
    found, alone = {}, {}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        **{spec: (options, {}) for spec, options in SPECS.items()},
        "whole model": ({}, {"by": "model"}),
        "kept gathered": ({}, {"reshard_after_forward": False}),
        "checkpointing": ({}, {}),
    }
    for case, (options, how) in cases.items():
        model = small(**options)
        if case == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = trained(sharded(model, **how), rank, WORLD)
        whole = bitnet.gather(model)
        assert (whole is None) == (rank > 0)
        if whole is not None:
            if options or case == "tensor":
                one = small(**options)
                expected = trained(one, parts=WORLD), packed_bytes(one)
                alone[str(options)] = expected
            found[case] = losses, packed_bytes(whole), *alone[str(options)]
    return found


class Muons:
    """Muon for a model's matrices and AdamW for the rest, as one optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = make_optimizers(model, lr=1e-2)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def muon(rank: int, folder: Path) -> dict[str, Any]:
    """Muon orthogonalizes whole matrices, of which each process has a part."""
    model = small(torch.float64)
    steppers = Muons(sharded(model))
    losses = trained(model, rank, WORLD, optimizer=lambda *_, **__: steppers)
    whole = bitnet.gather(model)
    if whole is None:
        return {}
    one = small(torch.float64)
    steppers = Muons(one)
    alone = trained(one, parts=WORLD, optimizer=lambda *_, **__: steppers)
    return {"losses": losses, "alone": alone, "packed": packed_bytes(whole), "packed alone": packed_bytes(one)}


def whole_batches(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for spec, options in SPECS.items():
        model = small(torch.float64, **options)
        losses = trained(sharded(model), rank, WORLD)
        whole = bitnet.gather(model)
        if whole is not None:
            one = small(torch.float64, **options)
            found[spec] = losses, packed_bytes(whole), trained(one), packed_bytes(one)
    return found


def ddp(rank: int, folder: Path) -> dict[str, Any]:
    before = nn.parallel.DistributedDataParallel(small())
    float_one = LlamaForCausalLM(small().config)
    float_one.load_state_dict(small().state_dict())
    after = nn.parallel.DistributedDataParallel(float_one)
    bitnet.replace_linear(after)
    found = {"before": trained(before, rank, WORLD), "after": trained(after, rank, WORLD)}
    whole = bitnet.gather(before)
    if whole is None:
        return {}
    one = small()
    found["one"] = trained(one, parts=WORLD)
    bitnet.pack(before)
    bitnet.save(before, folder / "saved")
    loaded = {name: t.clone() for name, t in bitnet.load(folder / "saved").state_dict().items()}
    return found | {"gathered": packed_bytes(whole), "loaded": loaded, "packed": packed_bytes(one)}


def mixed(rank: int, folder: Path) -> dict[str, Any]:
    model = small()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    trained(sharded(model, mp_policy=policy), rank, WORLD)
    ids = batches()[0][:, :-1]
    with torch.no_grad():
        seen = model.eval()(input_ids=ids).logits
    whole = bitnet.gather(model)
    if whole is None:
        return {}
    assert isinstance(whole, LlamaForCausalLM)
    dtypes = {p.dtype for p in whole.parameters()}
    bitnet.pack(whole)
    bitnet.save(whole, folder / "mixed")
    with torch.no_grad():
        loaded = bitnet.load(folder / "mixed")(input_ids=ids).logits
        return {"dtypes": dtypes, "seen": seen, "packed": whole(input_ids=ids).logits, "loaded": loaded}


def outside(rank: int, folder: Path) -> dict[str, Any]:
    """Everything that looks at parameters outside of a forward."""
    model, one = small(layers=2), small(layers=2)
    monitors = [Monitor(sharded(model), every=1), Monitor(one, every=1)]
    for monitor in monitors:
        monitor.before_step(1)
    for p in (*model.parameters(), *one.parameters()):
        p.data.mul_(-1)
    looks = [monitor.after_step(1) for monitor in monitors]
    bitnet.set_strength(model, 0.5)
    strengths = {float(m.strength) for m in model.modules() if isinstance(m, bitnet.BitLinear)}
    kept = str(bitnet.replace_linear(sharded(LlamaForCausalLM(model.config))))
    return {
        "looks": looks,
        "layers": [{layer["name"]: layer for layer in monitor.history[0]["layers"]} for monitor in monitors],
        "strengths": strengths,
        "pack": refusal(lambda: bitnet.pack(model)),
        "head": refusal(lambda: bitnet.pack(model, head="int8")),
        "save": refusal(lambda: bitnet.save(model, folder / "never")),
        "there": (folder / "never").exists(),
        "replace": kept,
    }


def tensor_parallel(rank: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    layer = parallelize_module(nn.Sequential(bitnet.BitLinear(16, 8)), mesh, {"0": ColwiseParallel()})
    found = {"gather": refusal(lambda: bitnet.gather(layer))}
    for strength in (0.0, 0.5, 1.0):
        bitnet.set_strength(layer, strength)
        found[f"forward {strength}"] = refusal(lambda: layer(torch.randn(4, 16)))
    if rank == 0:
        model = small()
        bitnet.save(model, folder / "latent")
        bitnet.pack(model)
        bitnet.save(model, folder / "packed")
    dist.barrier()
    for form in ("latent", "packed"):
        found[form] = refusal(lambda form=form: LlamaForCausalLM.from_pretrained(folder / form, tp_plan="auto"))
    return found


def trainer(rank: int, folder: Path) -> dict[str, Any]:
    """transformers' Trainer, which wraps the model in DistributedDataParallel."""
    model = small()
    rows = [{"input_ids": row, "labels": row} for row in batches()[0]]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    found = Trainer(model, arguments, train_dataset=rows, callbacks=[bitnet.StrengthCallback(0, 0.5)])  # type: ignore[arg-type]
    assert found.args.world_size == WORLD
    found.train()
    whole = bitnet.gather(found.model_wrapped)
    if whole is None:
        return {}
    assert type(found.model_wrapped) is nn.parallel.DistributedDataParallel
    strengths = {float(m.strength) for m in whole.modules() if isinstance(m, bitnet.BitLinear)}
    return {"strengths": strengths, "same": packed_bytes(whole), "packed": packed_bytes(model)}


def options(folder: Path, name: str, **changes: Any) -> TrainOptions:
    text = folder / "text.py"
    if not text.exists():
        text.write_text("\n".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n" for i in range(200)))
    architecture = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    chosen = {"architecture": architecture | {"num_attention_heads": 2, "num_key_value_heads": 2}, "device": "cpu"}
    chosen |= {"data": str(text), "context": 32, "batch": 4, "steps": 12, "lr": 1e-2, "held_out": 0.1}
    chosen |= {
        "eval_tokens": 600,
        "monitor_every": 5,
        "eval_every": 6,
        "checkpoint_every": 4,
        "out": str(folder / name),
    }
    return TrainOptions(**chosen | changes)


def reconstructed(folder: Path) -> dict[str, Any]:
    """Options for a model in training that follows the float model with its weights."""
    start = {"architecture": None, "model": str(folder / "start"), "teacher": str(folder / "float"), "steps": 2}
    return start | {"reconstruct": 16, "reconstruct_lr": 1e-2}


def command(rank: int, folder: Path) -> dict[str, Any]:
    """`bitnet train`, once through, and once with dropout, stopped in one process and resumed in both."""
    if rank == 0:
        options(folder, "")
    dist.barrier()
    found: dict[str, Any] = {"through": job.train(options(folder, "through"), QUIET)}
    dropout = {"architecture": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}}
    found["dropout"] = job.train(options(folder, "dropout", **dropout), QUIET)
    step = Loop.one_step

    def stopped(loop: Loop) -> None:
        step(loop)
        loop.stop |= loop.step == 6 and rank == 1  # a signal that one of them gets

    Loop.one_step = stopped  # type: ignore[method-assign]
    try:
        job.train(options(folder, "resumed", **dropout), QUIET)
        raise AssertionError("not stopped")
    except KeyboardInterrupt:
        found["checkpoints"] = sorted(path.name for path in (folder / "resumed" / "checkpoints").iterdir())
    finally:
        Loop.one_step = step  # type: ignore[method-assign]
    dist.barrier()
    found["resumed"] = job.resume(folder / "resumed", QUIET)
    dist.barrier()
    if rank == 0:
        os.remove(folder / "resumed" / "report.json")
        facts = folder / "resumed" / "checkpoints" / "step-00000012" / "training.json"
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"processes": 3}))
    dist.barrier()
    found["other world"] = refusal(lambda: job.resume(folder / "resumed", QUIET))
    if rank == 0:
        for name in ("start", "float"):
            shutil.copytree(folder / "through" / "checkpoints" / "step-00000012", folder / name)
        config = json.loads((folder / "float" / "config.json").read_text())
        del config["quantization_config"]
        (folder / "float" / "config.json").write_text(json.dumps(config))
    dist.barrier()
    found["blocks"] = job.train(options(folder, "blocks", **reconstructed(folder)), QUIET)
    found["dry run"] = refusal(lambda: job.rehearse(options(folder, "dry"), QUIET))
    found["writes"] = sorted(path.name for path in (folder / "through").rglob("*"))
    return found


def unequal(rank: int, folder: Path) -> dict[str, Any]:
    """Gradients and scores of processes that do not have the same to do."""
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    none = nn.Parameter(torch.zeros(2))
    processes = Processes(rank, WORLD)
    (used.sum() * (rank + 1) + (unused.sum() if rank else 0)).backward()
    processes.sum_gradients([used, unused, none])
    model, ids = small(), batches()[:, 0].flatten()
    scores = [spread_loss(model, ids, 16, scored, processes=processes) for scored in (8, 80)]  # one stretch; many
    alone = [spread_loss(model, ids, 16, scored) for scored in (8, 80)]
    starts = torch.arange(0, len(ids), 5)  # every fifth token is no label, but not as many in every row

    def looped(processes: Processes, accumulation: int) -> list[float]:
        learner = small(torch.float64)
        rows = PackedRows(ids, starts, 2, 7)
        optimizers = make_optimizers(learner, lr=1e-3)
        return Loop(learner, rows, optimizers, Schedule(6), accumulation=accumulation, processes=processes).run()

    losses = looped(processes, 2), looped(Processes(), 4)
    return {"losses": losses, "gradients": (used.grad, unused.grad, none.grad), "scores": scores, "alone": alone}


CHECKS = (fsdp, muon, whole_batches, ddp, mixed, outside, tensor_parallel, trainer, command, unequal)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found = {}
    for check in CHECKS:
        here = Path(folder) / check.__name__
        here.mkdir(exist_ok=True)
        found[check.__name__] = check(rank, here)
        dist.barrier()
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=WORLD)
    return {str(rank): torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(WORLD)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes write."""
    return tmp_path_factory.mktemp("processes")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(t.equal(other[name]) for name, t in one.items())


CASES = [*SPECS, "whole model", "kept gathered", "checkpointing"]


@pytest.mark.parametrize("case", CASES)
def test_fsdp_trains_what_one_process_trains_that_accumulates_the_shares(found: dict[str, Any], case: str) -> None:
    losses, packed, losses_alone, packed_alone = found["0"]["fsdp"][case]
    assert len(losses) == STEPS
    assert losses == losses_alone
    assert same(packed, packed_alone)


def test_muon_trains_shards_as_it_does_whole_matrices(found: dict[str, Any]) -> None:
    muon = found["0"]["muon"]
    assert muon["losses"] == pytest.approx(muon["alone"], abs=1e-9)
    codes = {name: t for name, t in muon["packed"].items() if t.dtype == torch.uint8}
    assert len(codes) == 7
    assert same(codes, {name: muon["packed alone"][name] for name in codes})


@pytest.mark.parametrize("spec", SPECS)
def test_in_float64_two_processes_also_train_what_one_does_with_whole_batches(found: dict[str, Any], spec: str) -> None:
    losses, packed, losses_alone, packed_alone = found["0"]["whole_batches"][spec]
    assert losses == pytest.approx(losses_alone, abs=1e-5)
    codes = {name: t for name, t in packed.items() if t.dtype == torch.uint8}
    assert len(codes) == 7
    assert same(codes, {name: packed_alone[name] for name in codes})


@pytest.mark.parametrize("swapped", ["before", "after"])
def test_ddp_trains_what_one_process_trains(found: dict[str, Any], swapped: str) -> None:
    ddp = found["0"]["ddp"]
    assert ddp[swapped] == ddp["one"]


def test_what_ddp_trained_is_packed_saved_and_gathered_as_it_is(found: dict[str, Any]) -> None:
    ddp = found["0"]["ddp"]
    assert same(ddp["gathered"], ddp["packed"])
    assert same(ddp["loaded"], ddp["packed"])


def test_what_a_policy_rounds_before_it_is_quantized_is_packed_like_that(found: dict[str, Any]) -> None:
    """Fails if the float32 masters are packed, whose codes are others."""
    mixed = found["0"]["mixed"]
    assert mixed["dtypes"] == {torch.bfloat16}
    assert mixed["packed"].equal(mixed["seen"])
    assert mixed["loaded"].equal(mixed["seen"])


def test_a_sharded_model_is_monitored_like_a_whole_one(found: dict[str, Any]) -> None:
    for rank in found:
        outside = found[rank]["outside"]
        assert outside["looks"][0] == pytest.approx(outside["looks"][1])
        assert len(outside["layers"][0]) == 14
        assert outside["layers"][0] == outside["layers"][1]
        assert outside["strengths"] == {0.5}


def test_a_sharded_model_is_packed_and_saved_gathered_only(found: dict[str, Any]) -> None:
    outside = found["1"]["outside"]
    for call in ("pack", "head", "save"):
        assert "model.embed_tokens.weight is sharded" in outside[call]
        assert "bitnet.gather(model)" in outside[call]
    assert not outside["there"]
    assert "its weight is sharded; swap before fully_shard" in outside["replace"]


def test_tensor_parallelism_is_refused(found: dict[str, Any]) -> None:
    parallel = found["0"]["tensor_parallel"]
    for strength in (0.0, 0.5, 1.0):
        assert "a part of its weight" in parallel[f"forward {strength}"]
    assert "sharded, but not by torch's fully_shard" in parallel["gather"]
    assert "tp_size=2: low-bit layers cannot be spread" in parallel["latent"]
    assert "tp_size=2: low-bit layers cannot be spread" in parallel["packed"]


def test_a_trainer_in_two_processes_leaves_a_model_to_pack(found: dict[str, Any]) -> None:
    assert found["0"]["trainer"]["strengths"] == {1.0}
    assert same(found["0"]["trainer"]["same"], found["0"]["trainer"]["packed"])


def test_gradients_that_some_processes_lack_are_summed(found: dict[str, Any]) -> None:
    for rank in found:
        used, unused, none = found[rank]["unequal"]["gradients"]
        assert used.tolist() == [3, 3]
        assert unused.tolist() == [1, 1]
        assert none is None


def test_a_loop_counts_every_label_of_all_processes_alike(found: dict[str, Any]) -> None:
    for rank in found:
        losses, alone = found[rank]["unequal"]["losses"]
        assert losses == pytest.approx(alone, abs=1e-5)


def test_processes_score_every_stretch_once(found: dict[str, Any]) -> None:
    for rank in found:
        unequal = found[rank]["unequal"]
        assert unequal["scores"] == pytest.approx(unequal["alone"], rel=1e-6)


def test_the_command_trains_what_one_process_trains(found: dict[str, Any], tmp_path: Path) -> None:
    reports = [found[rank]["command"]["through"] for rank in found]
    assert reports[0] == reports[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = job.train(options(tmp_path, "alone", batch=2, accumulation=2), QUIET)
    finally:
        torch.set_num_threads(threads)
    assert reports[0]["losses"] == alone["losses"]
    assert reports[0]["layers"] == alone["layers"]
    assert reports[0]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert reports[0]["logits_difference"] == 0
    for fact in ("steps", "tokens_per_step", "epochs"):
        assert reports[0][fact] == alone[fact]
    written = {path.name for path in (tmp_path / "alone").rglob("*")}
    assert set(found["0"]["command"]["writes"]) == written


def test_the_command_stops_all_processes_and_goes_on_with_as_many(found: dict[str, Any]) -> None:
    command = found["1"]["command"]
    assert command["checkpoints"] == ["step-00000004", "step-00000006"]
    assert command["resumed"]["losses"] == command["dropout"]["losses"]
    assert command["resumed"]["bits_per_byte"] == command["dropout"]["bits_per_byte"]
    assert "one of 3 processes, and goes on with as many; here are 2" in command["other world"]
    assert "--dry-run measures one process" in command["dry run"]


def test_blocks_that_the_first_process_reconstructs_are_all_processes_blocks(
    found: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    two = found["0"]["command"]["blocks"]
    assert two == found["1"]["command"]["blocks"]
    one = job.train(options(tmp_path, "alone", **reconstructed(folder / "command")), QUIET)
    assert two["metrics"][1]["blocks"][0]["after"] < 0.9 * two["metrics"][1]["blocks"][0]["before"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["logits_difference"] == 0


def test_rows_that_processes_cannot_share_evenly_are_refused(tmp_path: Path) -> None:
    from bitnet.jobs.setup import build, prepare, tokenized, tokenizer_for

    chosen = options(tmp_path, "run")
    tokenizer = tokenizer_for(chosen)
    texts = tokenized(chosen, tokenizer, tmp_path / "data", QUIET)
    model = build(chosen, tokenizer, QUIET)
    with pytest.raises(ValueError, match="--batch 4 are the rows of all processes together, which 3 cannot share"):
        prepare(chosen, model, tokenizer, *texts, Processes(0, 3))
