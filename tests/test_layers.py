"""Arrows between folders run down only: what a lower folder does not know cannot break it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hetcache_compile"
FOLDERS = {"passes": ROOT / "passes", "export": ROOT / "export"}
"""Folders at the top of the tree that install inside the package."""

ORDER = {
    "": (
        "passes", "errors", "files", "provenance", "console", "plan", "calibration", "capture", "pipelines",
        "compilation", "ranks", "record", "sessions", "runtime", "comfyui", "engine", "edit", "bench", "reference",
        "export", "estimate", "cli", "__init__",
    ),
    "passes": ("ir", "rules", "analysis", "kernels", "writing", "prediction", "forms", "testing", "__init__"),
    "export": ("model", "lowering", "onnx", "trt", "check", "serving", "exporter", "cli", "__init__"),
}  # fmt: skip
"""What stands in a package, from the lowest: a line may import from those before it in its list, and from itself."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by its name in it."""
    for root in (ROOT / PACKAGE, *FOLDERS.values()):
        prefix = "" if root.name == PACKAGE else f"{root.name}."
        for path in sorted(root.rglob("*.py")):
            yield prefix + ".".join(path.relative_to(root).with_suffix("").parts), path


NAMES = {name for name, _ in modules()}


def imports_of(name: str, path: Path) -> set[str]:
    """The modules of the package that one imports, inside functions too."""
    parents = name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == PACKAGE:
            base = (node.module or "").split(".")[1:]
        else:
            continue
        target = ".".join(part for part in base if part)
        for alias in node.names:
            inside = f"{target}.{alias.name}".strip(".")
            found.add(next((n for n in (inside, f"{inside}.__init__", target) if n in NAMES), f"{target}.__init__"))
    return {target.removesuffix(".") for target in found if target and target != name}


IMPORTS = {name: imports_of(name, path) for name, path in modules()}


@pytest.mark.parametrize("package", ORDER)
def test_no_folder_imports_from_a_higher_one(package: str) -> None:
    place = {room: number for number, room in enumerate(ORDER[package])}
    prefix = f"{package}." if package else ""
    inside = {name: name.removeprefix(prefix).split(".")[0] for name in NAMES if name.startswith(prefix)}
    assert set(inside.values()) <= set(place), "a new folder has its place in the order"
    upward = [
        f"{name} imports {target}"
        for name, room in inside.items()
        for target in IMPORTS[name]
        if target in inside and place[inside[target]] > place[room]
    ]
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(IMPORTS.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    for name in sorted(IMPORTS):
        visit(name, ())


def test_folders_are_small() -> None:
    folders = {path.parent for _, path in modules()}
    sizes = {folder: len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) for folder in folders}
    assert {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > 11} == {}


def test_every_folder_is_installed() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for _, path in modules()}
    names = {f if f.startswith(PACKAGE) else f"{PACKAGE}.{f}" for f in folders}
    assert [name for name in sorted(names) if f'"{name}"' not in listed] == []
