"""`python tests/pipelines_table.py [NAME ...]` checks pipelines and writes docs/pipelines.json and its table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pipelines import ROWS
from pipelines_check import check
from verdicts import write_verdicts

DOCS = Path(__file__).parent.parent / "docs"
JSON, TABLE = DOCS / "pipelines.json", DOCS / "pipelines.md"
RESULTS = ("cached", "fewer", "plain", "no plan", "broken", "wrong")

INTRODUCTION = """# Pipelines of diffusers

One row for each pipeline (and for each way to call it that reads differently), unmodified, with tiny components of
random weights, torch 2.13, diffusers 0.42. `plan_for` gets the mask and the arguments of the call; the transformer is
compiled with `backend="hetcache"`. {counts}.

* **cached**: the plan has the right grid, the right tokens and the steps of the call. With every step FULL the result
  is that of the pipeline bit for bit. With a plan of all kinds of steps each call is of the kind that is planned, the
  result is finite, and the second edit of a session is bit for bit that of a session of its own. With guidance and
  without, where the pipeline has it.
* **fewer**: the same, but more calls are FULL than planned. A ControlNet adds an input that changes at every step,
  which looks like another branch of guidance until it has changed twice; or the model is given other tokens after the
  first call; or the frames of a video have times of their own; or a second expert has a FULL step of its own. Where a
  part of the calls runs plainly, the reason is what the session warns of.
* **plain**: the graph is refused, for the reason given, once; the result is that of the pipeline.
* **no plan**: `plan_for` says why, and what to give it.
* **broken**: the pipeline of this diffusers does not run.

*Steps* are the calls of the model without guidance and with it: F full, P partial, R reuse.

Written by `python tests/pipelines_table.py`; `tests/test_pipelines.py` checks each row.

| pipeline | result | grid | steps | with guidance | reason |
| --- | --- | --- | --- | --- | --- |
"""


def render(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    counts = Counter(row["result"] for row in rows)
    text = INTRODUCTION.format(counts=", ".join(f"{counts[name]} {name}" for name in RESULTS if counts[name]))
    return text + "".join(f"| {' | '.join(_cells(row))} |\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[str]:
    grid = " x ".join(map(str, row.get("grid", ())))
    reason = " ".join(row.get("reason", "").split()).replace("|", "\\|")
    return [row["name"], row["result"], grid, row.get("steps", ""), row.get("guided", ""), reason]


if __name__ == "__main__":
    write_verdicts(ROWS, check, JSON, TABLE, render)
