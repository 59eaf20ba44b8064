"""What every command shares: the terminal, progress bars, and how packed token inputs are named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import PlanError

console = Console(stderr=True)

TokenInput = Annotated[
    list[str] | None,
    typer.Option(help="An input that holds packed tokens and their dim, such as hidden_states=1. Repeatable."),
]


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A progress bar for each stage: a function of stage, what is done, and how much there is.

    What the package logs meanwhile, such as what has been compiled, is printed above the bars.
    """
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars, logged(lambda line: bars.console.print(line, style="dim")):
        tasks: dict[str, Any] = {}

        def update(stage: str, step: int, steps: int) -> None:
            if stage not in tasks:
                for task in bars.tasks:  # a stage is done when the next one begins
                    bars.update(task.id, completed=task.total)
                tasks[stage] = bars.add_task(stage, total=steps)
            bars.update(tasks[stage], completed=step)

        yield update
        for task in bars.tasks:
            bars.update(task.id, completed=task.total)


@contextmanager
def logged(show: Callable[[str], None]) -> Iterator[None]:
    """Hand every line that the package logs to a function."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger, handler = logging.getLogger(__package__), Shown()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def warn(reasons: Sequence[str]) -> None:
    """A line for each."""
    for warning in reasons:
        console.print(f"warning: {warning}", style="yellow")


def token_inputs(given: list[str] | None) -> dict[str, int] | None:
    """What `--token-input NAME=DIM` says, once or more."""
    parsed = {}
    for text in given or []:
        name, _, dim = text.partition("=")
        if not dim.lstrip("-").isdigit():
            raise PlanError(f"--token-input takes NAME=DIM, got {text}")
        parsed[name] = int(dim)
    return parsed or None
