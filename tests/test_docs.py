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
