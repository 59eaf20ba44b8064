"""The backend on models of their own: experts, batches, other lengths, compilers. Each test compiles anew."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    max_error,
    plan_of,
    run,
    tiny_calls,
)
from conftest import Captured
from models import Case, TinyDiT, call, tiny_call, wan

import hetcache_compile as hetcache
from hetcache_compile import Plan, StepKind
from hetcache_compile.runtime import buffers
from hetcache_compile.runtime.unchanging import Unchanging
from hetcache_compile.sessions.session import Session

pytestmark = pytest.mark.usefixtures("strict", "fresh")
VACE = Case("vace", batch=2, config=(("vace_layers", (0,)),))


def test_reused_output_is_the_callers() -> None:
    """What a step returned must not change when a later step overwrites the cache: samplers keep outputs.

    With patches of one pixel, all that comes after the tokens is a view of them.
    """
    patch = (1, 1, 1)
    model = TinyDiT(patch=patch)
    steps = "FPRPRFRF"
    plan, calls = plan_of(steps), tiny_calls("FPRPRFRF", patch=patch)
    with hetcache.session(plan):
        outputs = run(compiled(model), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))


def test_inference_mode() -> None:
    """Its tensors have no version counter; a sampler may still write each step into the same latents."""
    model, steps = TinyDiT(), "FPRP"
    fast, plan, calls = compiled(model, "aot_eager"), plan_of(steps), tiny_calls(steps)
    for kwargs in calls:
        kwargs["text"] = calls[0]["text"]
    truths = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls)
    with torch.inference_mode(), hetcache.session(plan) as session:
        latents = torch.empty_like(calls[0]["latents"])
        assert latents.is_inference()
        outputs = [fast(latents.copy_(kwargs["latents"]), kwargs["text"].clone()) for kwargs in calls]
    check(outputs, truths)
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}


def test_guidance_in_one_batch() -> None:
    model = TinyDiT()
    steps = "FPRP"
    plan, calls = plan_of(steps), tiny_calls(steps, batch=2)
    with hetcache.session(plan) as session:
        outputs = run(compiled(model), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}


def test_two_experts() -> None:
    """Two models of one class and shape: Dynamo runs one graph for both, so the cache must tell them apart.

    They are given no time, so each counts its own steps.
    """
    high, low, inner = TinyDiT(), TinyDiT(seed=7), CountingInner()
    fast_high, fast_low = compiled(high, inner), compiled(low, inner)
    plan, calls = plan_of("FPRRPR"), tiny_calls("FPRRPR")
    assert max_error(run(fast_high, calls[:1])[0], run(fast_low, calls[:1])[0]) > 1000 * TOLERANCE
    assert inner.graphs == 1  # shared, or the rest of this test shows less than it should
    with hetcache.session(plan) as session:
        outputs = [*run(fast_high, calls[:3]), *run(fast_low, calls[3:])]
    forms_high, forms_low = (hetcache.rewrite(model, plan, (), calls[0]) for model in (high, low))
    check(outputs[:3], expected(forms_high, "FPR", calls[:3]))
    check(outputs[3:], expected(forms_low, "FPR", calls[3:]))
    assert session.stats.kinds == [StepKind.FULL, StepKind.PARTIAL, StepKind.REUSE] * 2
    # The first has made no call during a whole step of the second: its cache is given back.
    assert session.stats.cache_bytes == forms_low.buffer_bytes
    # Frozen inputs, both in turn in one session: each stays with its own weights and its own cache.
    with hetcache.session(plan_of("FFPPRRPPRR")) as session:
        for _ in range(5):
            for fast, model in ((fast_high, high), (fast_low, low)):
                check(run(fast, calls[:1]), run(model, calls[:1]))
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 4, "REUSE": 2}


def test_two_experts_with_guidance() -> None:
    """Four caches: two branches of two experts, as in Wan 2.2."""
    models = [TinyDiT(), TinyDiT(seed=7)]
    fast = [compiled(model) for model in models]
    steps, experts = "FPRPFP", (0, 0, 0, 1, 1, 1)
    plan = plan_of(steps)
    calls = {"cond": tiny_calls(steps), "uncond": tiny_calls(steps, first=50)}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in calls}
    with hetcache.session(plan) as session:
        for step, expert in enumerate(experts):
            for name, branch in calls.items():
                with session.branch(name):
                    outputs[name] += run(fast[expert], branch[step : step + 1])
    forms = [hetcache.rewrite(model, plan, (), calls["cond"][0]) for model in models]
    for name, branch in calls.items():
        check(outputs[name][:3], expected(forms[0], "FPR", branch[:3]))
        check(outputs[name][3:], expected(forms[1], "FPR", branch[3:]))
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 4, "REUSE": 4}


class Allocations:
    """What caches are allocated, with what is kept beside them, and how much of it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: dict[int, weakref.ref[torch.Tensor]] = {}
        self.most = 0
        for owner, name in ((buffers, "empty_buffers"), (Unchanging, "memory")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, allocate: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
        def counting(*args: Any) -> list[torch.Tensor]:
            buffers = allocate(*args)
            self.made |= {id(buffer): weakref.ref(buffer) for buffer in buffers}
            alive = [buffer for buffer in (reference() for reference in self.made.values()) if buffer is not None]
            self.most = max(self.most, sum(buffer.nbytes for buffer in alive))
            return buffers

        return counting


def timed(steps: str) -> Plan:
    """A plan whose times are those of `models.call`."""
    return replace(plan_of(steps), timesteps=990.5 - 19.25 * np.arange(len(steps)))


def guided_edit(fast: Sequence[Any], experts: Sequence[Sequence[int]], session: Session) -> list[int]:
    """Two branches in each step, of the models that it calls. Returns the bytes of caches after each call."""
    held = []
    for step, numbers in enumerate(experts):
        for number in numbers:
            for branch, name in enumerate(("cond", "uncond")):
                with session.branch(name):
                    fast[number](**{**call(fast[number], seed=step), **text_of(fast[number], branch)})
                held.append(session.stats.cache_bytes)
    return held


def text_of(model: Any, branch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": call(model, seed=50 * branch)["encoder_hidden_states"]}


def test_an_expert_that_is_done_gives_its_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are never there at once, in the second edit neither."""
    allocations = Allocations(monkeypatch)
    models = [wan(num_layers=1, seed=seed) for seed in (0, 7)]
    plan, fast = timed("FPRFPR"), [compiled(model) for model in models]
    forms = hetcache.rewrite(models[0], plan, (), call(models[0]))
    with hetcache.session(plan, strict=True) as session:
        for _ in range(3):
            held = guided_edit(fast, [(0,), (0,), (0,), (1,), (1,), (1,)], session)
            assert max(held) == 2 * forms.buffer_bytes
            assert allocations.most == 2 * forms.buffer_bytes
    assert session.stats.steps == {"FULL": 12, "PARTIAL": 12, "REUSE": 12}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_model_that_joins_another_one_midway(order: tuple[int, int]) -> None:
    """It may look like the next expert. That costs the first one a FULL step, once, and the result nothing."""
    models = [wan(num_layers=1, seed=seed) for seed in (0, 7)]
    with hetcache.session(timed("FPPPPPP"), strict=True) as session:
        guided_edit([compiled(model) for model in models], [(0,), (0,), *[order] * 5], session)
    taken_for_done = order == (1, 0)
    full = 2 + 2 + 2 * taken_for_done
    assert session.stats.steps == {"FULL": full, "PARTIAL": 2 * 12 - full, "REUSE": 0}


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8", "context_extrapolation": 1}], ids=str)
def test_a_second_edit_allocates_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    allocations = Allocations(monkeypatch)
    fast = [compiled(wan(num_layers=1))]
    with hetcache.session(replace(timed("FPRFPR"), **options), strict=True) as session:
        held = guided_edit(fast, [(0,)] * 6, session)
        made = len(allocations.made)
        for _ in range(2):
            assert set(guided_edit(fast, [(0,)] * 6, session)) == {held[-1]}
        assert len(allocations.made) == made > 0
    assert allocations.most == held[-1]


def test_a_failed_full_step_leaves_no_cache() -> None:
    """Its buffers may be half written. Another expert goes on; the first comes back to a step that may not reuse."""
    high, low, inner = TinyDiT(), TinyDiT(seed=7), CountingInner()
    fast_high, fast_low = compiled(high, inner), compiled(low, inner)
    calls = tiny_calls("FFRR")

    def fail() -> None:
        raise MemoryError("no room")

    with hetcache.session(plan_of("FFRR")) as session:
        check(run(fast_high, calls[:1]), run(high, calls[:1]))
        inner.before_run = fail
        with pytest.raises(MemoryError):
            run(fast_high, calls[1:2])
        inner.before_run = lambda: None
        check(run(fast_low, calls[1:2]), run(low, calls[1:2]))
        check(run(fast_high, calls[2:3]), run(high, calls[2:3]))
        check(run(fast_high, calls[3:4]), run(high, calls[2:3]))
    assert session.stats.kinds == [StepKind.FULL, StepKind.FULL, StepKind.FULL, StepKind.REUSE]


def test_weights_are_not_baked_in() -> None:
    """Weights that change after compilation (a LoRA is fused, say) are those of the next edit."""
    model, kwargs = TinyDiT(), tiny_call(0)
    fast, plan = compiled(model), plan_of("FPR")
    before = run(model, [kwargs])
    for _ in range(2):
        with hetcache.session(plan):
            check(run(fast, [kwargs] * 3), run(model, [kwargs] * 3))
        model.qkv.weight.mul_(2.0)
    assert max_error(run(model, [kwargs])[0], before[0]) > 1000 * TOLERANCE


def test_unsupported_graph() -> None:
    """Causal attention over tokens: one warning with the reasons; the model runs unchanged, in a session and out."""
    model, calls = TinyDiT(causal=True), tiny_calls("FPR")
    fast, truths = compiled(model), run(model, calls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with hetcache.session(plan_of("FPR")) as session:
                check(run(fast, calls), truths)
            assert session.stats.steps == {"FULL": 0, "PARTIAL": 0, "REUSE": 0}
    texts = [str(warning.message) for warning in caught if "hetcache" in str(warning.message)]
    assert ["all 3 calls ran plainly" in text for text in texts] == [False, True] * 2
    for part in ("2 reasons", "scaled_dot_product_attention", "causal mask"):
        assert part in texts[0]
    check(run(fast, calls), truths)


def test_text_of_another_length() -> None:
    """Dynamo makes the length symbolic on the second one; forms stay static, one set for each length."""
    model, plan = TinyDiT(), plan_of("FPR")
    fast = compiled(model)
    for length in (11, 13, 17):
        calls = tiny_calls("FPR", text_tokens=length)
        with hetcache.session(plan) as session:
            outputs = run(fast, calls)
        check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPR", calls))
        assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 1}
        check(run(fast, calls), run(model, calls))


def test_text_of_another_length_in_one_edit() -> None:
    """A call of another shape finds no cache, so it is FULL."""
    model, short, long = TinyDiT(), tiny_call(1, text_tokens=11), tiny_call(2, text_tokens=13)
    calls = [short, short, long, long]
    with hetcache.session(plan_of("FRPR")) as session:
        check(run(compiled(model), calls), run(model, calls))
    assert session.stats.kinds == [StepKind.FULL, StepKind.REUSE] * 2


def test_gradients_outside_a_session() -> None:
    model, kwargs = TinyDiT(), tiny_call(0)
    fast = compiled(model, "aot_eager")
    gradients = []
    with torch.enable_grad():
        with hetcache.session(plan_of("FPR")):
            assert not any(output.requires_grad for output in run(fast, [kwargs] * 3))
        for called in (model, fast):
            model.zero_grad()
            called(**kwargs).square().sum().backward()
            assert model.qkv.weight.grad is not None
            gradients.append(model.qkv.weight.grad / N)
    assert gradients[0].abs().max() > 0.1
    assert max_error(*gradients) <= TOLERANCE


def test_aot_eager() -> None:
    """First inside a session, then outside, there with two lengths of text."""
    model, steps = TinyDiT(), "FPRPFR"
    fast = compiled(model, "aot_eager")
    plan, calls = plan_of(steps), tiny_calls(steps)
    with hetcache.session(plan):
        outputs = run(fast, calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))
    for length in (11, 13):
        calls = tiny_calls("FF", text_tokens=length)
        check(run(fast, calls), run(model, calls))


def test_inductor() -> None:
    """The default; without text, because a C++ compiler takes seconds for each kernel."""
    model, steps = TinyDiT(), "FPRPFPR"
    plan, calls = plan_of(steps), tiny_calls(steps)
    for kwargs in calls:
        del kwargs["text"]
    with hetcache.session(plan) as session:
        outputs = run(torch.compile(model, backend="hetcache"), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 3, "REUSE": 2}


def test_vace(captured: Callable[[Case], Captured]) -> None:
    """The model the project is for, with control latents and scales that change at each step."""
    model, steps = captured(VACE), "FPRPR"
    plan = plan_of(steps)
    calls = [model.call(seed) for seed in range(len(steps))]
    with hetcache.session(plan) as session:
        outputs = run(compiled(model.model), calls)
    check(outputs, expected(model.forms(plan), steps, calls))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 2}
