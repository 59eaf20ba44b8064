"""`python -m tests.zoo [NAME ...]`: for each entry, does it run, does torch.export capture it, in how many seconds."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import transformers
from torch.utils import _pytree as pytree

from . import ENTRIES, SKIPPED
from .entry import Entry


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What the action gives, and in one line what it raised. What it prints is dropped: torch.export prints graphs."""
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return action(), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:200]}"


def check(entry: Entry) -> str:
    """One row of the table: the model runs, another is captured before its first call, and runs as before after it."""
    start = time.perf_counter()
    output, error = attempt(lambda: tensors(entry.build()(**entry.inputs())))
    if not error and not all(tensor.isfinite().all() for tensor in output):
        error = "the output is not finite"
    if error:
        return f"| {entry.name} | no | - | - | - | {error} |"
    model = entry.build()
    program, error = attempt(lambda: torch.export.export(model, (), entry.inputs(), strict=False))
    nodes = "-" if error else str(len(program.graph_module.graph.nodes))
    seconds = time.perf_counter() - start
    again, spoilt = attempt(lambda: tensors(model(**entry.inputs())))
    same = not spoilt and all(map(torch.equal, output, again))
    return f"| {entry.name} | yes | {nodes} | {'yes' if same else 'no'} | {seconds:.1f} | {error or spoilt} |"


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of an output."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def left_out() -> list[str]:
    """Classes that diffusers exports, without entry or reason."""
    exported = {name for name, value in vars(transformers).items() if inspect.isclass(value)}
    exported = {name for name in exported if issubclass(getattr(transformers, name), torch.nn.Module)}
    return sorted(exported - {entry.name.split()[0] for entry in ENTRIES} - set(SKIPPED))


def main(names: list[str]) -> None:
    """Print the table, or the rows whose name contains one of `names`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    print("| entry | runs | nodes captured | runs as before after it | seconds | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for entry in ENTRIES:
        if not names or any(name.lower() in entry.name.lower() for name in names):
            print(check(entry), flush=True)
    if not names:
        print(f"\nclasses without an entry: {', '.join([*left_out(), *SKIPPED])}")


if __name__ == "__main__":
    main(sys.argv[1:])
