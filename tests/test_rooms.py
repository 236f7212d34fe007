"""The rooms of the README's tree are those on disk, imports go up it, and no room grows past what a
reader holds."""

import ast
import graphlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import jspec

ROOT = Path(jspec.__file__).resolve().parent.parent
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 350, 60
LONG: set[str] = set()
"""What is longer than that, to be split: names leave this list, and none is added."""
ENTRY = re.compile(r"[\w.]+(?:\.py|/)(?= |$)")


def tree() -> Iterator[tuple[int, list[str], str]]:
    """The lines of the README's tree: how far each is indented, the names that it begins with, and
    what it says."""
    block = (ROOT / "README.md").read_text().split("## The tree\n", 1)[1].split("\n## ", 1)[0]
    for line in block.splitlines():
        if line.startswith("    "):
            names, _, said = line.strip().partition("  ")
            if ENTRY.match(names):
                yield len(line) - len(line.lstrip()), names.split(), said


def rooms() -> list[str]:
    """The rooms of jspec/ from the first, which imports none of the others, to the last."""
    lines = list(tree())
    start = next(i for i, (_, names, _) in enumerate(lines) if names == ["jspec/"])
    inside = []
    for indent, names, _ in lines[start + 1:]:
        if indent <= lines[start][0]:
            break
        inside += names
    return [name.removesuffix("/").removesuffix(".py") for name in inside]


def sources(*folders: str) -> dict[str, Path]:
    """Every module below the folders, by its dotted name."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources("jspec", "pallas_kernels")


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """The modules that a file imports, those outside the project by their full name too, and of
    `jspec.NAME` the room that NAME is from. everywhere: inside functions as well."""
    found = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
        match node:
            case ast.Import():
                found |= {name.name for name in node.names}
            case ast.ImportFrom(module=str(module)):
                inner = {f"{module}.{name.name}" for name in node.names}
                found |= inner & MODULES.keys() or {module}
            case ast.Attribute(value=ast.Name(id="jspec"), attr=attr):
                found |= {jspec._SURFACE.get(attr, f"jspec.{attr}")}
    return found - {"jspec"}


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_the_tree_of_the_readme_is_the_tree():
    on_disk = {path.stem for path in (ROOT / "jspec").iterdir()
               if path.suffix == ".py" or (path / "__init__.py").is_file()}
    named = rooms()
    assert sorted(named) == sorted(on_disk - {"__init__", "__main__"})
    for _, names, said in tree():
        for name in names:
            place = ROOT / name if (ROOT / name).exists() else ROOT / "jspec" / name
            assert place.exists(), f"the tree names {name}"
            inside = {path.name for path in place.rglob("*.py")} if place.is_dir() else set()
            mentioned = (set(re.findall(r"\w+\.py\b", said)) if len(names) == 1 and place.is_dir()
                         else set())
            assert mentioned <= inside, f"of {name} the tree mentions {mentioned - inside}"


def test_imports_go_up_the_tree():
    order = {name: i for i, name in enumerate(rooms())}
    wrong = {f"{module} imports {other}" for module, path in MODULES.items() for other in imported(
        path) if module.startswith("jspec.") and other.startswith("jspec.") and other in MODULES
             and order.get(room(module), len(order)) < order.get(room(other), len(order))}
    assert not wrong


def test_kernels_know_nothing_of_jspec():
    assert (not {f"{module} imports {other}" for module, path in MODULES.items()
                 for other in imported(path)
                if module.startswith("pallas_kernels") and other.split(".")[0] == "jspec"})


def test_no_module_is_imported_by_what_it_imports():
    graph = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("module",
                         sorted({"jspec.config", "jspec.choices", "jspec.cli"} & MODULES.keys()))
def test_what_is_read_before_anything_starts_imports_no_jax(module):
    found, waiting = {}, {module: "the test"}
    while waiting:
        name, by = waiting.popitem()
        found[name] = by
        if name in MODULES:
            waiting |= {other: name for other in imported(MODULES[name], everywhere=False)
                        if other not in found}
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "transformers"}
    assert not {f"{by} imports {name}" for name, by in found.items() if name.split(".")[0] in heavy}


def test_what_a_reader_does_not_scroll():
    long = set()
    for path in sources("jspec", "pallas_kernels", "benchmarks", "examples").values():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if len(text.splitlines()) > LINES_OF_A_MODULE:
            long.add(name)
        if not name.startswith("pallas_kernels/"):
            long |= {f"{name}:{node.name}" for node in ast.walk(ast.parse(text))
                     if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                     and node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION}
    assert long <= LONG, "split it"
    assert LONG <= long, "it is short enough now: take it off the list"


@pytest.mark.parametrize("room, names", [
    ("jspec.rl.update", ["UpdateSettings", "init_state", "make_batch", "update"]),
    ("jspec.train", ["answer_text"]),
    ("jspec.prepare", ["make_tokenizer", "make_policy", "make_sampling"]),
    ("jspec.drafts.suffix", ["remember"])])
def test_a_loop_of_ones_own_finds_what_it_takes(room, names):
    package, _, name = room.rpartition(".")  # jspec.drafts.suffix is the function
    found = getattr(importlib.import_module(package), name, None) or importlib.import_module(room)
    assert all(callable(getattr(found, name)) for name in names)
