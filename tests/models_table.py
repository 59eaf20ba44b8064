"""`python tests/models_table.py [NAME ...]` checks the zoo and writes docs/models.json and docs/models.md."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from models_check import check
from zoo import ENTRIES

from hetcache_compile.files import atomically

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


def main(names: list[str]) -> None:
    """Check all entries, or those whose name contains one of `names`, and write both files."""
    known = {row["name"]: row for row in json.loads(JSON.read_text())} if JSON.exists() else {}
    for entry in ENTRIES:
        if not names or any(name.lower() in entry.name.lower() for name in names):
            verdict = check(entry)
            print(f"{entry.name}: {verdict.result} {verdict.error:.0e} {verdict.reason}", flush=True)
            known[entry.name] = verdict.as_json()
    rows = [known[entry.name] for entry in ENTRIES if entry.name in known]
    atomically(JSON, lambda path: Path(path).write_text(json.dumps(rows, indent=1) + "\n"))
    atomically(TABLE, lambda path: Path(path).write_text(render(rows)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    main(sys.argv[1:])
