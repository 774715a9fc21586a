"""The fast tests with the oldest, CI's and the newest torch, transformers and Triton; prints the README's table.

    python tests/compat.py            # or only some of: oldest CI newest

Each set is installed into a fresh virtual environment, which takes up to 7 GB (torch's CUDA build) until its tests are
through. Exit status 1 if anything failed or could not be installed.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "triton")
VERSIONS = f"import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {LIBRARIES}))"


def constraints() -> dict[str, str]:
    """What pip is told besides pyproject.toml, by set: its lower bounds, CI's file, nothing."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = [found for line in required if (found := re.match(r"(\w+)>=([\d.]+)", line))]
    oldest = "".join(f"{name}=={version}\n" for name, version in map(re.Match.groups, bounds) if name in LIBRARIES)
    return {"oldest": oldest, "CI": (ROOT / ".ci" / "constraints.txt").read_text(), "newest": ""}


def row(name: str, constraint: str) -> tuple[list[str], bool]:
    """The table's row of a set, and whether all went well."""
    wanted = dict(re.findall(r"^(\w+)==(\S+)", constraint, re.M))
    with TemporaryDirectory() as folder:
        python, limits, results = (Path(folder) / part for part in ("bin/python", "constraints", "results.xml"))
        venv.create(folder, with_pip=True)
        limits.write_text(constraint)
        say(f"{name}: installing {wanted or 'the newest that pyproject.toml and pip allow'}")
        install = [python, "-m", "pip", "install", "-q", "-c", limits, "-e", ".[test]"]
        pip = subprocess.run(install, cwd=ROOT, capture_output=True, text=True)
        if pip.returncode:
            say(pip.stderr)
            reason = next((line for line in pip.stderr.splitlines()[::-1] if line.startswith("ERROR")), "see above")
            return [name, "", *(wanted.get(n, "") for n in LIBRARIES), f"not installed: {reason}", "", ""], False
        versions = subprocess.run([python, "-c", VERSIONS], cwd=folder, check=True, capture_output=True, text=True)
        say(f"{name}: {versions.stdout.strip()}")
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        status = subprocess.run(pytest, cwd=ROOT, stdout=sys.stderr).returncode
        if not results.exists():
            return [name, *versions.stdout.split(), f"pytest ended with status {status}", "", ""], False
        suite = next(ElementTree.parse(results).iter("testsuite"))
        tests, failures, errors, skipped = (int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped"))
        counts = tests - failures - errors - skipped, failures + errors, skipped
        return [name, *versions.stdout.split(), *(f"{count:,}" for count in counts)], status == 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sets = constraints()
    if unknown := set(sys.argv[1:]) - set(sets):
        sys.exit(f"unknown: {', '.join(unknown)}; choose from {', '.join(sets)}")
    rows, good = zip(*(row(name, sets[name]) for name in sys.argv[1:] or sets), strict=True)
    head = ["", "Python", *LIBRARIES, "passed", "failed", "skipped"]
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    sys.exit(not all(good))
