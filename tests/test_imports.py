"""Imports point one way: no circles, no arrow back up, and the plugin knows nothing of the example."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN, EXAMPLE = ROOT / "svdtune", ROOT / "examples" / "sam_medical" / "sam_medical"
# Each sub-package imports only from itself and from those before it.
FLOORS = (
    *("common", "data", "models", "methods", "options"),
    *("adapters", "evaluation", "training", "comparison", "cli"),
)
# What the example may use of the plugin, beside the names of `svdtune` itself.
PUBLIC = {"svdtune", "svdtune.learned", "svdtune.sam_names"}


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions, but not for type checking alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def graph(package: Path) -> dict[str, set[str]]:
    """For each module of a package, the modules of the package that it imports."""
    names = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    return {name: (set(imports_of(path)) & names.keys()) - {name} for name, path in names.items()}


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, or none."""
    remaining = {name: set(targets) for name, targets in arrows.items()}
    while True:
        ends = {name for name, targets in remaining.items() if not targets}
        if not ends:
            return sorted(remaining)
        remaining = {name: targets - ends for name, targets in remaining.items() if name not in ends}


# A package's `__init__` that gathers its modules is imported by none of them at the top.
@pytest.mark.parametrize("package", [PLUGIN, EXAMPLE], ids=["svdtune", "sam_medical"])
def test_no_module_imports_itself_by_way_of_others(package):
    arrows = graph(package)
    assert len(arrows) > 20 and sum(map(len, arrows.values())) > 50
    assert circle_in(arrows) == []


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_arrow_runs_back_up():
    back = [
        f"{name} -> {target}"
        for name, targets in graph(EXAMPLE).items()
        for target in targets
        if name != EXAMPLE.name and floor_of(target) > floor_of(name)
    ]
    assert not back


def floor_of(module: str) -> int:
    """0 for the package itself, whose `__init__` offers names of any floor when they are asked for."""
    parts = module.split(".")
    return 1 + FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] != "__main__" else 0 if len(parts) == 1 else 99


def test_the_plugin_knows_nothing_of_the_example():
    for path in PLUGIN.rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("sam_medical", "benchmarks")], path


def test_the_example_uses_public_names_of_the_plugin():
    import svdtune

    allowed = PUBLIC | {f"svdtune.{name}" for name in svdtune.__all__}
    for path in EXAMPLE.rglob("*.py"):
        used = {name for name in imports_of(path) if name.split(".")[0] == "svdtune"}
        private = {
            name for name in used if name not in allowed and name.rpartition(".")[0] not in PUBLIC - {"svdtune"}
        }
        assert not private, path
