"""Batches in which each sample has a mask of its own: a session with several plans.

The oracle is a session with one plan: each sample equals the run of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import (
    TOLERANCE,
    CountingInner,
    Kwargs,
    N,
    check,
    compiled,
    frozen_calls,
    ignoring_time,
    max_error,
    plan_of,
    run,
    tiny_calls,
)
from models import Case, TinyDiT, tiny_call
from models_check import distance
from torch import nn
from torch.utils import _pytree as pytree
from zoo import ENTRIES

import hetcache_compile as hetcache
from hetcache_compile import Plan, StepKind
from hetcache_compile.capture.capture import capture
from hetcache_compile.capture.rewrite import analysed
from hetcache_compile.passes.analysis.analyse import analyse
from hetcache_compile.passes.ir.axis import Tokens
from hetcache_compile.passes.writing.batch import join_samples, take_samples

pytestmark = pytest.mark.usefixtures("strict", "fresh")
STEPS = "FPRPFRP"


def rows(kwargs: Kwargs, start: int, step: int, batch: int) -> Kwargs:
    """Every `step`-th sample of a call."""
    is_batched = {name: isinstance(v, torch.Tensor) and v.shape[0] == batch for name, v in kwargs.items()}
    return {name: value[start::step] if is_batched[name] else value for name, value in kwargs.items()}


def alone(model: nn.Module, plans: Sequence[Plan], calls: Sequence[Kwargs], batch: int) -> list[torch.Tensor]:
    """Each sample run in a session of its own, put into batches again."""
    torch._dynamo.reset()
    fast, samples = compiled(model), []
    for sample in range(batch):
        with hetcache.session(plans[sample % len(plans)]):
            samples.append(run(fast, [rows(kwargs, sample, batch, batch) for kwargs in calls]))
    return [torch.cat(step) for step in zip(*samples, strict=True)]


class Tabled(TinyDiT):
    """With a buffer, and a table that the forward makes, that have as many rows as the batch, for other reasons."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(rows, 22))

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        assert text is not None
        text = text + nn.functional.linear(self.table.mean(0), self.embed_text.weight.T)
        shift = torch.arange(latents.shape[0], dtype=latents.dtype).view(-1, 1, 1, 1, 1)
        return super().forward(latents + 0.1 * shift, text + self.table.sum())


@pytest.mark.parametrize(("num_context", "cache_dtype"), [(N - 35, "same"), (40, "same"), (N - 35, "int8")])
@pytest.mark.parametrize("batch", [2, pytest.param(4, marks=pytest.mark.wide)])
def test_each_sample_equals_the_run_of_it_alone(batch: int, num_context: int, cache_dtype: str) -> None:
    """A batch of two samples, and one of two samples with guidance: `cat([uncond, cond])`."""
    model, plans = TinyDiT(), [plan_of(STEPS, 35, num_context, seed) for seed in range(2)]
    plans = [replace(plan, cache_dtype=cache_dtype) for plan in plans]
    calls = tiny_calls(STEPS, batch=batch)
    with hetcache.session(plans) as session:
        outputs = run(compiled(model), calls)
    check(outputs, alone(model, plans, calls, batch))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 3, "REUSE": 2}
    with hetcache.session(plans[0]):
        shared = run(compiled(model), calls)
    assert max_error(outputs[1][::2], shared[1][::2]) <= TOLERANCE
    assert max_error(outputs[1][1::2], shared[1][1::2]) > 100 * TOLERANCE


def test_frozen_inputs() -> None:
    """Any step from the cache of a full step on the same inputs is that full step, whatever the masks."""
    case = Case("vace", batch=4, config=(("vace_layers", (0,)),))
    model = ignoring_time(case.build())
    calls = frozen_calls(case.call(model, 0), 4)
    with hetcache.session([plan_of("FPPR", seed=seed) for seed in range(2)]) as session:
        outputs = run(compiled(model), calls)
    check(outputs, run(model, calls))
    assert session.stats.kinds == [StepKind.FULL, StepKind.PARTIAL, StepKind.PARTIAL, StepKind.REUSE]


@pytest.mark.wide
def test_an_input_with_as_many_rows_as_the_batch_for_another_reason() -> None:
    """VACE's control scales: one for each of its two control blocks, and here there are two samples."""
    case = Case("vace", batch=2)
    model = ignoring_time(case.build())
    calls = frozen_calls(case.call(model, 0), 4)
    assert len(calls[0]["control_hidden_states_scale"]) == 2
    with hetcache.session([plan_of("FPPR", seed=seed) for seed in range(2)]) as session:
        outputs = run(compiled(model), calls)
    check(outputs, run(model, calls))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}


ZOO = {entry.name: entry for entry in ENTRIES}


@pytest.mark.wide
@pytest.mark.parametrize(
    "name",
    [
        "WanTransformer3DModel (image to video)",
        "LTXVideoTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "MochiTransformer3DModel",
        "EasyAnimateTransformer3DModel",
        "FluxTransformer2DModel",
    ],
)
def test_some_samples_of_a_batch_are_those_of_the_whole_batch(name: str) -> None:
    """Masks, folded batches and constants of batch size, in other models; the tokens of what is left are found."""
    entry = ZOO[name]
    model, first, second = entry.build(), entry.inputs(0), entry.inputs(1)

    def both(a: Any, b: Any) -> Any:
        return torch.cat([a, b]) if isinstance(a, torch.Tensor) and a.shape[:1] == (1,) else a

    kwargs = pytree.tree_map(both, first, second)
    program, analysis = analysed(capture(model, (), kwargs), entry.grid, entry.token_inputs)
    sources = analysis.token_sources
    module, states = take_samples(program.module, sources, 2, 1)
    inputs = program.flat_inputs((), kwargs)
    parts = [module(*inputs, torch.tensor([sample])) for sample in range(2)]
    outputs = [join_samples(rows, state) for *rows, state in zip(*parts, states, strict=True)]
    assert all(isinstance(state, Tokens) for state in states)
    assert distance(outputs, model(**kwargs)) <= TOLERANCE
    assert analyse(module, entry.grid, entry.token_inputs).token_sources == sources


@pytest.mark.wide
def test_a_time_for_each_token() -> None:
    case = Case("wan", batch=4, time_per_token=True)
    model, plans = case.build(), [plan_of("FPRP", seed=seed) for seed in range(2)]
    calls = [case.call(model, seed) for seed in range(4)]
    with hetcache.session(plans):
        outputs = run(compiled(model), calls)
    check(outputs, alone(model, plans, calls, 4))


@pytest.mark.wide
def test_extrapolation_and_branches() -> None:
    case = Case("wan", batch=2, config=(("num_layers", 1),))
    model, plans = case.build(), [replace(plan_of(STEPS, seed=seed), extrapolation=1) for seed in range(2)]
    branches = {
        name: [case.call(model, first + n) for n, _ in enumerate(STEPS)] for name, first in (("a", 0), ("b", 50))
    }
    for calls in branches.values():
        for number, kwargs in enumerate(calls):
            kwargs["timestep"] = torch.full((2,), 900.0 - 50 * number)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in branches}
    fast = compiled(model)
    with hetcache.session(plans) as session:
        for step, _ in enumerate(STEPS):
            for name, calls in branches.items():
                with session.branch(name):
                    outputs[name] += run(fast, calls[step : step + 1])
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 6, "REUSE": 4}
    for name, calls in branches.items():
        check(outputs[name], alone(model, plans, calls, 2))


def test_what_has_as_many_rows_as_the_batch_but_no_samples() -> None:
    """A buffer is whole for every sample; a row for each sample that the forward makes is that sample's."""
    # The table makes outputs large, of which float32 keeps too few digits.
    model, plans = Tabled(4).double(), [plan_of("FPRP", seed=seed) for seed in range(2)]
    calls = [{name: value.double() for name, value in tiny_call(0, batch=4).items()}] * 4
    with hetcache.session(plans):
        outputs = run(compiled(model), calls)
    check(outputs, run(model, calls))


def test_new_masks_compile_nothing() -> None:
    """One set of forms for all masks, of the batch and of the next one."""
    model, inner, calls = TinyDiT(), CountingInner(), tiny_calls("FPR", batch=2)
    fast = compiled(model, inner)
    for seeds in ((0, 1), (2, 3), (4, 4)):
        plans = [plan_of("FPR", seed=seed) for seed in seeds]
        with hetcache.session(plans):
            outputs = run(fast, calls)
        assert inner.graphs == 3
    torch._dynamo.reset()
    with hetcache.session(plans[0]):
        check(outputs, run(compiled(model), calls))


def test_cache_bytes_are_those_of_one_plan() -> None:
    """Each plan has buffers for its own samples; the text's keys and values are kept with one plan only."""
    model, calls = TinyDiT(), tiny_calls("FP", batch=4)
    plans = [plan_of("FP", seed=seed) for seed in range(2)]
    held = []
    for given in (plans[0], plans):
        with hetcache.session(given) as session:
            run(compiled(model), calls)
        held.append(session.stats.cache_bytes)
    assert held[0] == held[1] + hetcache.rewrite(model, plans[0], (), calls[0]).unchanging_bytes > held[1] > 0


class Mixing(TinyDiT):
    """Its samples see one another."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(latents - latents.mean(0, keepdim=True), text)


def test_samples_that_meet() -> None:
    """One warning, and the model runs unchanged; with one plan nothing stands in the way."""
    model, calls = Mixing(), tiny_calls("FP", batch=2)
    fast = compiled(model)
    with (
        pytest.warns(UserWarning, match="all 2 calls ran plainly"),
        hetcache.session([plan_of("FP", seed=seed) for seed in range(2)]) as session,
        pytest.warns(UserWarning, match=r"aten\.mean\.dim: across the batch, it reduces over"),
    ):
        check(run(fast, calls), run(model, calls))
    assert session.stats.steps == {"FULL": 0, "PARTIAL": 0, "REUSE": 0}
    with hetcache.session(plan_of("FP")) as session:
        run(fast, calls)
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 0}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_cannot_be_shared(batch: int) -> None:
    fast = compiled(TinyDiT())
    message = rf"2 plans, but the batch has {batch} samples: give a multiple of 2"
    with (
        pytest.raises(hetcache.SessionError, match=message),
        hetcache.session([plan_of("FP", seed=seed) for seed in range(2)]),
    ):
        run(fast, tiny_calls("F", batch=batch))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (plan_of("FP", num_active=36), r"num_active \(35, 36\)"),
        (plan_of("FP", num_context=40), r"num_context \(70, 40\)"),
        (replace(plan_of("FP"), extrapolation=1), r"extrapolation \(0, 1\)"),
        (plan_of("FR"), "steps"),
    ],
    ids=["active", "cached", "extrapolation", "steps"],
)
def test_plans_that_do_not_agree(other: Plan, message: str) -> None:
    with pytest.raises(hetcache.SessionError, match=rf"plans 0 and 1 differ in {message}"):
        hetcache.session([plan_of("FP"), other])
    assert plan_of("FP").batch_key != other.batch_key


def test_plans_of_other_masks_have_one_batch_key() -> None:
    assert plan_of("FP", seed=0).batch_key == plan_of("FP", seed=1).batch_key
    times = replace(plan_of("FP"), timesteps=np.array([900.0, 500.0]))
    assert times.batch_key != plan_of("FP").batch_key


def test_no_plan() -> None:
    none: Any = []
    with pytest.raises(hetcache.SessionError, match="at least one plan"):
        hetcache.session(none)
