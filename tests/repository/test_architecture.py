"""The tree's rules: which folders may import which, no cycles, and who imports the optional heavy libraries."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.worlds import CHECKOUT

ALLOWED = {
    "runtime": set(),
    "tsm": {"runtime"},
    "pipelines": {"runtime"},
    "distributed": {"runtime"},
    "training": {"runtime", "tsm", "pipelines", "distributed"},
    "slurm": {"runtime", "distributed"},
}
"""What each package may import of the others. Entry points, tools, benchmarks and tests may import all of these."""

PROGRAMS = ("tools", "benchmarks")
"""Folders of programs: nothing of the product imports them."""

MAX_LINES = 320
LONG_FILES: dict[str, str] = {}
"""Files that may be longer, at most two, with the reason."""


def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=CHECKOUT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return sorted(path for path in listed.stdout.splitlines() if (CHECKOUT / path).exists())


@cache
def modules() -> dict[str, Path]:
    """Path by module name of everything but tests."""
    found = {}
    for path in map(Path, sources()):
        if path.parts[0] != "tests":
            parts = path.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path) -> Iterator[str]:
    """Absolute names of all that a module imports, late imports too: modules, or names in modules."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse((CHECKOUT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """The project's modules that each of its modules imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        names = set(imports_of(module, path))
        found[module] = {name if name in known else name.rpartition(".")[0] for name in names} & known.keys() - {module}
    return found


def cycle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """One cycle of a graph, or nothing."""
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def between_siblings(imports: Mapping[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """By folder: the imports between its children, which are files and sub-folders."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for importer, imported in imports.items():
        for target in imported:
            one, other = importer.split("."), target.split(".")
            shared = 0
            while shared < min(len(one), len(other)) and one[shared] == other[shared]:
                shared += 1
            if shared < min(len(one), len(other)):
                found[".".join(one[:shared])][one[shared]].add(other[shared])
    return found


def test_the_graph_is_read_as_python_reads_it() -> None:
    """A check on the reader: it finds imports of each kind."""
    assert {"training.job", "training.step", "training.config.schema"} <= graph()["training.loop"] | graph()[
        "training.job"
    ]
    assert "training.main" in graph()["train"]
    assert sum(map(len, graph().values())) > 300
    assert cycle({"a": ["b"], "b": ["c"], "c": ["a"]}) and not cycle({"a": ["b", "c"], "b": ["c"]})
    siblings = between_siblings({"p.a.x": {"p.b.y"}, "p.b.z": {"p.a.w"}})
    assert cycle(siblings["p"])


def test_no_cycle_between_files() -> None:
    assert cycle(graph()) == []


def test_no_cycle_between_folders() -> None:
    """Among the children of a folder, files and sub-folders, imports go one way."""
    cycles = {folder: cycle(edges) for folder, edges in between_siblings(graph()).items()}
    assert {folder: found for folder, found in cycles.items() if found} == {}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_between_packages_go_one_way(package: str) -> None:
    foreign = {
        (importer, target)
        for importer, imported in graph().items()
        for target in imported
        if importer.split(".")[0] == package and target.split(".")[0] not in ALLOWED[package] | {package}
    }
    assert foreign == set()


def test_nothing_of_the_product_imports_a_program() -> None:
    programs = {*PROGRAMS, *(module for module, path in modules().items() if len(path.parts) == 1)}
    importers = {
        importer
        for importer, imported in graph().items()
        if importer.split(".")[0] in ALLOWED and any(target.split(".")[0] in programs for target in imported)
    }
    assert importers == set()


def test_runtime_needs_the_standard_library_only() -> None:
    """But for the one module about Triton, which imports it late."""

    for module, path in modules().items():
        if module.split(".")[0] == "runtime" and module != "runtime.triton_launch":
            roots = {name.split(".")[0] for name in imports_of(module, path)}
            assert roots <= sys.stdlib_module_names | {"runtime"}, module


def test_the_networks_need_torch_and_torchvision_only() -> None:
    """So tsm/ and the one file of runtime/ that it imports can be copied into another program."""
    allowed = {"tsm", "torch", "torchvision", "triton"} | sys.stdlib_module_names
    for module, path in modules().items():
        if module.split(".")[0] == "tsm" or module == "runtime.triton_launch":
            foreign = {name for name in imports_of(module, path) if name.split(".")[0] not in allowed}
            assert {name for name in foreign if not name.startswith("runtime.triton_launch")} == set(), module


def importers_of(library: str) -> set[str]:
    return {
        str(path)
        for module, path in modules().items()
        if path.parts[0] in ALLOWED
        and any(name == library or name.startswith(f"{library}.") for name in imports_of(module, path))
    }


def test_few_files_import_horovod_and_dali() -> None:
    assert len(importers_of("horovod")) == 2, importers_of("horovod")
    assert 1 <= len(importers_of("nvidia.dali")) <= 2, importers_of("nvidia.dali")


def test_files_are_short() -> None:
    """Of one purpose, to be read in one sitting."""
    lengths = {
        str(path): len((CHECKOUT / path).read_text().splitlines())
        for path in modules().values()
        if path.parts[0] in {*ALLOWED, "tools"}
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES and path not in LONG_FILES} == {}
    assert len(LONG_FILES) <= 2 and all(lengths[path] > MAX_LINES for path in LONG_FILES)


def test_every_module_says_what_it_is() -> None:
    """A module's docstring does not begin with a question word: it says what the module does or is."""
    for path in modules().values():
        said = ast.get_docstring(ast.parse((CHECKOUT / path).read_text()))
        if (CHECKOUT / path).stat().st_size:
            assert said, f"{path} has no docstring"
            assert said.split()[0] not in {"What", "Which", "Whether", "Where", "How", "Who"}, path


# --- docs/architecture.md ---------------------------------------------------------------------------------------------


def test_the_architecture_page_names_what_exists() -> None:
    text = (CHECKOUT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:[a-z_0-9]+/)+(?:[a-z_0-9]+\.[a-z]+)?)(?::[^`]*)?`", text)
    assert len(named) > 40
    assert [name for name in named if not (CHECKOUT / name).exists()] == []
    tree = text[: text.index("Imports go one way")]
    folders = {path.parts[0] for path in modules().values() if len(path.parts) > 1} | {
        "conf",
        "launch",
        "tests",
        "docs",
    }
    assert [folder for folder in folders if f"{folder}/" not in tree] == []
    for package in ("training", "pipelines", "distributed"):
        inner = {path.parts[1] for path in modules().values() if path.parts[0] == package and len(path.parts) > 2}
        assert [folder for folder in inner if f" {folder}/" not in tree] == [], package


def test_the_reading_list_tells_the_length_of_files() -> None:
    """To a tenth, or ten lines."""
    rows = re.findall(r"^\| `([a-z_/]+\.py)` \| (\d+) \|", (CHECKOUT / "docs/architecture.md").read_text(), re.M)
    assert len(rows) > 10
    for path, said in rows:
        lines = len((CHECKOUT / path).read_text().splitlines())
        assert lines == pytest.approx(int(said), rel=0.1, abs=10), path
