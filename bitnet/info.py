"""What results depend on: versions, hardware, backends; `bitnet info` shows them."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

from .kernels import backends, products
from .tables import grid, wide
from .version import __version__


def hardware() -> dict[str, str]:
    """The machine in words: cpu, cpu_threads, memory, and gpu where there is one."""
    facts = {"cpu": _cpu_name(), "cpu_threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    return facts


def versions() -> dict[str, str]:
    """Installed versions of what the results depend on; "not installed" where one is missing."""
    found = {"bitnet-toolkit": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)  # with its build, +cu130 say, which PyPI's metadata leave out
    for name in ("triton", "transformers", "safetensors", "accelerate", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def show(console: Console | None = None) -> None:
    """Print versions, hardware, rates of exact products, and which backends are ready and why others are not."""
    console = console or wide()
    found = hardware()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found["gpu"] = f"none: {'torch sees no GPU' if built else 'this torch is a CPU build'}"
    native = backends.choose_backend("auto", torch.device("cpu")) == "cpu"
    rates = {what: products.rates(tokens, native) for what, tokens in (("many tokens", 64), ("one token", 1))}
    sections = {
        "versions": versions(),
        "hardware": found,
        "exact products of codes on cpu, GOP/s: training takes the first, backend `torch` the first but native": {
            what: ", ".join(f"{name} {rate:,.0f}" for name, rate in found.items()) for what, found in rates.items()
        },
    }
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        sections[f'backends on {device} (the first that is ready is what "auto" takes)'] = {
            row.name: f"{'ready' if row.ready else 'missing'}: {row.detail}" for row in backends.backends(device)
        }
    for title, rows in sections.items():
        console.print(title, markup=False, highlight=False)
        console.print(grid((f"  {name}", value) for name, value in rows.items()))


def _cpu_name() -> str:
    """With its family and model, where there are some: virtual machines tell no more of the name than the maker."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if name := fields.get("model name"):
            kind = [f"{key.split()[-1]} {fields[key]}" for key in ("cpu family", "model") if key in fields]
            return f"{name} ({', '.join(kind)})" if kind else name
    except OSError:
        pass
    return platform.processor() or platform.machine()
