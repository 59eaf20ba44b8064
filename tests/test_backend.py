"""The backend and the session: which form runs when, on whose cache, and what happens when things go wrong.

All on one captured model; `backend_checks` says what is compared with what.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import (
    TOLERANCE,
    CountingInner,
    N,
    check,
    compiled,
    expected,
    hetcache_is_closed,
    max_error,
    plan_of,
    run,
)
from conftest import Captured
from models import TEXT_TOKENS, Case, TinyDiT, tiny_call
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile import Plan, StepKind
from hetcache_compile.errors import HetCacheWarning

pytestmark = pytest.mark.usefixtures("strict")
WAN = Case("wan")


@pytest.fixture(scope="module")
def shared(captured: Callable[[Case], Captured]) -> tuple[Captured, Any, CountingInner]:
    """One captured model, the same model compiled, and its inner compiler."""
    torch._dynamo.reset()
    model, inner = captured(WAN), CountingInner()
    return model, compiled(model.model, inner), inner


Shared = tuple[Captured, Any, CountingInner]


# Steps, stats and buffers of one model


def test_entry_point() -> None:
    assert "hetcache" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("hetcache") is hetcache.hetcache_backend


def test_outside_a_session(shared: Shared) -> None:
    model, fast, _ = shared
    calls = [model.call(seed) for seed in range(2)]
    check(run(fast, calls), [model.plain(kwargs) for kwargs in calls])


@pytest.mark.parametrize("num_context", [N - 35, 40])
def test_a_session_follows_the_plan(shared: Shared, num_context: int) -> None:
    model, fast, _ = shared
    steps = "FPRPPRFRP"
    plan = plan_of(steps, 35, num_context)
    calls = [model.call(seed) for seed in range(len(steps))]
    with hetcache.session(plan) as session:
        outputs = run(fast, calls)
    check(outputs, expected(model.forms(plan), steps, calls))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 4, "REUSE": 3}
    assert set(session.stats.seconds) == {"FULL", "PARTIAL", "REUSE"}
    assert min(session.stats.seconds.values()) > 0
    assert max(session.stats.seconds.values()) <= session.stats.total_seconds


def test_same_budgets_compile_nothing(shared: Shared) -> None:
    model, fast, inner = shared
    steps = "FPR"
    calls = [model.call(seed) for seed in range(3)]
    with hetcache.session(plan_of(steps, 29)):
        run(fast, calls)
    before = inner.graphs
    plan = plan_of(steps, 29, seed=1)
    with hetcache.session(plan) as session:
        outputs = run(fast, calls)
    assert inner.graphs == before
    assert session.stats.compile_seconds < 0.2
    check(outputs, expected(model.forms(plan), steps, calls))
    with hetcache.session(plan_of(steps, 30)):
        run(fast, calls)
    assert inner.graphs > before  # other budgets do: the count can count


def test_inside_and_outside_at_once(shared: Shared) -> None:
    """While a session is open here, the model is plain in any other context; after it, here too."""
    model, fast, _ = shared
    calls = [model.call(seed) for seed in range(4)]
    plain = [model.plain(kwargs) for kwargs in calls]
    plan = plan_of("FPR")
    elsewhere = contextvars.Context()
    with hetcache.session(plan) as session:
        first = run(fast, calls[:2])
        with pytest.warns(HetCacheWarning, match="thread or context that has no session"):
            check(elsewhere.run(run, fast, calls), plain)
        last = run(fast, calls[2:3])
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 1}
    check([*first, *last], expected(model.forms(plan), "FPR", calls[:3]))
    assert max_error(last[0], plain[2]) > 100 * TOLERANCE
    check(run(fast, calls), plain)


def test_sessions_start_anew(shared: Shared) -> None:
    """A session that ended early leaves nothing behind: the next one begins with a FULL step on its own inputs."""
    model, fast, _ = shared
    steps = "FRPR"
    plan = plan_of(steps)
    forms = model.forms(plan)
    for taken in (2, 4, 4):
        calls = [model.call(10 * taken + seed) for seed in range(taken)]
        with hetcache.session(plan) as session:
            outputs = run(fast, calls)
        check(outputs, expected(forms, steps[:taken], calls))
        assert sum(session.stats.steps.values()) == taken
    assert hetcache_is_closed()


def test_sessions_do_not_nest(shared: Shared) -> None:
    with hetcache.session(plan_of("FF")), pytest.raises(hetcache.SessionError, match="open already"):
        hetcache.session(plan_of("FF")).__enter__()
    assert hetcache_is_closed()


def pointers(session: hetcache.Session) -> set[int]:
    return {
        tensor.data_ptr()
        for model in session._models.values()
        for branch in model.branches()
        for tensor in branch._memory.values()
    }


@pytest.mark.parametrize("restart", [False, True], ids=["all steps taken", "restart in between"])
def test_second_edit_in_a_session(shared: Shared, restart: bool) -> None:
    """It starts with FULL, in the same buffers."""
    model, fast, _ = shared
    steps = "FPRR"
    plan = plan_of(steps)
    forms = model.forms(plan)
    taken = 2 if restart else 4
    first, second = ([model.call(seed + offset) for seed in range(4)] for offset in (0, 50))
    with hetcache.session(plan) as session:
        check(run(fast, first[:taken]), expected(forms, steps[:taken], first[:taken]))
        before, num_bytes = pointers(session), session.stats.cache_bytes
        assert len(before) == len(forms.cache_entries) + 4 == 9  # keys and values of the text, of two blocks
        if restart:
            session.restart()
        check(run(fast, second), expected(forms, steps, second))
        assert pointers(session) == before
        assert session.stats.cache_bytes == num_bytes
    assert session.stats.kinds.count(StepKind.FULL) == 2


@pytest.mark.parametrize("num_context", [N - 35, 40])
def test_cache_bytes(shared: Shared, num_context: int) -> None:
    model, fast, _ = shared
    plan = plan_of("FPR", 35, num_context)
    one_branch = model.forms(plan).buffer_bytes
    # keys and values of two blocks [1, 2 heads, rows, 12], of tokens and text; output [1, N, 5 channels, patches of 4]
    rows = N if num_context == N - 35 else num_context
    assert one_branch == 4 * (2 * 2 * 2 * (rows + TEXT_TOKENS) * 12 + N * 20)
    with hetcache.session(plan) as session:
        for number, name in enumerate(("cond", "uncond", "other"), start=1):
            with session.branch(name):
                for seed in range(3):
                    fast(**model.call(seed))
            assert session.stats.cache_bytes == number * one_branch
    assert session.stats.cache_bytes == 3 * one_branch


# Guidance and experts


def test_guidance_by_cache_context(shared: Shared) -> None:
    """diffusers' pipelines name their calls; each name has a cache and a step count of its own."""
    model, fast, _ = shared
    steps = "FPRP"
    plan = plan_of(steps)
    calls = {name: [model.call(s + 50 * n) for s in range(4)] for n, name in enumerate(("cond", "uncond"))}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in calls}
    with hetcache.session(plan) as session:
        for step in range(4):
            for name, branch in calls.items():
                # one step of guidance has the same latents
                branch[step]["hidden_states"] = calls["cond"][step]["hidden_states"]
                with fast.cache_context(name):
                    outputs[name].append(fast(**branch[step])[0])
    forms = model.forms(plan)
    for name, branch in calls.items():
        check(outputs[name], expected(forms, steps, branch))
    assert max_error(outputs["cond"][3], outputs["uncond"][3]) > 100 * TOLERANCE
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 4, "REUSE": 2}


def test_guidance_by_hand(shared: Shared) -> None:
    model, fast, _ = shared
    steps = "FPRP"
    plan = plan_of(steps)
    calls = {name: [model.call(s + 50 * n) for s in range(4)] for n, name in enumerate("ab")}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in calls}
    with hetcache.session(plan) as session:
        for step in range(4):
            for name, branch in calls.items():
                with session.branch(name):
                    outputs[name].append(fast(**branch[step])[0])
    forms = model.forms(plan)
    for name, branch in calls.items():
        check(outputs[name], expected(forms, steps, branch))


@pytest.mark.parametrize("convert", [lambda latents: latents, torch.clone], ids=["one tensor", "a copy for each"])
def test_unnamed_guidance(shared: Shared, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A call's place among the calls at its time is its branch. The loop may convert its inputs for each call."""
    model, fast, _ = shared
    steps = "FPRP"
    plan = plan_of(steps)
    calls = [[model.call(step + 50 * n) for step in range(4)] for n in range(3)]
    outputs: list[list[torch.Tensor]] = [[], [], []]
    with hetcache.session(plan, strict=True) as session:
        for step in range(4):
            for n, branch in enumerate(calls):
                branch[step]["hidden_states"] = convert(calls[0][step]["hidden_states"])
                branch[step]["encoder_hidden_states"] = convert(branch[step]["encoder_hidden_states"])
                outputs[n] += run(fast, [branch[step]])
    forms = model.forms(plan)
    for branch_outputs, branch in zip(outputs, calls, strict=True):
        check(branch_outputs, expected(forms, steps, branch))
    assert session.stats.steps == {"FULL": 3, "PARTIAL": 6, "REUSE": 3}


@pytest.mark.parametrize("first_goes", [False, True], ids=["the second call goes", "the first call goes"])
def test_guidance_that_is_switched_off_midway(shared: Shared, first_goes: bool) -> None:
    """The call that is left keeps its own cache, wherever it stood."""
    model, fast, _ = shared
    steps = "FPRPR"
    plan = plan_of(steps)
    calls = [[model.call(step + 50 * n) for step in range(5)] for n in range(2)]
    kept: list[torch.Tensor] = []
    with hetcache.session(plan) as session:
        for step in range(5):
            for n, branch in enumerate(calls):
                if step < 2 or n == int(first_goes):
                    output = run(fast, [branch[step]])
                    kept += output if n == int(first_goes) else []
    check(kept, expected(model.forms(plan), steps, calls[int(first_goes)]))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 3, "REUSE": 2}


def test_guidance_that_is_switched_on_midway(shared: Shared) -> None:
    """The new call comes first, and must not have the cache of the call that came first so far."""
    model, fast, _ = shared
    steps = "FRRRR"
    plan = plan_of(steps)
    calls = [[model.call(step + 50 * n) for step in range(5)] for n in range(2)]
    with hetcache.session(plan):
        run(fast, calls[0][:2])
        for step in range(2, 5):
            outputs = [run(fast, [branch[step]])[0] for branch in reversed(calls)]
            truths = [
                expected(model.forms(plan), "FRR"[: step - 1], branch[2 : step + 1])[-1] for branch in reversed(calls)
            ]
            check(outputs, truths)


def test_latents_updated_in_place_are_other_latents(shared: Shared) -> None:
    """A sampler may write each step into the same tensor, and an embedding may be made anew each step."""
    model, fast, _ = shared
    first, second = model.call(0), model.call(1)
    second["hidden_states"] = first["hidden_states"]
    with hetcache.session(plan_of("FR")) as session:
        fast(**first)
        first["hidden_states"].mul_(0.9)
        fast(**second)
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 0, "REUSE": 1}


# Errors


def test_nan_latents(shared: Shared) -> None:
    """Caught before a FULL step makes a cache from them; the next session is as good as new."""
    model, fast, _ = shared
    steps = "FRFR"
    plan = plan_of(steps)
    calls = [model.call(seed) for seed in range(4)]
    bad = model.call(2)
    bad["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(hetcache.NonFiniteError, match="latents of step 2"), hetcache.session(plan):
        run(fast, [*calls[:2], bad])
    assert hetcache_is_closed()
    with hetcache.session(plan):
        check(run(fast, calls), expected(model.forms(plan), steps, calls))
    with hetcache.session(plan, check_finite=False):
        assert fast(**bad)[0].isnan().any()


def test_an_error_in_the_caller(shared: Shared) -> None:
    model, fast, _ = shared
    steps = "FPR"
    plan = plan_of(steps)
    calls = [model.call(seed) for seed in range(3)]

    def edit() -> None:
        with hetcache.session(plan):
            run(fast, calls[:2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit()
    assert hetcache_is_closed()
    with hetcache.session(plan):
        check(run(fast, calls), expected(model.forms(plan), steps, calls))


def test_an_error_in_the_model(shared: Shared) -> None:
    """A FULL step that fails leaves no cache, so the same session can try again, or go on with the next session."""
    model, fast, inner = shared
    steps = "FPFP"
    plan = plan_of(steps)
    forms = model.forms(plan)
    calls = [model.call(seed) for seed in range(4)]

    def fail() -> None:
        raise MemoryError("no room")

    with hetcache.session(plan) as session:
        outputs = run(fast, calls[:2])
        inner.before_run = fail
        with pytest.raises(MemoryError):
            fast(**calls[2])
        inner.before_run = lambda: None
        outputs += run(fast, calls[2:])
    check(outputs, expected(forms, steps, calls))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 2, "REUSE": 0}
    with hetcache.session(plan):
        check(run(fast, calls), expected(forms, steps, calls))


def test_another_grid(shared: Shared) -> None:
    model, fast, _ = shared
    mask = np.zeros((3, 7, 5), dtype=bool)  # as many tokens, laid out in another way
    mask[0, 0, 0] = True
    message = r"\(3, 7, 5\).*\(3, 5, 7\)"
    plan = Plan.from_mask(mask, (3, 7, 5), schedule="F")
    with hetcache.session(plan), pytest.raises(hetcache.GridMismatchError, match=message):
        fast(**model.call(0))
    check(run(fast, [model.call(0)]), [model.plain(model.call(0))])


def test_unknown_option() -> None:
    graph = torch.fx.symbolic_trace(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"unknown options \['iner'\].*inner, inner_options"):
        hetcache.hetcache_backend(graph, [torch.randn(1, 2)], options={"iner": "eager"})


class LinearDiT(TinyDiT):
    """Attention as a sum over keys and values."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = self.out(x + query.relu() @ (key.relu().transpose(1, 2) @ value) / 50)
        (b, _, *size), (pt, ph, pw) = latents.shape, self.patch
        x = x.reshape(b, size[0] // pt, size[1] // ph, size[2] // pw, pt, ph, pw, 5)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, 5, *size)


def test_full_forms_that_sum_the_context_are_of_one_budget() -> None:
    """They take its indices, and inner compilers rely on the sizes that they were shown."""

    def inner(graph: Any, given: Any) -> Any:
        def call(*inputs: Any) -> Any:
            assert [one.shape for one in inputs] == [one.shape for one in given]
            return graph(*inputs)

        return call

    model, inputs = LinearDiT(), {"latents": tiny_call(0)["latents"]}
    fast = torch.compile(model, backend="hetcache", options={"inner": inner})
    for num_active in (35, 20):
        with torch.no_grad(), hetcache.session(plan_of("FP", num_active), strict=True):
            for _ in range(2):
                torch.testing.assert_close(fast(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)
