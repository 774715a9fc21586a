"""What recipes cost in quality: held-out bits per byte against full precision's, on the same bytes in the same order.

    python tests/bench/bench_quality.py [--recipes ramp late ...] [--seeds 3] [--steps 1250 3750] [--hidden 128]

The task is that of `bitnet quickstart`: byte-level Llamas of 4 layers, 1024 bytes a step of the standard library,
scored on files that are held out. The seed decides on the weights at the start and on the batches, so the runs of one
seed are paired. A run takes minutes; each adds its row to quality.csv when it ends, and those that are there are not
made again, so that the command goes on where it was stopped. In the end the table and the picture of all rows there.
"""

import argparse
import csv
import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

import bitnet
from bitnet.quickstart.run import Settings, build_model
from bitnet.train.data import Windows, corpus
from bitnet.train.evaluate import spread_loss
from bitnet.train.loop import Loop, next_token_loss
from bitnet.train.muon import Muon
from bitnet.train.optimizers import split_parameters
from bitnet.train.schedule import Schedule

FILE = Path(__file__).with_name("quality.csv")
FULL = "full precision"
Rows = dict[tuple[str, int, int, int], dict[str, str]]  # by recipe, seed, steps and width


@dataclass(frozen=True)
class Recipe:
    """How a run differs from quickstart's 1.58 bit.

    layers:   options of replace_linear; None trains in full precision
    strength: shares of the steps between which quantization sets in
    kind:     of the schedule
    lr:       multiplies quickstart's learning rates
    adamw:    the learning rate of AdamW for all, instead of Muon for the matrices
    taught:   by the full-precision model of the same seed, KL at temperature 1 beside the text
    tuned:    starts from that model's weights instead of new ones: twice the steps in all, as "full, tuned"
    """

    layers: dict[str, Any] | None = field(default_factory=dict)
    strength: tuple[float, float] = (0.2, 0.7)
    kind: Any = "linear"
    lr: float = 1.0
    adamw: float | None = None
    taught: bool = False
    tuned: bool = False


RECIPES = {
    FULL: Recipe(None),
    "full, lr / 2": Recipe(None, lr=0.5),
    "full, lr x 1.5": Recipe(None, lr=1.5),
    "ramp": Recipe(),
    "from the first step": Recipe(strength=(0, 0)),
    "switch at 0.2": Recipe(strength=(0.2, 0.2)),
    "late ramp": Recipe(strength=(0.5, 0.9)),
    "ramp, lr x 1.5": Recipe(lr=1.5),
    "per row": Recipe({"per_row": True}),
    "groups of 32": Recipe({"group_size": 32}),
    "16-bit activations": Recipe({"activation_bits": 16}),
    "4-bit activations": Recipe({"activation_bits": 4}),
    "4-bit, Hadamard": Recipe({"activation_bits": 4, "hadamard": 64}),
    "Hadamard": Recipe({"hadamard": 64}),
    "RMSNorm inside": Recipe({"rms_norm": True}),
    "two-stage": Recipe(kind="two-stage"),
    "wsd": Recipe(kind="wsd"),
    "full, AdamW": Recipe(None, adamw=6e-3),
    "AdamW": Recipe(adamw=6e-3),
    "b1.58 as published": Recipe({"rms_norm": True}, strength=(0, 0), kind="two-stage", adamw=6e-3),
    "taught": Recipe(taught=True),
    "taught, first step": Recipe(strength=(0, 0), taught=True),
    "taught, tuned": Recipe(strength=(0, 0.5), lr=0.5, taught=True, tuned=True),
    "full, taught": Recipe(None, taught=True),
    "full, tuned": Recipe(None, lr=0.5, tuned=True),
    "binary": Recipe({"weights": "binary"}),
    "binary, taught": Recipe({"weights": "binary"}, taught=True),
    "binary, taught, tuned": Recipe({"weights": "binary"}, strength=(0, 0.5), lr=0.5, taught=True, tuned=True),
    "binary, first step": Recipe({"weights": "binary"}, strength=(0, 0)),
    "binary, groups of 32": Recipe({"weights": "binary", "group_size": 32}),
}
DEFAULT = [FULL, "ramp", "from the first step", "late ramp", "per row", "groups of 32", "binary"]


def settings_of(seed: int, steps: int, hidden: int) -> Settings:
    return Settings(seed=seed, steps=steps, hidden=hidden, intermediate=3 * hidden, heads=hidden // 64)


def train(recipe: Recipe, settings: Settings, data: Tensor, label: str, teacher: Any) -> tuple[Any, float]:
    """The model of a run, and the median seconds of a step."""
    model = build_model(settings)
    if recipe.tuned:
        model.load_state_dict(teacher.state_dict())
    if recipe.layers is not None:
        bitnet.replace_linear(model, **recipe.layers)
    matrices, others = split_parameters(model)
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": settings.weight_decay, "fused": True}
    optimizers: list[torch.optim.Optimizer]
    if recipe.adamw is not None:
        optimizers = [torch.optim.AdamW(matrices + others, lr=recipe.lr * recipe.adamw, **options)]
    else:
        rate, momentum = recipe.lr * settings.muon_lr, settings.muon_momentum
        muon = Muon(matrices, lr=rate, momentum=momentum, weight_decay=settings.weight_decay)
        optimizers = [muon, torch.optim.AdamW(others, lr=recipe.lr * settings.adamw_lr, **options)]
    first, last = recipe.strength
    schedule = Schedule(
        settings.steps,
        recipe.kind,
        warmup=settings.warmup,
        final_lr=settings.final_lr,
        strength_start=first,
        strength_end=last,
    )
    loss = bitnet.Distillation(teacher, ce=1.0, kl=1.0) if recipe.taught else next_token_loss
    batches = Windows(data, settings.batch, settings.context, settings.seed)
    loop = Loop(model, batches, optimizers, schedule, loss=loss)
    times: list[float] = []
    began = time.perf_counter()

    def clock(_: Loop) -> None:
        times.append(time.perf_counter() - began - sum(times))

    loop.run(label, Console(), show=lambda nats: f"{nats / math.log(2):.3f} bits/byte", after=[clock])
    return model.eval(), statistics.median(times)


def full_precision(out: Path, settings: Settings) -> Any:
    folder = out / f"full-{settings.seed}-{settings.steps}-{settings.hidden}"
    if not folder.exists():
        raise SystemExit(f"{folder} is missing: make the run in full precision again, its row taken out of the CSV")
    return LlamaForCausalLM.from_pretrained(folder)


def key(row: dict[str, str]) -> tuple[str, int, int, int]:
    return row["recipe"], int(row["seed"]), int(row["steps"]), int(row["hidden"])


def read(file: Path) -> Rows:
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {key(row): row for row in csv.DictReader(stream)}


def gaps(rows: Rows) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Percent above full precision of the same seed: {(hidden, steps): {recipe: a figure a seed}}."""
    found: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (recipe, seed, steps, hidden), row in sorted(rows.items()):
        full = rows.get((FULL, seed, steps, hidden))
        if full is not None:
            gap = 100 * (float(row["bits_per_byte"]) / float(full["bits_per_byte"]) - 1)
            found[hidden, steps][recipe].append(gap)
    return found


def show(rows: Rows) -> None:
    for (hidden, steps), recipes in sorted(gaps(rows).items()):
        print(
            f"\n{hidden} wide, {steps} steps: held-out bits per byte; above full precision, mean of seeds (least, most)"
        )
        for recipe in sorted(recipes, key=lambda name: statistics.fmean(recipes[name])):
            same = [row for (name, _, s, h), row in rows.items() if (name, s, h) == (recipe, steps, hidden)]
            mean = statistics.fmean(float(row["bits_per_byte"]) for row in same)
            ms, each = statistics.median(float(row["step_ms"]) for row in same), recipes[recipe]
            spread = f"{statistics.fmean(each):+6.2f} % ({min(each):+.2f}, {max(each):+.2f})"
            print(f"  {recipe:24}{mean:7.4f}  {spread:26}{len(each)} seeds, {ms:.0f} ms a step")


def plot(rows: Rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = gaps(rows)
    main = max(found, key=lambda at: len(found[at]))
    panels = 2 if len(found) > 1 else 1  # the second one compares sizes and lengths
    figure, axes = plt.subplots(1, panels, figsize=(6.5 * panels, 5), layout="constrained", squeeze=False)
    left = axes[0, 0]
    recipes = {name: each for name, each in found[main].items() if name != FULL}
    names = sorted(recipes, key=lambda name: -statistics.fmean(recipes[name]))
    for at, name in enumerate(names):
        left.plot(recipes[name], [at] * len(recipes[name]), "o", color="tab:grey", markersize=4, alpha=0.6)
        left.plot(statistics.fmean(recipes[name]), at, "D", color="tab:orange")
    left.set_yticks(range(len(names)), names)
    left.axvline(0, color="tab:blue")
    left.grid(axis="x", alpha=0.3)
    left.set(
        title=f"{main[0]} wide, {main[1]} steps of 1024 bytes; dots: seeds",
        xlabel="held-out bits per byte above full precision, %",
    )
    if panels == 2:
        _curves(axes[0, 1], rows, found)
    figure.savefig(file, dpi=110)


def _curves(axis: Any, rows: Rows, found: dict[tuple[int, int], Any]) -> None:
    for recipe, style in ((FULL, "o-"), ("ramp", "s-")):
        for hidden in sorted({at[0] for at in found}):
            points = sorted(
                (steps * 1024 / 1e6, statistics.fmean(float(row["bits_per_byte"]) for row in same))
                for steps in {at[1] for at in found if at[0] == hidden}
                if (same := [rows[at] for at in rows if (at[0], at[2], at[3]) == (recipe, steps, hidden)])
            )
            axis.plot(*zip(*points, strict=True), style, label=f"{recipe}, {hidden} wide")
    axis.set(title="sizes and lengths", xlabel="million bytes of training", ylabel="held-out bits per byte")
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="*", default=DEFAULT, choices=RECIPES, metavar="NAME", help=", ".join(RECIPES)
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="*", default=[1250])
    parser.add_argument("--hidden", type=int, nargs="*", default=[128], help="a multiple of 64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=FILE)
    parser.add_argument("--out", type=Path, default=Path("bench-quality"), help="for teachers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = results.conditions()
    training, held_out, _ = corpus()
    for hidden in args.hidden:
        for steps in args.steps:
            for seed in args.seeds:
                for name in args.recipes:
                    if (name, seed, steps, hidden) in read(args.csv):
                        continue
                    settings, recipe = settings_of(seed, steps, hidden), RECIPES[name]
                    teacher = full_precision(args.out, settings) if recipe.taught or recipe.tuned else None
                    model, seconds = train(recipe, settings, training, f"{name}, seed {seed}", teacher)
                    score = spread_loss(model, held_out, settings.context, settings.evaluation_bytes) / math.log(2)
                    if name == FULL:
                        model.save_pretrained(args.out / f"full-{seed}-{steps}-{hidden}")
                    print(f"{name}, seed {seed}: {score:.4f} bits per byte", flush=True)
                    what = {"recipe": name, "seed": seed, "steps": steps, "hidden": hidden}
                    what |= {
                        "bits_per_byte": f"{score:.5f}",
                        "step_ms": f"{1e3 * seconds:.1f}",
                        "threads": args.threads,
                    }
                    results.append([what | common], args.csv)
    rows = read(args.csv)
    show(rows)
    plot(rows, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
