"""What `bitnet info` prints: versions, hardware, backends."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .kernels import backends, products


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


def info() -> str:
    """The text of `bitnet info`."""
    lines = ["versions"]
    lines += [f"  {name:<16}{version}" for name, version in versions().items()]
    lines += ["", "hardware"]
    lines += [f"  {name:<16}{value}" for name, value in hardware().items()]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU" if built else "this torch is a CPU build"
        lines.append(f"  {'gpu':<16}none: {why}")
    lines += [
        "",
        "exact products of codes on cpu, GOP/s: training takes the first, backend `torch` the first but native",
    ]
    native = backends.choose_backend("auto", torch.device("cpu")) == "cpu"
    for tokens, what in ((64, "many tokens"), (1, "one token")):
        rates = products.rates(tokens, native)
        lines.append(f"  {what:<16}{', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        lines += ["", f'backends on {device} (the first that is ready is what "auto" takes)']
        for row in backends.backends(device):
            lines.append(f"  {row.name:<16}{'ready' if row.ready else 'missing'}: {row.detail}")
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
