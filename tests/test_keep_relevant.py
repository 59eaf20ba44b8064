"""Cached tokens that attentions choose: against scores and attention written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backend_checks import CountingInner, check, compiled, expected, run
from conftest import Captured
from models import GRID, Case, call, wan
from test_mass import Joint, plan_with

import hetcache_compile as hetcache
from hetcache_compile import Calibration, Plan, TokenKind, reference
from hetcache_compile.calibration.record import QUARTERS, SLICES
from hetcache_compile.errors import PlanError
from hetcache_compile.passes.forms.pipeline import cache_of

SMALL, TEXT, WIDTH = (2, 3, 5), 11, 14


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (1, 30, WIDTH), "text": (1, TEXT, WIDTH)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def relevant(x: torch.Tensor, plan: Plan, count: int) -> torch.Tensor:
    """The inactive tokens that generative ones attend to most, by the whole matrix of `Joint`."""
    scores = (2 * x @ x.sin().transpose(1, 2) * WIDTH**-0.5).softmax(-1)[0, TEXT:, TEXT:]
    mass = scores[torch.from_numpy(plan.token_kind == TokenKind.GENERATIVE)].mean(0)
    mass[torch.from_numpy(plan.active_index)] = -1
    return mass.topk(count).indices.sort().values


@pytest.mark.parametrize("count", [None, 3])
def test_they_are_the_most_relevant_ones(count: int | None) -> None:
    """Of keys behind text, whose rows are not tokens; as many as the plan has, or as it has for this attention."""
    plan = plan_with(4, SMALL, cached_ratio=0.4, cached_by="attention")
    if count is not None:
        plan = replace(plan, cached_counts=(count,))
    forms = hetcache.rewrite(Joint(), plan, kwargs=inputs(0), token_inputs={"hidden_states": 1})
    old, new = inputs(0), inputs(1)
    before = torch.cat([old["text"], old["hidden_states"]], 1)
    chosen = relevant(before, plan, count or plan.num_context)
    assert chosen.tolist() != plan.context_index.tolist()
    full, cache = forms.full(**old)
    torch.testing.assert_close(full, Joint()(**old))
    assert torch.equal(cache["past_key_values.0.key"], before.sin()[:, TEXT + chosen])
    assert torch.equal(cache["past_key_values.0.value"], before.cos()[:, TEXT + chosen])
    partial, _ = forms.partial(cache, **new)
    active = torch.from_numpy(plan.active_index)
    fresh = torch.cat([new["text"], new["hidden_states"][:, active]], 1)
    keys, values = (torch.cat([f(before)[:, TEXT + chosen], f(fresh)], 1) for f in (torch.sin, torch.cos))
    right = (fresh + F.scaled_dot_product_attention(2 * fresh, keys, values))[:, TEXT:]
    torch.testing.assert_close(partial[:, active], right)


class Twice(Joint):
    """A second attention reads the same keys, with a mask."""

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = torch.cat([text, hidden_states], 1)
        key = x.sin()
        first, second = F.scaled_dot_product_attention(2 * x, key, x), F.scaled_dot_product_attention(x, key, x, mask)
        return (first + second)[:, TEXT:]


def test_keys_that_another_attention_reads_by_a_mask_keep_the_plans_tokens() -> None:
    """The columns of the mask are those of the plan's tokens."""
    plan, masked = plan_with(4, SMALL, cached_ratio=0.4), {"mask": torch.randn(1, TEXT + 30, TEXT + 30)}
    outputs = []
    for by in ("distance", "attention"):
        chosen = replace(plan, cached_by=by)
        forms = hetcache.rewrite(Twice(), chosen, kwargs=inputs(0) | masked, token_inputs={"hidden_states": 1})
        _, cache = forms.full(**inputs(0), **masked)
        outputs.append(forms.partial(cache, **inputs(1), **masked)[0])
    assert torch.equal(*outputs)


def test_an_attention_with_a_mask_keeps_the_plans_tokens() -> None:
    masked = {"mask": torch.randn(1, TEXT + 30, TEXT + 30)}
    caches = []
    for cached_by in ("attention", "distance"):
        plan = plan_with(4, SMALL, cached_ratio=0.4, cached_by=cached_by)
        forms = hetcache.rewrite(Joint(), plan, kwargs=inputs(0) | masked, token_inputs={"hidden_states": 1})
        caches.append(forms.full(**inputs(0), **masked)[1])
    assert caches[0].keys() == caches[1].keys()
    assert all(torch.equal(value, caches[1][name]) for name, value in caches[0].items())


def a_plan(**options: Any) -> Plan:
    mask = np.zeros(GRID, dtype=bool)
    mask[:, 1:3, 2:4] = True
    return Plan.from_mask(
        mask, GRID, multiple=1, margin=1, cached_by="attention",
        **{"cached_ratio": 0.5, "num_inference_steps": 4, "schedule": list("FPRP"), **options},
    )  # fmt: skip


RICH = {"cache_dtype": "int8", "extrapolation": 1}


@pytest.mark.parametrize(
    "own",
    [pytest.param(False, marks=pytest.mark.wide, id="as many each"), pytest.param(True, id="numbers of their own")],
)
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.wide, id="exact"), pytest.param(RICH, id="int8, predicted")],
)
def test_in_a_session(captured: Callable[[Case], Captured], options: dict[str, Any], own: bool) -> None:
    """As functional forms have it; what it keeps is known before."""
    model, plan = captured(Case("vace")), a_plan(**options)
    if own:
        plan = replace(plan, cached_counts=(9, 30, 14, 3))
    calls = [{**model.call(step), "timestep": torch.tensor([900.0 - 100 * step])} for step in range(4)]
    with hetcache.session(plan, strict=True) as session:
        outputs = run(compiled(model.model), calls)
    forms = model.forms(plan)
    check(outputs, expected(forms, "FPRP", calls))
    entries = cache_of(model.analysis, plan.form_options)
    kept = sum(entry.num_bytes for entry in entries) + forms.unchanging_bytes
    assert kept == forms.buffer_bytes == session.stats.cache_bytes
    if own:
        assert [entry.shape[entry.dim] for entry in entries if entry.role == "key"] == [9, 30, 14, 3]


@pytest.mark.wide
def test_blocks_of_one_number_are_compiled_once() -> None:
    """A deeper model with the same numbers compiles no more."""
    graphs = []
    for pairs in (2, 4):
        torch._dynamo.reset()
        model, inner = wan(num_layers=2 * pairs), CountingInner()
        plan = replace(a_plan(num_inference_steps=2, schedule=list("FP")), cached_counts=(20, 30) * pairs)
        with hetcache.session(plan, strict=True):
            run(compiled(model, inner), [call(model, seed=step) for step in range(2)])
        graphs.append(inner.graphs)
    assert graphs[1] <= graphs[0]


def test_what_it_cannot_go_with() -> None:
    with pytest.raises(PlanError, match="context_extrapolation"):
        a_plan(context_extrapolation=1)
    with pytest.raises(PlanError, match="merged_ratio 1"):
        a_plan(merged_ratio=0.5)
    with pytest.raises(PlanError, match="cached_by must be one of distance, attention"):
        Plan.from_mask(np.ones(GRID, dtype=bool), GRID, cached_by="luck")
    whole = a_plan(cached_ratio=1.0, context_extrapolation=1)
    assert whole.form_options.cached_by == "distance"  # all of them are cached
    assert "cached, by attention" in a_plan().describe()


def guide(relevance: list[list[float]]) -> Calibration:
    """A calibration that knows of attentions what they lose: by linear parts of the inactive tokens."""
    known = np.repeat(np.asarray(relevance), SLICES // len(relevance[0]), axis=1) / (SLICES // len(relevance[0]))
    empty = Calibration(np.array([2.0, 1.0]), np.zeros((3, 2, 2)), np.array([0]), np.array([1]), np.zeros((1, 3, 1, 1)))
    names = tuple(f"blocks.{number}" for number in range(len(known)))
    return replace(empty, attentions=names, attention_mass=np.ones((len(known), 3)), relevance=known)


def lost(known: Calibration, plan: Plan, counts: tuple[int, ...]) -> float:
    """The attention that these numbers of tokens lose in all."""
    inactive = plan.num_tokens - plan.num_active
    places = np.arange(SLICES + 1) / SLICES * inactive
    total = np.concatenate([np.zeros((len(known.relevance), 1)), known.relevance.cumsum(axis=1)], axis=1)
    return float(sum(row[-1] - np.interp(count, places, row) for row, count in zip(total, counts, strict=True)))


def test_numbers_that_lose_the_least() -> None:
    """Of all numbers with the same sum, in quarters of C; alike where attentions are alike."""
    plan = a_plan(cached_ratio=0.25)
    part = plan.num_context // QUARTERS
    known = guide([[0.4, 0.2, 0.1, 0.0], [0.1, 0.05, 0.05, 0.05], [0.3, 0.3, 0.3, 0.1]])
    counts = known.counts_for(plan)
    most = (plan.num_tokens - plan.num_active) // part
    others = (
        tuple(part * number for number in numbers)
        for numbers in product(range(1, most + 1), repeat=3)
        if sum(numbers) == 3 * (plan.num_context // part)
    )
    assert sum(counts) == 3 * part * (plan.num_context // part) <= 3 * plan.num_context
    assert lost(known, plan, counts) == pytest.approx(min(lost(known, plan, other) for other in others))
    assert len(set(counts)) == 3
    alike = guide([[0.4, 0.2, 0.1, 0.05]] * 4).counts_for(plan)
    assert max(alike) - min(alike) <= part


def test_numbers_of_a_calibration_in_a_plan(tmp_path: Path) -> None:
    known = guide([[0.4, 0.2, 0.1, 0.0], [0.1, 0.05, 0.05, 0.05]])
    plan = a_plan(cached_shares="measured", calibration=known, schedule="full")
    assert plan.cached_counts == known.counts_for(plan)
    assert f", {min(plan.cached_counts)} to {max(plan.cached_counts)} each" in plan.describe()
    plan.save(tmp_path / "a.hetplan")
    assert Plan.load(tmp_path / "a.hetplan").cached_counts == plan.cached_counts
    assert "cached_counts" in plan.form_options.differences(replace(plan, cached_counts=()).form_options)
    assert a_plan(cached_shares="same", calibration=known, schedule="full").cached_counts == ()


def test_the_shipped_calibration_has_what_they_need() -> None:
    """What it gives inactive tokens in all is what its attention mass says of them."""
    known = Calibration.load(reference.CALIBRATION)
    inactive = known.attention_mass[:, [TokenKind.MARGIN, TokenKind.CONTEXT]].sum(axis=1)
    assert known.relevance.shape == (len(known.attentions), SLICES)
    assert (known.relevance.sum(axis=1) < inactive).all()
    assert (known.relevance.sum(axis=1) > known.attention_mass[:, TokenKind.CONTEXT] / 2).all()
    assert len(a_plan(cached_shares="measured", calibration=known, schedule="full").cached_counts) == 8


def test_numbers_that_are_refused(captured: Callable[[Case], Captured]) -> None:
    known = guide([[0.4, 0.2, 0.1, 0.0]])
    with pytest.raises(PlanError, match="'measured' needs a calibration"):
        a_plan(cached_shares="measured")
    with pytest.raises(PlanError, match="cached_shares must be one of same, measured"):
        a_plan(cached_shares="fair")
    with pytest.raises(PlanError, match="calibrate anew"):
        a_plan(cached_shares="measured", calibration=replace(known, relevance=np.zeros((0, SLICES))), schedule="full")
    with pytest.raises(PlanError, match="cached_by 'attention' and a cached_ratio below 1"):
        a_plan(cached_shares="measured", calibration=known, schedule="full", cached_ratio=1.0)
    plan = a_plan()
    for counts in ((0, 5), (plan.num_context + 1,), (1000, 1)):
        with pytest.raises(PlanError, match="no more than"):
            replace(plan, cached_counts=counts)
    with pytest.raises(PlanError, match="need cached_by 'attention'"):
        replace(plan, cached_by="distance", cached_counts=(3,))
    with pytest.raises(hetcache.UnsupportedGraphError, match="for 1 attentions, the graph 4"):
        captured(Case("vace")).forms(replace(plan, cached_counts=(3,)))
    masked = plan_with(4, SMALL, cached_ratio=0.4, cached_by="attention")
    arguments = inputs(0) | {"mask": torch.randn(1, TEXT + 30, TEXT + 30)}
    with pytest.raises(hetcache.UnsupportedGraphError, match="cannot choose what it caches"):
        hetcache.rewrite(
            Joint(), replace(masked, cached_counts=(3,)), kwargs=arguments, token_inputs={"hidden_states": 1}
        )
