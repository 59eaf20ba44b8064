"""Pages that are made from code, and what the site shows of files outside docs/.

    python docs/generate.py             # rewrites docs/plan-options.md from the dataclass PlanOptions
    python docs/generate.py --check     # exits 1 if it is out of date

mkdocs.yml lists this file as a hook: it adds an API page for the public names, and the pages and pictures of `BESIDE`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPTIONS_PAGE = "docs/plan-options.md"
BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "hetcache_compile/reference/MODEL_CARD.md": "model-card.md",
    "benchmarks/results/front.png": "images/front.png",
    "benchmarks/results/cache_bytes.png": "images/cache_bytes.png",
}
"""Files outside docs/ that the site shows, and where. A link to any other file of the repository becomes plain text."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def options_table() -> str:
    """A row for each option of a plan."""
    from hetcache_compile.plan.options import PlanOptions

    rows = ["| option | type | default | what it is |", "| --- | --- | --- | --- |"]
    for option in fields(PlanOptions):
        kind = option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))
        cells = (f"`{option.name}`", f"`{kind}`", f"`{option.default!r}`", sentence(option.metadata["help"]))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def sentence(text: str) -> str:
    """The text as one that begins with a capital letter and ends with a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def options_page(text: str) -> str:
    """The page with a new table between its markers."""
    begin, end = "<!-- options -->\n", "<!-- /options -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + options_table() + "\n" + end + after


def public_names() -> list[str]:
    """`hetcache_compile.__all__`, read without importing the package."""
    tree = ast.parse((ROOT / "hetcache_compile" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError("hetcache_compile/__init__.py has no __all__")


def api_page() -> str:
    """Every public name, by what it is."""
    groups: dict[str, list[str]] = {"Functions": [], "Classes and data": [], "Errors": []}
    for name in public_names():
        error = name.endswith("Error")
        groups["Errors" if error else "Functions" if name.islower() else "Classes and data"].append(name)
    lines = ["# API", "", "Every name here is imported from `hetcache_compile`.", ""]
    for title, names in groups.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: hetcache_compile.{name}", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """The hook of mkdocs that adds files to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "api.md", content=api_page()))
    for source, uri in BESIDE.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The hook of mkdocs that sees a page: its links are made for the repository, the site has other places."""
    source = next((s for s, uri in BESIDE.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")

    def in_site(found: re.Match[str]) -> str:
        picture, label, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (ROOT / source).parent.joinpath(target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return found[0]  # mkdocs --strict says what is wrong with it
        name = path.relative_to(ROOT).as_posix()
        if name in BESIDE or name.startswith("docs/"):
            return f"{picture}[{label}]({relative(BESIDE.get(name, name[5:]), page.file.src_uri)}{anchor})"
        return label

    return "\n".join(LINK.sub(in_site, line) if text else line for text, line in outside_code(markdown))


def outside_code(markdown: str) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it is text: not in a fenced block."""
    text = True
    for line in markdown.split("\n"):
        fence = line.lstrip().startswith("```")
        yield text and not fence, line
        text ^= fence


def relative(uri: str, page: str) -> str:
    """A link from one page of the site to another file of it."""
    return "../" * page.count("/") + uri


def main() -> None:
    path = ROOT / OPTIONS_PAGE
    text = path.read_text()
    new = options_page(text)
    if "--check" not in sys.argv:
        path.write_text(new)
    elif new != text:
        sys.exit(f"run python docs/generate.py: {OPTIONS_PAGE} is out of date")


if __name__ == "__main__":
    main()
