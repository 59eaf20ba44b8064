"""`python tests/models_table.py [NAME ...]` checks the zoo and writes docs/models.json and docs/models.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from models_check import check
from verdicts import write_verdicts
from zoo import ENTRIES

DOCS = Path(__file__).parent.parent / "docs"
JSON, TABLE = DOCS / "models.json", DOCS / "models.md"

INTRODUCTION = """# What the pass makes of diffusers' transformers

One row for each class (and for each way to call it that reads differently), on a tiny configuration with random
weights, torch 2.13, diffusers 0.42. {counts}.

* **exact**: rewritten. *Frozen*: the largest difference of the full, partial (M = N / 3, random mask) and reuse
  forms to the plain model on the same inputs. *Changed*: of the partial form to the whole model with its inactive
  tokens frozen, on new inputs, with every inactive token cached (C = N - M) and with half of them, where the whole
  model's attention leaves the others out. Both relative to the largest value of the output.
* **refused**: runs unchanged, for the reason given.
* **not capturable**: `torch.export` cannot make one static graph of it.

*Cached* counts the attentions whose keys and values (or sums over tokens) pass from step to step. *Whole* counts
operators that look across tokens and are computed for all of them, on operands merged from the cache.

Written by `python tests/models_table.py`; `tests/test_zoo.py` checks each row.

| class | result | frozen | changed | cached | whole | reason |
| --- | --- | --- | --- | --- | --- | --- |
"""


def render(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    counts = Counter(row["result"] for row in rows)
    text = INTRODUCTION.format(counts=", ".join(f"{counts[k]} {k}" for k in ("exact", "refused", "not capturable")))
    return text + "".join(f"| {' | '.join(_cells(row))} |\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["result"] != "exact":
        return [row["name"], row["result"], "", "", "", "", row.get("reason", "").replace("|", "\\|")]
    errors = [f"{row.get(key, 0.0):.0e}" for key in ("error", "changed_error")]
    return [row["name"], "exact", *errors, str(row["cached"]), str(len(row.get("whole", ()))), ""]


if __name__ == "__main__":
    write_verdicts(ENTRIES, check, JSON, TABLE, render)
