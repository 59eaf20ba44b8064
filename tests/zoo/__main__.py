"""`python -m tests.zoo [NAME ...]`: for each entry, does it run, does torch.export capture it, in how many seconds."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import ENTRIES
from .entry import Entry


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What the action gives, and in one line what it raised."""
    try:
        with torch.no_grad():
            return action(), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:160]}"


def check(entry: Entry) -> str:
    """One row of the table."""
    start = time.perf_counter()
    model, error = attempt(entry.build)
    if not error:
        output, error = attempt(lambda: model(**entry.inputs()))
    if error:
        return f"| {entry.name} | no | - | - | {error} |"
    if not all(tensor.isfinite().all() for tensor in tensors(output)):
        return f"| {entry.name} | no | - | - | the output is not finite |"
    program, error = attempt(lambda: torch.export.export(model, (), entry.inputs(), strict=False))
    nodes = "-" if error else str(len(program.graph_module.graph.nodes))
    return f"| {entry.name} | yes | {nodes} | {time.perf_counter() - start:.1f} | {error} |"


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of an output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def main(names: list[str]) -> None:
    """Print the table, or the rows whose name contains one of `names`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    print("| entry | runs | nodes captured | seconds | error |\n| --- | --- | --- | --- | --- |")
    for entry in ENTRIES:
        if not names or any(name.lower() in entry.name.lower() for name in names):
            print(check(entry), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
