"""The backend and the session: which form runs when, on whose cache, and what happens when things go wrong.

The oracle is `Forms`: the functional forms with an explicit cache, of which `test_frozen_input` shows that they are
right. Most tests compile forms with `inner="eager"`: the dispatch is the same and a second saved is a second saved.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Captured
from models import GRID, NUM_TOKENS, Case, TinyDiT, tiny_call
from torch import nn
from torch.fx import GraphModule

import hetcache_compile as hetcache
from hetcache_compile import Forms, Plan, StepKind
from hetcache_compile.passes.layout import all_rows

N = NUM_TOKENS
TOLERANCE = 1e-5  # absolute, fp32, outputs are of the order of 1
WAN, VACE = Case("wan"), Case("vace", batch=2, config=(("vace_layers", (0,)),))
Kwargs = dict[str, Any]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A model that is recompiled too often must not fall back to eager: a test would then show nothing."""
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


class CountingInner:
    """An inner compiler that runs graphs as they are and counts them; `before_run` is called before each run."""

    def __init__(self) -> None:
        self.graphs = 0
        self.before_run: Callable[[], None] = lambda: None

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.before_run()
            return graph(*args)

        return run


def compiled(model: nn.Module, inner: Any = "eager") -> Any:
    return torch.compile(model, backend="hetcache", options={"inner": inner})


def plan_of(steps: str, num_active: int = 35, num_context: int | None = None, seed: int = 0) -> Plan:
    """A plan with M random active tokens, C random others (default all) and these steps."""
    order = np.random.default_rng(seed).permutation(N)
    active, rest = np.sort(order[:num_active]), order[num_active:]
    context = np.sort(rest[: len(rest) if num_context is None else num_context])
    kinds = tuple(next(kind for kind in StepKind if kind.letter == letter) for letter in steps)
    return Plan(GRID, active, context, np.zeros(N, dtype=np.uint8), kinds)


def expected(forms: Forms, steps: str, calls: Sequence[Kwargs]) -> list[torch.Tensor]:
    """What functional forms give for a chain of steps."""
    cache: dict[str, torch.Tensor] = {}
    outputs = []
    for letter, kwargs in zip(steps, calls, strict=True):
        kind = next(kind.form for kind in StepKind if kind.letter == letter)
        output, cache = forms.run(kind, cache, (), kwargs)
        outputs.append(tensor_of(output))
    return outputs


def tensor_of(output: Any) -> torch.Tensor:
    """A model's output, or what is in its tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    return float((a - b).abs().max())


def check(outputs: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> None:
    """Each output equals its truth."""
    errors = [max_error(output, truth) for output, truth in zip(outputs, truths, strict=True)]
    assert max(errors) <= TOLERANCE, errors


def run(model: Any, calls: Sequence[Kwargs]) -> list[torch.Tensor]:
    return [tensor_of(model(**kwargs)) for kwargs in calls]


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


def hetcache_is_closed() -> bool:
    from hetcache_compile.session import current_session

    return current_session() is None


def test_sessions_do_not_nest(shared: Shared) -> None:
    with hetcache.session(plan_of("FR")), pytest.raises(hetcache.SessionError, match="open already"):
        hetcache.session(plan_of("FR")).__enter__()
    assert hetcache_is_closed()


def pointers(session: hetcache.Session) -> set[int]:
    return {
        tensor.data_ptr()
        for branch in session._branches.values()
        for buffers in branch.buffers.values()
        for tensor in buffers.values()
    }


@pytest.mark.parametrize("restart", [False, True], ids=["all steps taken", "restart in between"])
def test_second_edit_in_a_session(shared: Shared, restart: bool) -> None:
    """It starts with FULL, in the same buffers."""
    model, fast, _ = shared
    steps = "FPRR"
    plan = plan_of(steps)
    forms = model.forms(plan)
    taken = 2 if restart else 4
    first, second = ([model.call(seed + offset) for seed in range(4)] for offset in (0, 10))
    with hetcache.session(plan) as session:
        check(run(fast, first[:taken]), expected(forms, steps[:taken], first[:taken]))
        before, num_bytes = pointers(session), session.stats.cache_bytes
        assert len(before) == len(forms.cache_entries) == 5
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
    entries = model.forms(plan).cache_entries
    one_branch = sum(all_rows(entry, N).num_bytes for entry in entries)
    # keys and values of two blocks [1, 2 heads, rows, 12], and the output [1, N, 5 channels in patches of 4]
    rows = N if num_context == N - 35 else num_context
    assert one_branch == 4 * (2 * 2 * 2 * rows * 12 + N * 20)
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
def test_unnamed_guidance_is_an_error(shared: Shared, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also where the loop converts its latents for each call. The same call again is no guidance."""
    model, fast, _ = shared
    cond, uncond = model.call(0), model.call(1)
    latents = cond["hidden_states"]
    with hetcache.session(plan_of("FRRR")) as session:
        for _ in range(2):
            fast(**{**cond, "hidden_states": convert(latents)})
        with pytest.raises(hetcache.SessionError, match=r"session\.branch\('cond'\)"):
            fast(**{**uncond, "hidden_states": convert(latents)})
        assert session.stats.steps == {"FULL": 1, "PARTIAL": 0, "REUSE": 1}


def test_latents_updated_in_place_are_other_latents(shared: Shared) -> None:
    """A sampler may write each step into the same tensor, and an embedding may be made anew each step."""
    model, fast, _ = shared
    first = model.call(0)
    second = {**first, "encoder_hidden_states": first["encoder_hidden_states"].clone()}
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
    with hetcache.session(Plan.from_mask(mask, (3, 7, 5))), pytest.raises(hetcache.GridMismatchError, match=message):
        fast(**model.call(0))
    check(run(fast, [model.call(0)]), [model.plain(model.call(0))])


def test_unknown_option() -> None:
    graph = torch.fx.symbolic_trace(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"unknown options \['iner'\].*inner, inner_options"):
        hetcache.hetcache_backend(graph, [torch.randn(1, 2)], options={"iner": "eager"})


# Models of their own: each test compiles anew


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget all that Dynamo has compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_calls(steps: str, first: int = 0, **kwargs: Any) -> list[Kwargs]:
    return [tiny_call(first + seed, **kwargs) for seed in range(len(steps))]


def test_reused_output_is_the_callers(fresh: None) -> None:
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


def test_inference_mode(fresh: None) -> None:
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


def test_guidance_in_one_batch(fresh: None) -> None:
    model = TinyDiT()
    steps = "FPRP"
    plan, calls = plan_of(steps), tiny_calls(steps, batch=2)
    with hetcache.session(plan) as session:
        outputs = run(compiled(model), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}


def test_two_experts(fresh: None) -> None:
    """Two models of one class and shape: Dynamo runs one graph for both, so the cache must tell them apart.

    The second joins at a step that the plan calls REUSE; with no cache of its own it runs FULL.
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
    assert session.stats.cache_bytes == 2 * sum(all_rows(entry, N).num_bytes for entry in forms_low.cache_entries)
    # Frozen inputs, both in turn in one session: each stays with its own weights and its own cache.
    with hetcache.session(plan_of("FFPPRRPPRR")) as session:
        for _ in range(5):
            for fast, model in ((fast_high, high), (fast_low, low)):
                check(run(fast, calls[:1]), run(model, calls[:1]))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 4, "REUSE": 4}


def test_two_experts_with_guidance(fresh: None) -> None:
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
        check(outputs[name][3:], expected(forms[1], "FFP", branch[3:]))  # the first call of an expert is FULL
    assert session.stats.steps == {"FULL": 6, "PARTIAL": 4, "REUSE": 2}


def test_a_failed_full_step_leaves_no_cache(fresh: None) -> None:
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


def test_weights_are_not_baked_in(fresh: None) -> None:
    """Weights that change after compilation (a LoRA is fused, say) are those of the next edit."""
    model, kwargs = TinyDiT(), tiny_call(0)
    fast, plan = compiled(model), plan_of("FPR")
    before = run(model, [kwargs])
    for _ in range(2):
        with hetcache.session(plan):
            check(run(fast, [kwargs] * 3), run(model, [kwargs] * 3))
        model.qkv.weight.mul_(2.0)
    assert max_error(run(model, [kwargs])[0], before[0]) > 1000 * TOLERANCE


def test_unsupported_graph(fresh: None) -> None:
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
    assert len(texts) == 1
    for part in ("2 reasons", "scaled_dot_product_attention", "causal mask"):
        assert part in texts[0]
    check(run(fast, calls), truths)


def test_text_of_another_length(fresh: None) -> None:
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


def test_text_of_another_length_in_one_edit(fresh: None) -> None:
    """A call of another shape finds no cache, so it is FULL."""
    model, short, long = TinyDiT(), tiny_call(1, text_tokens=11), tiny_call(2, text_tokens=13)
    calls = [short, short, long, long]
    with hetcache.session(plan_of("FRPR")) as session:
        check(run(compiled(model), calls), run(model, calls))
    assert session.stats.kinds == [StepKind.FULL, StepKind.REUSE] * 2


def test_gradients_outside_a_session(fresh: None) -> None:
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


def test_aot_eager(fresh: None) -> None:
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


def test_inductor(fresh: None) -> None:
    """The default; without text, because a C++ compiler takes seconds for each kernel."""
    model, steps = TinyDiT(), "FPRPFPR"
    plan, calls = plan_of(steps), tiny_calls(steps)
    for kwargs in calls:
        del kwargs["text"]
    with hetcache.session(plan) as session:
        outputs = run(torch.compile(model, backend="hetcache"), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls))
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 3, "REUSE": 2}


def test_vace(captured: Callable[[Case], Captured], fresh: None) -> None:
    """The model the project is for, with control latents and scales that change at each step."""
    model, steps = captured(VACE), "FPRPR"
    plan = plan_of(steps)
    calls = [model.call(seed) for seed in range(len(steps))]
    with hetcache.session(plan) as session:
        outputs = run(compiled(model.model), calls)
    check(outputs, expected(model.forms(plan), steps, calls))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 2}
