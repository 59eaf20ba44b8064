"""Run a list of passes: with the name of the one that fails in its error, and each graph written out where asked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from .editor import PassError
from .refusal import HetCacheError

T = TypeVar("T")
DUMP = "HETCACHE_DUMP"
"""Environment: a folder for every graph, after every pass of every list."""
_RUNS = itertools.count(1)


def run_passes(
    pipeline: str,
    passes: Sequence[Callable[[T], T | PassResult]],
    subject: T,
    graph_of: Callable[[T], GraphModule],
) -> T:
    """What the passes make of `subject`, one after the other.

    Args:
        pipeline: its name, for errors and files.
        passes: functions, or objects with a `name`. One that edits a bare module may return FX's `PassResult`.
        subject: what the first pass takes.
        graph_of: the graph in a subject.

    Raises:
        PassError: a pass failed otherwise than by refusing the model; its name is in the text.
    """
    run = f"{next(_RUNS):03d}-{pipeline}" if os.environ.get(DUMP) else pipeline
    dump(graph_of(subject), f"{run}-0-given")
    for number, one in enumerate(passes, start=1):
        try:
            result = one(subject)
            subject = result.graph_module if isinstance(result, PassResult) else result
            graph_of(subject).graph.lint()
        except HetCacheError as error:
            error.add_note(f"in pass {pass_name(one)} of {pipeline}")
            raise
        except Exception as error:
            raise PassError(f"pass {pass_name(one)} of {pipeline} failed: {error}") from error
        dump(graph_of(subject), f"{run}-{number}-{pass_name(one)}")
    return subject


def pass_name(one: object) -> str:
    """The name of a pass."""
    return str(getattr(one, "name", None) or getattr(one, "__name__", None) or type(one).__name__)


def dump(module: GraphModule, name: str) -> None:
    """Write a graph as Python text into the folder that `HETCACHE_DUMP` names, if it names one."""
    folder = os.environ.get(DUMP)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.py").write_text(module.print_readable(print_output=False))
