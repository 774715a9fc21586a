"""Pictures of a training run."""

import statistics
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], file: Path) -> None:
    """report.png from a report: losses, held-out bits per byte, how many codes change, and the last shares of codes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    (loss, held_out), (flips, shares) = figure.subplots(2, 2)
    options, losses, steps = report["options"], report["losses"], report["steps"]
    width = max(5, len(losses) // 50)
    smooth = [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
    loss.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.2)
    loss.plot(range(1, len(losses) + 1), smooth, color="tab:blue")
    loss.set(title="training loss", xlabel="step", ylabel="nats a token")
    evaluations = [row for row in report["metrics"] if "bits_per_byte" in row]
    held_out.plot(*_curve(evaluations, "bits_per_byte"), color="tab:orange", marker=".")
    held_out.set(title="held out, fully quantized", xlabel="step", ylabel="bits per byte")
    looks = [row for row in report["metrics"] if "bitnet/flips" in row]
    flips.plot(*_curve(looks, "bitnet/flips"), color="tab:green", label="codes that a step changes")
    flips.set(title="codes", xlabel="step", ylabel="share that a step changes")
    twin = flips.twinx()
    twin.plot(*_curve(looks, "bitnet/zeros"), color="grey", linestyle="--", label="zeros")
    twin.plot(*_curve(looks, "bitnet/error"), color="tab:red", linestyle=":", label="rounding error (rms)")
    twin.set_ylim(0, 1)
    twin.legend(loc="upper right")
    if report["layers"]:
        for axes in (loss, held_out, flips):  # quantization ramps up between
            for share in ("strength_start", "strength_end"):
                axes.axvline(options[share] * steps, color="grey", linestyle=":", linewidth=1)
        last = report["layers"][-1]["layers"]
        plot_shares(shares, [layer["name"] for layer in last], [layer["shares"] for layer in last])
    figure.savefig(file, dpi=110)


def plot_shares(axes: Any, names: list[str], shares: list[Any]) -> None:
    """Bars of the shares of -1, 0 and +1, a layer each."""
    short = [name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "") for name in names]
    bottom = [0.0] * len(names)
    for index, (code, color) in enumerate((("-1", "tab:red"), ("0", "lightgrey"), ("+1", "tab:green"))):
        heights = [float(share[index]) for share in shares]
        axes.bar(range(len(names)), heights, bottom=bottom, color=color, label=code, width=0.9)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(title="ternary weights per layer", ylabel="share", ylim=(0, 1))
    axes.set_xticks(range(len(names)), short if len(short) <= 80 else [""] * len(short))
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.margins(x=0.01)
    axes.legend(loc="upper right")


def _curve(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row[key] for row in rows]
