"""Every transformer class of diffusers: rewritten exactly, refused or not capturable, as `docs/models.json` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models_check import check
from models_table import JSON, TABLE, render
from verdicts import of_the_tables_diffusers
from zoo import ENTRIES
from zoo.entry import Entry

EXPECTED = {row["name"]: row for row in json.loads(JSON.read_text())} if JSON.exists() else {}


ROWS = [
    pytest.param(entry, id=entry.name, marks=[pytest.mark.wide] if number % 12 else [])
    for number, entry in enumerate(ENTRIES)
]
"""Of relatives that stand beside each other, every twelfth one is run with all other tests, and the rest with
`make test-wide`."""


@pytest.mark.parametrize("entry", ROWS)
def test_model(entry: Entry) -> None:
    """Exact to fp32 rounding on frozen inputs and on new ones, or refused for the reason in the table."""
    verdict, expected = check(entry), EXPECTED[entry.name]
    assert verdict.result == expected["result"]
    if verdict.result == "exact":  # to the tolerance, or to twice what the model itself loses to float32
        assert verdict.cached == expected["cached"]
    else:
        assert verdict.reason == expected["reason"]


def test_no_model_is_wrong() -> None:
    assert {row["result"] for row in EXPECTED.values()} <= {"exact", "refused", "not capturable"}
    assert sum(row["result"] == "exact" for row in EXPECTED.values()) >= 40


@of_the_tables_diffusers
def test_the_table_is_up_to_date() -> None:
    """`python tests/models_table.py` writes both; every entry of the zoo has its row."""
    assert list(EXPECTED) == [entry.name for entry in ENTRIES]
    assert Path(TABLE).read_text() == render(list(EXPECTED.values()))
