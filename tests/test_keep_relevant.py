"""Cached tokens that attentions choose: against scores and attention written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backend_checks import check, compiled, expected, run
from conftest import Captured
from models import GRID, Case
from test_mass import Joint, plan_with

import hetcache_compile as hetcache
from hetcache_compile import Plan, TokenKind
from hetcache_compile.errors import PlanError

SMALL, TEXT, WIDTH = (2, 3, 5), 11, 14


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (1, 30, WIDTH), "text": (1, TEXT, WIDTH)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def relevant(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The C inactive tokens that generative ones attend to most, by the whole matrix of `Joint`."""
    scores = (2 * x @ x.sin().transpose(1, 2) * WIDTH**-0.5).softmax(-1)[0, TEXT:, TEXT:]
    mass = scores[torch.from_numpy(plan.token_kind == TokenKind.GENERATIVE)].mean(0)
    mass[torch.from_numpy(plan.active_index)] = -1
    return mass.topk(plan.num_context).indices.sort().values


def test_they_are_the_most_relevant_ones() -> None:
    """Of keys behind text, whose rows are not tokens."""
    plan = plan_with(4, SMALL, cached_ratio=0.4, cached_by="attention")
    forms = hetcache.rewrite(Joint(), plan, kwargs=inputs(0), token_inputs={"hidden_states": 1})
    old, new = inputs(0), inputs(1)
    before = torch.cat([old["text"], old["hidden_states"]], 1)
    chosen = relevant(before, plan)
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


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8", "extrapolation": 1}], ids=str)
def test_in_a_session(captured: Callable[[Case], Captured], options: dict[str, Any]) -> None:
    """As functional forms have it."""
    model, plan = captured(Case("vace")), a_plan(**options)
    calls = [{**model.call(step), "timestep": torch.tensor([900.0 - 100 * step])} for step in range(4)]
    with hetcache.session(plan, strict=True):
        outputs = run(compiled(model.model), calls)
    check(outputs, expected(model.forms(plan), "FPRP", calls))


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
