"""The package's floors: code imports downward, never in a circle, and nothing of training or tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dynllava_plugin"
# From the ground up. The package itself is its front door: who imports it gets the model, so it stands above that; what
# it shows, at a name's first use, may be of any floor.
FLOORS = (
    ("errors", "files", "images", "videos", "interrupts", "markup", "environment", "processes"),
    ("sparsity", "flops", "easy_vqa"),
    ("policies",),
    ("model",),
    ("dynllava_plugin", "auto_classes"),
    ("evaluation", "compare", "bench", "visualize", "demo", "serve"),
    ("cli", "checkpoint_command"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(text: str, names: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules that a source names in its imports, and whether its own import runs them (not a function's)."""
    waiting = [(node, True) for node in ast.parse(text).body]
    while waiting:
        node, at_once = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((name if name in names else str(node.module), at_once) for name in inner)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += [(child, False) for child in node.body]
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            waiting += [(child, at_once and not inside) for child in ast.iter_child_nodes(node)]


def graph() -> dict[str, set[tuple[str, bool]]]:
    """Every module of the package with what it imports: (name, whether at once)."""
    files = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: set(imports(path.read_text(encoding="utf-8"), set(files))) for name, path in files.items()}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The part of the package that a module belongs to: ``dynllava_plugin.model.gate`` -> ``model``."""
    parts = module.split(".")
    return parts[min(1, len(parts) - 1)]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle, the first again at the end; empty without one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def own(target: str) -> bool:
    return target.split(".")[0] == PACKAGE.name


GRAPH = graph()


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in GRAPH} <= set(FLOOR)


def test_nothing_imports_upward() -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target, _ in sorted(targets)
        if module != PACKAGE.name and own(target) and FLOOR[room(module)] < FLOOR[room(target)]
    ]
    assert not upward


def test_rooms_import_each_other_in_no_circle() -> None:
    """A room is a folder, or a file of the package; imports inside functions count."""
    edges: dict[str, set[str]] = {}
    for module, targets in GRAPH.items():
        if module == PACKAGE.name:
            continue
        others = {room(target) for target, _ in targets if own(target)} - {room(module)}
        edges.setdefault(room(module), set()).update(others)
    assert not circle(edges)


def test_modules_import_each_other_in_no_circle() -> None:
    """Of the imports that run when a module is imported."""
    edges = {
        module: {target for target, at_once in targets if at_once and own(target)}
        for module, targets in GRAPH.items()
    }
    assert not circle(edges)


def test_the_package_needs_no_training_and_no_tests() -> None:
    outside = {
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target, _ in targets
        if target.split(".")[0] in ("train", "tests")
    }
    assert not outside


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import a.b", {("a.b", True)}),
        ("from a import b, c", {("a.b", True), ("a", True)}),
        ("def f():\n    from a.b import c", {("a.b", False)}),
        ("class C:\n    def f(self):\n        import a", {("a", False)}),
        ("try:\n    import a\nexcept ImportError:\n    a = None", {("a", True)}),
        ("if TYPE_CHECKING:\n    import a", {("a", False)}),
    ],
)
def test_imports_are_found(text: str, found: set[tuple[str, bool]]) -> None:
    assert set(imports(text, {"a", "a.b"})) == found


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(("text", "file"), [("Image.open(", "images.py"), ("Popen(", "processes.py")])
def test_one_place_does_it(text: str, file: str) -> None:
    root = PACKAGE.parent
    sources = [*PACKAGE.rglob("*.py"), *(root / "train").rglob("*.py")]
    found = {str(path.relative_to(root)) for path in sources if text in path.read_text(encoding="utf-8")}
    assert found == {f"{PACKAGE.name}/{file}"}
