"""Verdicts of many rows, kept in a JSON file and shown as a table: models and pipelines."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import pytest
import torch
from packaging.version import Version

from hetcache_compile.files import atomically

DIFFUSERS = "0.42"
"""The tables are of this version."""

of_the_tables_diffusers = pytest.mark.skipif(
    Version(diffusers.__version__) < Version(DIFFUSERS),
    reason=f"the table is of diffusers {DIFFUSERS}, which has classes that this one lacks",
)


class Verdict(Protocol):
    """What was found of a row."""

    def as_json(self) -> dict[str, Any]: ...


def write_verdicts(
    rows: Sequence[Any],
    check: Callable[[Any], Verdict],
    file: Path,
    table: Path,
    render: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Check the rows whose name contains one of the command line's words, by default all, and write both files.

    Each verdict is written at once: a long run that is cut short loses nothing.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    words = [word.lower() for word in sys.argv[1:]]
    known = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    for row in rows:
        if words and not any(word in row.name.lower() for word in words):
            continue
        known[row.name] = check(row).as_json()
        print(" ".join(map(str, known[row.name].values())), flush=True)
        text = json.dumps([known[row.name] for row in rows if row.name in known], indent=1) + "\n"
        atomically(file, lambda path, text=text: Path(path).write_text(text))
    atomically(
        table, lambda path: Path(path).write_text(render([known[row.name] for row in rows if row.name in known]))
    )
