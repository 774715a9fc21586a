"""What the quickstart shows at its end: a table, samples, a picture."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..jobs.report import plot_shares
from ..packed import PackedBitLinear


def show(report: dict[str, Any], out: Path, console: Console) -> None:
    full, ternary = report["models"]["full"], report["models"]["ternary"]
    for title, model in (("full precision", full), ("1.58 bit, packed", ternary)):
        console.rule(f"a sample, {title}")
        console.print(model["sample"], markup=False, highlight=False)
    table = Table("", "full precision", "1.58 bit", "ratio")

    def row(label: str, key: str, form: str, scale: float = 1) -> None:
        ratio = f"{ternary[key] / full[key]:.3f}"
        table.add_row(label, form.format(full[key] / scale), form.format(ternary[key] / scale), ratio)

    row("held-out bits per byte", "bits_per_byte", "{:.3f}")
    row("MB on disk", "disk_bytes", "{:.2f}", 1e6)
    row("MB in memory", "memory_bytes", "{:.2f}", 1e6)
    row("tokens/s, batch 1", "tokens_per_second", "{:.0f}")
    row("training, s", "training_seconds", "{:.0f}")
    console.print(table)
    console.print(
        f"1.58 bit costs {report['gap_percent']:.1f} % here. Its {report['low_bit_weights']:,} ternary weights take "
        f"{report['low_bit_bytes'] / 1e6:.2f} MB on disk, {report['times_smaller_than_bf16']:.2f} times less than in "
        "bf16; embedding, head and norms stay float32. The reloaded model's logits equal the trained model's exactly.\n"
        "At this size a token costs mostly Python, so its speed says little about the kernels.\n"
        f"Both models, report.json and report.png are in {out}. Next:\n"
        f"bitnet generate {out / 'ternary'} 'import ' --temperature 0.7",
        highlight=False,
    )


def plot(report: dict[str, Any], model: nn.Module, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    per_step = report["training_tokens"] / report["settings"]["steps"] / 1e6
    for name, label, color in (("full", "full precision", "tab:blue"), ("ternary", "1.58 bit", "tab:orange")):
        losses = report["losses"][name]
        width = max(10, len(losses) // 40)
        smooth = [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
        xs = [per_step * (i + 1) for i in range(len(losses))]
        final = report["models"][name]["bits_per_byte"]
        left.plot(xs, losses, color=color, alpha=0.15)
        left.plot(xs, smooth, color=color, label=f"{label}, {final:.3f} held out")
    for share in ("strength_start", "strength_end"):
        left.axvline(report["settings"][share] * xs[-1], color="grey", linestyle=":", linewidth=1)
    left.set(
        title="training loss (dotted: quantization ramps up between)", xlabel="million bytes", ylabel="bits per byte"
    )
    left.set_ylim(top=min(5.0, max(report["losses"]["full"])))
    left.legend()

    layers = {name: module.codes() for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}
    shares = [[float((codes == code).float().mean()) for code in (-1, 0, 1)] for codes in layers.values()]
    plot_shares(right, list(layers), shares)
    figure.savefig(file, dpi=110)
    plt.close(figure)
