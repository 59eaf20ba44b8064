"""CONTRIBUTING.md: its examples run and print what it says; its paths and its diff are those of this tree."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hetcache_compile.passes.ir.editor import PassError
from hetcache_compile.passes.rules.table import RULES, elementwise
from hetcache_compile.passes.testing import samples
from hetcache_compile.passes.testing.oracle import SIZES, check_rows

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "CONTRIBUTING.md"
TEXT = GUIDE.read_text()
HYPOT = torch.ops.aten.hypot.default


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the file that it begins on."""

    language: str
    text: str
    line: int


def blocks_of(heading: str) -> list[Block]:
    """The fenced blocks under a heading of level 2."""
    start = TEXT.index(f"\n## {heading}\n") + 1
    end = TEXT.find("\n## ", start)
    section = TEXT[start : None if end < 0 else end]
    return [
        Block(found[1], found[2], TEXT[: start + found.start(2)].count("\n"))
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    ]


def run_example(heading: str) -> dict[str, Any]:
    """Run the Python blocks of a section one after the other, and compare what each prints; what they define."""
    names: dict[str, Any] = {"__name__": "example"}
    blocks = blocks_of(heading)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, GUIDE, "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        expected = following.text if following and following.language == "text" else ""
        assert printed.getvalue() == expected, f"CONTRIBUTING.md, line {block.line}"
    return names


@pytest.fixture
def rules() -> Iterator[None]:
    """The table of rules as it was, afterwards."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("rules")
def test_add_an_operator_rule() -> None:
    assert HYPOT not in RULES, "it has a rule now: choose another operator for the example"
    names = run_example("Add an operator rule")
    assert RULES[HYPOT] is elementwise
    assert max((a - b).abs().max() for a, b in zip(names["again"], names["output"], strict=True)) < 1e-6
    (node,) = names["forms"].by_kind["partial"].module.graph.find_nodes(op="call_function", target=HYPOT)
    assert node.meta["val"].shape[1] == names["plan"].num_active


@pytest.mark.usefixtures("rules")
def test_the_line_of_the_diff_gives_the_oracle_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    (diff,) = [block for block in blocks_of("Add an operator rule") if block.language == "diff"]
    header, *lines = diff.text.splitlines()
    table = (ROOT / header.removeprefix("--- a/")).read_text().splitlines()
    assert [line[1:] for line in lines if line[0] != "+"] == [line for line in table if f"-{line}" in lines]
    monkeypatch.setattr(samples, "ELEMENTWISE", (HYPOT,))
    RULES[HYPOT] = elementwise
    calls = samples.elementwise_calls()
    assert len(calls) >= 10
    for whole in calls:
        for sizes in SIZES.values():
            check_rows(whole, sizes)


def test_add_a_form_pass() -> None:
    names = run_example("Add a form pass")
    dtypes = {entry.group: entry.dtype for entry in names["smaller"].cache_entries}
    assert dtypes == {"key_values": torch.float32, "output": torch.float16}
    assert {entry.dtype for entry in names["forms"].cache_entries} == {torch.float32}
    errors = (names["partial"] - names["plain"]).abs()
    assert 1e-6 < errors.max() < 2e-3
    for kind in ("partial", "reuse"):
        before, after = (names[forms].by_kind[kind].reads for forms in ("forms", "smaller"))
        assert [e.input_name for e in after] == [e.input_name for e in before], "an entry keeps its place"
    mixed = {**names["forms"].by_kind, "reuse": names["smaller"].by_kind["reuse"]}
    with pytest.raises(PassError, match=r"the reuse form reads past_output\.0 as float16 .*has it as float32 "):
        replace(names["forms"], by_kind=mixed)


def test_add_a_zoo_model() -> None:
    names = run_example("Add a zoo model")
    verdict = names["verdict"]
    assert max(verdict.error, verdict.changed_error) < 1e-5


def test_paths_and_links_lead_somewhere() -> None:
    paths, links = re.findall(r"`([\w./]+/[\w./]*)`", TEXT), re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(paths) > 15
    assert [path for path in [*paths, *links] if not (ROOT / path).exists()] == []
