"""Captures are expensive (seconds) and depend on no plan: each `Case` is captured once in a test run."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import Case

from hetcache_compile import Forms, Plan
from hetcache_compile.capture.capture import Program, capture
from hetcache_compile.capture.rewrite import analysed, write_forms
from hetcache_compile.passes.analysis.analyse import Analysis
from hetcache_compile.passes.forms.pipeline import FormOptions

SLOW = (
    "zoo", "sample_call", "trt", "engine", "export_reference", "artefact", "batch", "calibration", "cli", "export",
    "matrix", "examples", "tiny_pipelines", "any_pipeline", "pipelines", "session", "regions", "select", "gpu_script",
)  # fmt: skip
"""The files that take half a minute and more, the slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: workers take whole files, and then end at about the same time."""
    order = {f"test_{name}.py": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@dataclass(frozen=True)
class Captured:
    """A case's model with its program and analysis; forms for any plan on its grid are cheap to write."""

    case: Case
    model: torch.nn.Module
    program: Program
    analysis: Analysis
    by_options: dict[FormOptions, Forms] = field(default_factory=dict)

    def call(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of a call of the captured shape."""
        return self.case.call(self.model, seed)

    def plain(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """What the model itself makes of a call."""
        with torch.no_grad():
            return self.model(**kwargs)[0]

    def forms(self, plan: Plan) -> Forms:
        """What `rewrite` gives, without a new capture; written once for plans that share forms."""
        if plan.form_options not in self.by_options:
            self.by_options[plan.form_options] = write_forms(self.program, self.analysis, plan)
        return self.by_options[plan.form_options].for_plan(plan)


@functools.cache
def _capture(case: Case) -> Captured:
    model = case.build()
    program = capture(model, (), case.call(model, seed=0))
    return Captured(case, model, *analysed(program, case.grid, None))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on tensors as small as these: four times the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def rare_collections() -> Iterator[None]:
    """Captures make graphs of many small objects; looking through them for garbage all the time costs a twentieth."""
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 50, 100)
    yield
    gc.set_threshold(*thresholds)


@pytest.fixture(scope="session", autouse=True)
def exports_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where `exported` keeps what all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["HETCACHE_TEST_EXPORTS"] = str(shared / "exports")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a program in this process: its `main`, name and arguments; returns (exit status, stdout, stderr)."""

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        status: Any = 0
        handler = signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def hetcache_command(run_main: Command) -> Command:
    """Run `hetcache ...`."""
    from hetcache_compile.cli import main as cli

    return functools.partial(run_main, cli.main, "hetcache")


@pytest.fixture
def export_command(run_main: Command) -> Command:
    """Run `hetcache-export ...`."""
    from hetcache_compile.export import cli

    return functools.partial(run_main, cli.main, "hetcache-export")


@pytest.fixture(scope="session")
def captured() -> Iterator[Callable[[Case], Captured]]:
    """A function from a case to its one capture."""
    yield _capture
    _capture.cache_clear()


@pytest.fixture
def strict() -> Iterator[None]:
    """A model that is recompiled too often must not fall back to eager: a test would then show nothing."""
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget all that Dynamo has compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
