"""Keys and values cached in smaller types: what is rounded, by how much, and what stays exact.

What the forms give is compared with the forms that keep everything, whose cache is rounded by `rounded` below: another
way to say the same, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import check, compiled, expected, max_error, plan_of, run, tiny_calls
from conftest import Captured
from models import GRID, Case, TinyDiT, wan
from models import call as wan_call
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile import Plan
from hetcache_compile.errors import PlanError
from hetcache_compile.passes.forms.store import changes, stored_as
from hetcache_compile.passes.ir.axis import Tokens
from hetcache_compile.passes.ir.cache import CacheEntry

DTYPES = ("bf16", "fp8", "int8")
STEPS = {"bf16": 2.0**-8, "fp8": 2.0**-4, "int8": 1 / 254}
"""How far a number may be off: of itself, or of the largest in its row."""
FROZEN = {"bf16": 0.01, "fp8": 0.15, "int8": 0.02}
"""How far outputs of the order of 1 are off at most, of models whose every weight is loud."""
VACE, WAN = Case("vace"), Case("wan", batch=2, time_per_token=True)
KEY = CacheEntry("0.key", "context", 2, (1, 2, 7, 12), torch.float32, "", Tokens(2), role="key", layer=0)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rounded(value: torch.Tensor, cache_dtype: str) -> torch.Tensor:
    """A key or value as it comes out of the cache."""
    if cache_dtype == "bf16":
        return value.bfloat16().float()
    largest = 127.0 if cache_dtype == "int8" else 448.0
    scale = (value.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (value / scale).clamp(-largest, largest)
    numbers = numbers.round() if cache_dtype == "int8" else numbers.to(torch.float8_e4m3fn).float()
    return numbers * scale


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("case", [VACE, WAN], ids=["vace", "wan"])
def test_partial_steps_read_rounded_rows(captured: Callable[[Case], Captured], case: Case, cache_dtype: str) -> None:
    model, plan = captured(case), plan_of("FP")
    exact, stored = model.forms(plan), model.forms(replace(plan, cache_dtype=cache_dtype))
    old, now = model.call(0), model.call(1)
    (full,), cache = exact.full(**old)
    (found,), small = stored.full(**old)
    assert torch.equal(found, full)  # a full step reads nothing
    cached = {entry.input_name: entry for entry in exact.cache_entries if changes(entry, cache_dtype)}
    assert len(cached) == 2 * (4 if case is VACE else 2)
    for name in cached:
        value = rounded(cache[name], cache_dtype)
        of = cache[name].abs() if cache_dtype != "int8" else cache[name].abs().amax(-1, keepdim=True)
        assert ((value - cache[name]).abs() <= 1.01 * STEPS[cache_dtype] * of + 1e-6).all()
        cache[name] = value
    for inputs in (old, now):
        (truth,), _ = exact.partial(cache, **inputs)
        (partial,), after = stored.partial(small, **inputs)
        torch.testing.assert_close(partial, truth, atol=2e-5, rtol=0)
        assert all(after[name] is small[name] for name in cached)  # a partial step leaves them as they are
    (frozen,), _ = stored.partial(small, **old)
    error = float((frozen - full).abs().max())
    assert 1e-6 < error < FROZEN[cache_dtype]
    assert torch.equal(stored.reuse(small, **now)[0][0], exact.reuse(cache, **now)[0][0])


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("num_context", [70, 40], ids=["all rows", "some rows"])
def test_in_a_session(cache_dtype: str, num_context: int) -> None:
    model, calls, steps = TinyDiT(), tiny_calls("FPPRFP"), "FPPRFP"
    plan = replace(plan_of(steps, 35, num_context), cache_dtype=cache_dtype)
    forms = hetcache.rewrite(model, plan, (), calls[0])
    with hetcache.session(plan, strict=True) as session:
        outputs = run(compiled(model), calls)
        held = session.stats.cache_bytes
    check(outputs, expected(forms, steps, calls))
    assert held == forms.buffer_bytes


class Reordered(nn.Linear):
    """A model's own choice of rows, upstream of its keys and values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).index_select(-1, torch.arange(self.out_features - 1, -1, -1))


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
def test_what_a_model_selects_itself_stays(cache_dtype: str) -> None:
    """The numbers and their scales are of one selection of rows; the one before it is the model's."""
    model, calls = TinyDiT(), tiny_calls("FPF")
    model.qkv = Reordered(22, 66)
    plan = replace(plan_of("FPF", 35, 70), cache_dtype=cache_dtype)
    forms = hetcache.rewrite(model, plan, (), calls[0])
    with hetcache.session(plan, strict=True):
        outputs = run(compiled(model), calls)
    check(outputs, expected(forms, "FPF", calls))
    check(outputs[::2], run(model, calls[::2]))


SETTINGS: dict[str, dict[str, Any]] = {
    "predicted": {"context_extrapolation": 1},
    "outputs too": {"context_extrapolation": 1, "extrapolation": 2},
    "boxes": {"merged_ratio": 0.3},
    "kmeans": {"merged_ratio": 0.3, "merging": "kmeans"},
    "boxes, predicted": {"merged_ratio": 0.3, "context_extrapolation": 1},
    "moving, predicted": {"context_motion": 1, "context_extrapolation": 1},
    "chosen": {"selection": "attention"},
    "chosen, predicted": {"selection": "hetcache", "context_extrapolation": 1},
}


QUICK = ("outputs too",)
"""Those run with all other tests."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name in QUICK else [pytest.mark.wide])
        for name, options in SETTINGS.items()
    ],
)
def test_with_everything_else(options: dict[str, Any]) -> None:
    """In a session as functionally; and nearer to the same plan with an exact cache than other context is."""
    mask = np.zeros(GRID, dtype=bool)
    mask[:, 1:3, 2:5] = True
    steps = ["FULL", "PARTIAL", "FULL", "PARTIAL", "REUSE"]
    letters = "".join(step[0] for step in steps)
    make = {"num_inference_steps": len(steps), "schedule": steps, "margin": 1.0, **options}
    plans = {dtype: Plan.from_mask(mask, GRID, cache_dtype=dtype, **make) for dtype in ("same", "int8")}
    model = wan(num_layers=1)
    calls = [wan_call(model, seed=seed) for seed in range(len(steps))]
    forms = {dtype: hetcache.rewrite(model, plan, (), calls[0]) for dtype, plan in plans.items()}
    truths = {dtype: expected(forms[dtype], letters, calls) for dtype in plans}
    with hetcache.session(plans["int8"], strict=True):
        outputs = run(compiled(model), calls)
    check(outputs, truths["int8"])
    errors = [float((a - b).abs().max()) for a, b in zip(truths["int8"], truths["same"], strict=True)]
    assert errors[0] == 0
    assert 1e-6 < errors[1] < 0.2


@pytest.mark.wide
def test_inductor_keeps_older_values_of_it_too() -> None:
    """Numbers and scales of the step before are stored from buffers that are overwritten in the same graph.

    Inductor's arithmetic is not eager mode's to the last bit, so a number halfway between two may be rounded to the
    other one. What that changes is a small part of what int8 changes; without the older values all is far off.
    """
    model, steps = wan(num_layers=1), "FFPFP"
    calls = [wan_call(model, seed=seed) for seed in range(len(steps))]

    def truth(context_extrapolation: int, cache_dtype: str) -> list[torch.Tensor]:
        settings = {"context_extrapolation": context_extrapolation, "cache_dtype": cache_dtype}
        return expected(hetcache.rewrite(model, replace(plan_of(steps), **settings), (), calls[0]), steps, calls)

    plan = replace(plan_of(steps), cache_dtype="int8", context_extrapolation=1)
    with hetcache.session(plan, strict=True):
        outputs = run(compiled(model, "inductor"), calls)
    truths, unrounded, older_lost = truth(1, "int8"), truth(1, "same"), truth(0, "int8")
    for at, letter in enumerate(steps):
        off = max_error(outputs[at], truths[at])
        if letter == "F":  # reads nothing that was rounded
            assert off <= 2e-5
        else:
            rounding = max_error(unrounded[at], truths[at])
            assert off <= max(2e-5, rounding / 4)
            assert max_error(older_lost[at], truths[at]) > 10 * rounding


def test_storing_again_changes_nothing() -> None:
    """Where a value is stored anew as it was read, as histories are, it stays as it is."""
    value = torch.randn(3, 5, 64) * torch.logspace(-6, 6, 5)[:, None]
    value[0, 0] = 0
    for dtype in ("fp8", "int8"):
        once = rounded(value, dtype)
        torch.testing.assert_close(rounded(once, dtype), once, atol=0, rtol=1e-6)


def test_sizes() -> None:
    def size(cache_dtype: str, **changed: Any) -> int:
        return sum(entry.num_bytes for entry in stored_as(replace(KEY, **changed), cache_dtype))

    assert [size(dtype) for dtype in ("same", *DTYPES)] == [4 * 168, 2 * 168, 168 + 4 * 14, 168 + 4 * 14]
    assert [size(dtype, dtype=torch.float16) for dtype in ("same", *DTYPES)] == [2 * 168, 2 * 168, 224, 224]
    others = [{"group": "output", "rows": "tokens"}, {"rows": "none", "role": "sum"}, {"dim": 3}]
    for changes_of_it in others:
        assert size("int8", **changes_of_it) == 4 * 168


def test_a_plan_keeps_it(tmp_path: Any) -> None:
    plan = replace(plan_of("FP"), cache_dtype="fp8")
    plan.save(tmp_path / "a.hetplan")
    assert Plan.load(tmp_path / "a.hetplan").cache_dtype == "fp8"
    assert "cached as fp8" in plan.describe()
    with pytest.raises(PlanError, match="cache_dtype must be one of same, bf16, fp8, int8, got 'int4'"):
        replace(plan, cache_dtype="int4")
    with pytest.raises(PlanError, match="cache_dtype"):
        Plan.from_mask(np.ones(GRID, dtype=bool), GRID, cache_dtype="half")
