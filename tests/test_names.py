"""The folders kernels/ and convert/ must never be importable as top-level packages.

PyPI has a package `kernels` that transformers looks for. A kernels/__init__.py in the repository root shadows it
whenever the root is on sys.path (`python -c`, `python -m`), and then no model can be built.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Builds and runs a model; prints which `kernels` transformers found (or none), where our own modules are, and who
# loads `bitnet` checkpoints.
LLAMA = """
import sys, torch, transformers
from transformers.utils.import_utils import is_kernels_available
config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
assert transformers.LlamaForCausalLM(config)(torch.arange(4)[None]).logits.isfinite().all()
print(sys.modules["kernels"].__file__ if is_kernels_available() else "none")
import bitnet.convert.swap.replace, bitnet.kernels.ops
from transformers.quantizers.auto import AutoHfQuantizer
quantizer = type(AutoHfQuantizer.from_config({"quant_method": "bitnet"}))
print(bitnet.kernels.ops.__file__, bitnet.convert.swap.replace.__file__, quantizer.__module__)
"""

# As much of the PyPI package as transformers uses while it is imported and models are defined.
KERNELS = """
def _keep(*args, **kwargs):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = replace_kernel_forward_from_hub = _keep

def __getattr__(name):  # classes and functions that are only called once the user asks for kernels
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


def run(code: str, root: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -c code` in root, which puts root first on sys.path, and then what is on PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory that looks like site-packages with the PyPI package in the version transformers wants."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS)
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return site


def found(done: subprocess.CompletedProcess[str]) -> str:
    """The `kernels` that LLAMA found, after a look at the rest of what it printed."""
    assert done.returncode == 0, done.stderr
    kernels, ops, swap, quantizer = done.stdout.split()
    assert Path(ops) == ROOT / "bitnet" / "kernels" / "ops.py"
    assert Path(swap) == ROOT / "bitnet" / "convert" / "swap" / "replace.py"
    assert quantizer == "bitnet.convert.hub.quantizer"
    return kernels


def test_transformers_works_in_the_root_and_our_hook_may_come_first() -> None:
    assert str(ROOT) not in found(run("import bitnet.convert.hub.quantizer" + LLAMA, ROOT))


def test_the_root_does_not_hide_the_pypi_package(site: Path) -> None:
    assert Path(found(run("import bitnet" + LLAMA, ROOT, site))) == site / "kernels" / "__init__.py"


def test_the_first_call_of_all_imports_in_no_circle() -> None:
    """swap.py imports transformers, whose import registers hf.py, which must not need swap.py."""
    done = run("import bitnet; from torch import nn; print(bitnet.replace_linear(nn.Linear(4, 4)))", ROOT)
    assert done.returncode == 0, done.stderr
    assert "BitLinear" in done.stdout


FIRST = """
import importlib, os, sys, torch, bitnet
assert "transformers" not in sys.modules
for name in ("bitnet.convert.checkpoint", "bitnet.convert.conversion.convert", "bitnet.convert.hub.match"):
    child = os.fork()
    if not child:
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what is imported")
def test_any_module_can_be_the_first_that_is_imported() -> None:
    """The import of transformers in any of them imports hf.py and what that needs."""
    done = run(FIRST, ROOT)
    assert done.returncode == 0, done.stderr


def test_an_init_file_would_be_noticed(site: Path, tmp_path: Path) -> None:
    """The checks above must be able to fail: with kernels/__init__.py in the root, transformers takes that."""
    (tmp_path / "root" / "kernels").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "__init__.py").touch()
    done = run(LLAMA, tmp_path / "root", site, ROOT)
    assert done.returncode != 0
    assert str(tmp_path / "root" / "kernels") in done.stderr


@pytest.mark.parametrize("folder", ["kernels", "convert"])
def test_folders_are_no_top_level_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "bitnet" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder
