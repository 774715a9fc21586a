"""Imports go one way: kernels <- layers, training <- convert <- serving, commands. Nothing imports the front door."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT_DOOR = "bitnet"
# from the ground up: a module may import those of its own floor and of the floors below
FLOORS = (
    ("bitnet.kernels", "bitnet.version", "bitnet.deprecated"),
    ("bitnet",),  # whatever no other floor names: the layers, train, info, progress
    ("bitnet.convert",),
    (
        "bitnet.serving",
        "bitnet.jobs",
        "bitnet.quickstart",
        "bitnet.tuning",
        "bitnet.commands",
        "bitnet.cli",
        "bitnet.__main__",
    ),
)


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for room, prefix in (("kernels", "bitnet."), ("convert", "bitnet."), ("bitnet", "")):
        for path in sorted((ROOT / room).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[0] == "bitnet" and relative.parts[1] in ("kernels", "convert"):
                continue  # the links
            found[prefix + ".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, text: str) -> Iterator[tuple[str, int]]:
    """The modules of ours that a module imports, anywhere in it, and in which line."""
    package = name if MODULES.get(name, Path()).name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        for target in targets:
            if target == FRONT_DOOR or target.startswith("bitnet."):
                yield target, node.lineno


def floor(name: str) -> int:
    def named(prefix: str) -> bool:
        return name == prefix or name.startswith(f"{prefix}.")

    return max((len(p), i) for i, prefixes in enumerate(FLOORS) for p in prefixes if named(p))[1]


GRAPH = {name: [*imports(name, path.read_text())] for name, path in MODULES.items() if name != FRONT_DOOR}


@pytest.mark.parametrize("name", GRAPH)
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    for target, line in GRAPH[name]:
        assert target != FRONT_DOOR, f"line {line}: nothing imports the front door"
        assert target in MODULES, f"line {line}: there is no module {target}"
        assert floor(target) <= floor(name), f"line {line}: {target} stands above"


def test_no_modules_import_each_other() -> None:
    order = TopologicalSorter({name: {target for target, _ in found} for name, found in GRAPH.items()})
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", MODULES)
def test_a_file_holds_one_idea(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 450


def test_the_maps_of_readme_and_contributing_name_what_is_there() -> None:
    """Fails if a file is named that has moved: maps are read by those who know no better."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:kernels|convert|bitnet|tests)/[\w/.]+)`", contributing)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
    rooms = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    here = ROOT
    for line in rooms.splitlines():
        if room := re.match(r"(kernels|bitnet|convert)/ ", line):
            here = ROOT / room[1]
        elif line and not line.startswith(" "):
            break
        for name in re.findall(r"(?<![\w./])[a-z_]+(?:\.py|/)(?![\w.])", line):
            assert (here / name).exists() or (ROOT / name).exists(), f"README's map: {here.name} has no {name}"


def test_links_in_documents_lead_somewhere() -> None:
    def anchors(document: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    rooms = [ROOT / name for name in ("bitnet", "kernels", "convert", "examples", "tests")]
    documents = [*ROOT.glob("*.md"), *(document for room in rooms for document in room.rglob("*.md"))]
    assert len(documents) > 3
    broken = []
    for document in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            path, _, anchor = target.partition("#")
            if target.startswith("http"):
                continue
            found = document.parent / path if path else document
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken
