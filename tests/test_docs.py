"""The documents: links resolve, tables are those of the results, pages made from code are up to date."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "hetcache_compile/reference/MODEL_CARD.md"])
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LONGEST_README = 130


def without_code(page: Path) -> str:
    """The text of a page, code left out."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def wrong_links(page: Path) -> list[str]:
    """The links of a page that lead to no file or no heading of the repository; those to the web are not looked at."""
    found = []
    for link in LINK.findall(without_code(page)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert wrong_links(page) == []


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[here](#one-heading) [page](page.md) [none](none.md) [no heading](page.md#two)\n")
    assert wrong_links(page) == ["none.md", "page.md#two"]


@pytest.mark.parametrize("script", ["benchmarks/tables.py", "docs/generate.py"])
def test_what_is_generated_is_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_code_on_the_pages_is_python() -> None:
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            ast.parse(block)


def test_folders_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:hetcache_compile|passes|export)/[\w/.]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    folders = {p.parent for top in ("hetcache_compile", "passes", "export") for p in (ROOT / top).glob("*/__init__.py")}
    assert {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders} - named == set()


NAMED = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
SEE = re.compile(r"\bsee `(\w+)`")
OTHERS = ("latent_dist.mode", "nn.LayerNorm", "self.indices", "stats.unplanned", "TensorProto.DataType")
"""Names in docstrings that are no paths of ours: of other packages, and attributes of what is at hand."""
FILES = ("json", "md", "png", "html", "pbtxt")


def names_in(tree: ast.AST) -> set[str]:
    """Everything that a module defines, imports or names as an argument, methods and fields too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return names


def sources() -> dict[tuple[str, ...], Path]:
    """The modules of the package by their import path; those of `passes` and `export` stand inside it."""
    found = {}
    for top in ("hetcache_compile", "passes", "export"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[parts if top == "hetcache_compile" else ("hetcache_compile", *parts)] = path
    return found


def unknown_names(text: str, own: set[str], modules: dict[tuple[str, ...], set[str]]) -> list[str]:
    """What a docstring refers to by a path, or with "see", that is not there; `own` are the names of its module."""
    classes = set().union(*modules.values()) | own

    def exists(path: tuple[str, ...]) -> bool:
        if path[0] in sys.stdlib_module_names | {"torch", "diffusers"} or any(part.isdigit() for part in path):
            return True
        if path[0][0].isupper():  # a class and its attribute
            return set(path) <= classes
        return any(
            module[-length:] == path[:length] and names.issuperset(path[length:])
            for module, names in modules.items()
            for length in range(1, len(path) + 1)
        )

    named = [name for name in NAMED.findall(text) if name not in OTHERS and name.rpartition(".")[2] not in FILES]
    wrong = [name for name in named if not exists(tuple(name.split(".")))]
    stems = {module[-1] for module in modules}
    return wrong + [name for name in SEE.findall(text) if name not in own | stems]


def test_what_docstrings_refer_to_exists() -> None:
    paths = sources()
    trees = {module: ast.parse(path.read_text()) for module, path in paths.items()}
    modules = {module: names_in(tree) for module, tree in trees.items()}
    wrong = {
        str(paths[module].relative_to(ROOT)): unknown
        for module, tree in trees.items()
        if (unknown := unknown_names(docstrings_of(tree), modules[module], modules))
    }
    assert wrong == {}


def docstrings_of(tree: ast.AST) -> str:
    """All docstrings of a module, those of attributes too."""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return "\n".join(s.value for s in strings if isinstance(s, ast.Constant) and isinstance(s.value, str))


def test_a_name_that_is_gone_is_found() -> None:
    modules = {("hetcache_compile", "plan", "plan"): {"Plan", "load"}}
    text = "`plan.load`, `plan.plan.Plan`, `plan.save`, `old.load`, `Plan.load`, `Plan.gone`, see `own`, see `x`"
    assert unknown_names(text, {"own"}, modules) == ["plan.save", "old.load", "Plan.gone", "x"]
