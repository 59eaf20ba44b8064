"""What surrounds the calls of a session: threads and contexts, weights that change, what fails, what is said of it."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import (
    CountingInner,
    check,
    compiled,
    expected,
    frozen_calls,
    ignoring_time,
    max_error,
    plan_of,
    run,
    tiny_calls,
)
from models import TinyDiT, call, wan
from torch import nn
from torch.fx import GraphModule

import hetcache_compile as hetcache
from hetcache_compile import StepKind
from hetcache_compile.compilation.options import BackendOptions
from hetcache_compile.errors import HetCacheWarning

pytestmark = pytest.mark.usefixtures("fresh")
FULL, PARTIAL, REUSE = StepKind


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def messages(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if issubclass(one.category, HetCacheWarning)]


# Threads and contexts


def test_two_cold_threads() -> None:
    """A model and a session each, nothing compiled before; and afterwards both at once on one model each."""
    plan, calls = plan_of("FRPF"), tiny_calls("FRPF")
    models = [TinyDiT(seed=seed) for seed in range(2)]
    outputs: dict[int, list[torch.Tensor]] = {}
    kinds: dict[int, str] = {}
    failed: list[BaseException] = []

    def edit(number: int) -> None:
        try:
            with torch.no_grad(), hetcache.session(plan, strict=True) as session:
                outputs[number] = run(compiled(models[number]), calls)
            kinds[number] = "".join(kind.letter for kind in session.stats.kinds)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=edit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number, model in enumerate(models):
        # Both may compile at once; then the first call of one ran in a graph that Dynamo does not choose again.
        assert kinds[number] in ("FRPF", "FFPF")
        check(outputs[number], expected(hetcache.rewrite(model, plan, (), calls[0]), kinds[number], calls))


def test_a_generator_whose_every_next_runs_in_a_context_of_its_own() -> None:
    """It is plain there, which is said once; joined, it follows the plan. It can be left in any context."""
    model, plan, calls = TinyDiT(), plan_of("FRPF"), tiny_calls("FRPF")
    fast, stats = compiled(model), []

    def stream(joins: bool) -> Iterator[torch.Tensor]:
        with hetcache.session(plan) as session:
            stats.append(session.stats)
            for kwargs in calls:
                if joins:
                    with session.joined():
                        yield fast(**kwargs)
                else:
                    yield fast(**kwargs)

    def drawn(joins: bool) -> list[torch.Tensor]:
        frames = stream(joins)
        return [contextvars.copy_context().run(next, frames) for _ in calls] + contextvars.Context().run(list, frames)

    check(drawn(True), expected(hetcache.rewrite(model, plan, (), calls[0]), "FRPF", calls))
    assert stats[0].kinds == [FULL, REUSE, PARTIAL, FULL]
    with pytest.warns(HetCacheWarning, match=r"session\.joined"):
        plain = drawn(False)
    check(plain[1:], run(model, calls)[1:])


def test_a_session_used_in_a_thread_that_joins_it() -> None:
    model, plan, calls = TinyDiT(), plan_of("FRP"), tiny_calls("FRP")
    fast, outputs = compiled(model), []

    def work(session: hetcache.Session) -> None:
        with torch.no_grad(), session.joined():
            outputs.extend(run(fast, calls))

    with hetcache.session(plan, strict=True) as session:
        thread = threading.Thread(target=work, args=(session,))
        thread.start()
        thread.join()
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FRP", calls))


def test_an_abandoned_session_is_no_obstacle() -> None:
    hetcache.session(plan_of("FR")).__enter__()
    with hetcache.session(plan_of("FF")):
        pass


# What was not followed


def test_a_forgotten_compilation() -> None:
    with pytest.warns(HetCacheWarning, match="no model was called that was compiled"), hetcache.session(plan_of("FR")):
        TinyDiT()(**tiny_calls("F")[0])
    with pytest.raises(hetcache.SessionError, match="was not followed"), hetcache.session(plan_of("FR"), strict=True):
        TinyDiT()(**tiny_calls("F")[0])


def fails_on(kind: str) -> Callable[..., Any]:
    """An inner compiler that fails on forms of one kind."""

    def inner(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        stores = sum("copy_" in str(node.target) for node in graph.graph.nodes)
        attends = any("attention" in str(node.target) for node in graph.graph.nodes)
        is_form = any(node.name.startswith("past_") for node in graph.graph.nodes)
        found = "plain" if not is_form else "reuse" if not attends else "full" if stores == 3 else "partial"
        if found == kind or (kind == "partial" and "active_index" in {node.name for node in graph.graph.nodes}):
            raise RuntimeError(f"no {kind}")
        return graph

    return inner


@pytest.mark.parametrize("kind", ["full", "partial", "reuse"])
def test_a_form_that_cannot_be_made(kind: str) -> None:
    """One warning with the reason, and the plain model's result, from then on; strict, an error."""
    model, calls = TinyDiT(), tiny_calls("FPRPR")
    fast = compiled(model, fails_on(kind))
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FPRPR")) as session:
        warnings.simplefilter("always")
        outputs = run(fast, calls)
    said = [text for text in messages(caught) if f"making it failed: RuntimeError: no {kind}" in text]
    assert len(said) == 1
    first = {"full": 0, "partial": 1, "reuse": 2}[kind]
    check(outputs[first:], run(model, calls)[first:])
    assert len(session.stats.kinds) == first
    torch._dynamo.reset()
    fast = compiled(model, fails_on(kind))
    with pytest.raises(hetcache.SessionError, match=f"no {kind}"), hetcache.session(plan_of("FPRPR"), strict=True):
        run(fast, calls)


def test_no_memory_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = TinyDiT(), tiny_calls("FPR")
    fast = compiled(model)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hetcache_compile.runtime.dispatch.buffers_for", full)
    with pytest.warns(HetCacheWarning, match="not enough memory for the"), hetcache.session(plan_of("FPR")):
        check(run(fast, calls), run(model, calls))


def cast_by_layer(model: Any) -> None:
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)


def cast_and_offloaded(model: Any) -> None:
    """Offloading alone would be cached."""
    cast_by_layer(model)
    model.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)


@pytest.mark.wide
@pytest.mark.parametrize("hook", [cast_by_layer, cast_and_offloaded])
def test_hooks_on_parts_of_a_model_are_one_warning(
    hook: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cut the model into dozens of graphs."""
    model = wan(num_layers=1)
    with monkeypatch.context() as patch:  # diffusers 0.40 takes for granted that there is an accelerator
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        hook(model)
    fast, calls = compiled(model), [call(model, seed=seed) for seed in range(2)]
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FP")):
        warnings.simplefilter("always")
        check(run(fast, calls), run(model, calls))
    reason, closing = messages(caught)
    assert "pipe.enable_model_cpu_offload()" in reason
    assert "calls ran plainly" in closing


class Breaks(TinyDiT):
    """Cut in two by what neither Dynamo nor `torch.export` can follow."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        output = super().forward(latents, text)
        return output + (1 if output.numpy().size else 0) * len(output.numpy().tolist())


def test_graph_breaks_are_one_warning() -> None:
    model, calls = Breaks(), tiny_calls("FPRPR")
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FPRPR")) as session:
        warnings.simplefilter("always")
        check(run(fast, calls), run(model, calls))
    said = [text for text in messages(caught) if "Dynamo hands this model over in parts" in text]
    assert len(said) == 1
    assert "test_session.py" in said[0]
    assert session.stats.kinds == []


def test_an_encoder_that_is_compiled_too() -> None:
    """It takes no step, whatever it looks like; the model beside it is cached."""
    model, calls = TinyDiT(), tiny_calls("FPR")
    encoder = nn.Sequential(nn.Conv3d(5, 8, (1, 3, 3), (1, 3, 3)), nn.Flatten(2))
    fast, fast_encoder = compiled(model), compiled(encoder)
    plan = plan_of("FPR")
    with warnings.catch_warnings(record=True), hetcache.session(plan) as session:
        warnings.simplefilter("always")
        outputs = []
        for kwargs in calls:
            assert torch.equal(fast_encoder(kwargs["latents"]), encoder(kwargs["latents"]))
            outputs += run(fast, [kwargs])
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPR", calls))
    assert session.stats.kinds == [FULL, PARTIAL, REUSE]


# Weights


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: model.proj_out.weight.mul_(1.5),
    "loaded": lambda model: model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}, assign=True),
    "data": lambda model: setattr(model.proj_out.weight, "data", 1.2 * model.proj_out.weight),
    "replaced": lambda model: setattr(model, "proj_out", copy.deepcopy(model.proj_out).requires_grad_(False)),
}


@pytest.mark.parametrize("steps", [pytest.param("FRRF", marks=pytest.mark.wide), "FPPF"])
def test_weights_that_change_in_an_edit(steps: str) -> None:
    """The call after it is FULL, on the new weights."""
    model = wan(num_layers=1)
    fast = compiled(model)
    calls = [call(model, seed=seed) for seed in range(4)]
    for name, change in CHANGES.items():
        with hetcache.session(plan_of(steps)) as session:
            run(fast, calls[:2])
            change(model)
            check(run(fast, calls[2:3]), run(model, calls[2:3]))
        assert "".join(kind.letter for kind in session.stats.kinds) == steps[:2] + "F", name


def test_forms_run_on_the_weights_that_a_model_has_now() -> None:
    model = wan()
    calls = [call(model, seed=seed) for seed in range(2)]
    forms = hetcache.rewrite(model, plan_of("FPR"), (), calls[0])
    for change in CHANGES.values():
        change(model)
        check([forms.full(**calls[1])[0][0]], run(model, calls[1:]))
    model.to(torch.float64)
    with pytest.raises(hetcache.SessionError, match="rewrite the model anew"):
        forms.full(**calls[1])


def test_a_copy_and_a_pickle_of_a_compiled_model() -> None:
    model, plan, calls = TinyDiT(), plan_of("FPR"), tiny_calls("FPR")
    fast = compiled(model)
    with hetcache.session(plan):
        truth = run(fast, calls)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with hetcache.session(plan, strict=True) as session:
            check(run(other, calls), truth)
        assert session.stats.kinds == [FULL, PARTIAL, REUSE]


# Modes, memory, errors


@pytest.mark.wide
def test_modes_of_autograd_mixed_in_a_session() -> None:
    """Dynamo makes a graph for each, which finds no cache of its own and is FULL: right, whatever the mix."""
    model = ignoring_time(wan())
    fast = compiled(model, "aot_eager")
    calls = frozen_calls(call(model), 6)
    inference, plain = torch.inference_mode, torch.no_grad
    with hetcache.session(plan_of("FPRPRR"), strict=True):
        for mode, kwargs in zip((inference, plain, plain, inference, inference, plain), calls, strict=True):
            with mode():
                output = fast(**kwargs)[0].clone()
            assert max_error(output, model(**kwargs)[0]) < 1e-5


@pytest.mark.wide
def test_autocast() -> None:
    model = wan()
    fast = compiled(model, "aot_eager")
    calls = [call(model, seed=seed) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16), hetcache.session(plan_of("FPF"), strict=True) as session:
        outputs = run(fast, calls)
        truths = run(model, calls)
    assert outputs[2].dtype == truths[2].dtype
    assert max_error(outputs[2].float(), truths[2].float()) < 0.1
    assert session.stats.kinds == [FULL, PARTIAL, FULL]


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_stop_at_any_step(named: bool) -> None:
    """The next edit in the same session, of the same prompt, has nothing of it. Stopped after its first step, it looks
    like guidance until the next time: one step more is FULL."""
    model, steps = wan(num_layers=1), "FRPRF"
    plan, inner = plan_of(steps), CountingInner()
    fast = compiled(model, inner)
    first, second = ([call(model, seed=50 * n + seed) for seed in range(5)] for n in range(2))
    for kwargs in second:
        kwargs["encoder_hidden_states"] = first[0]["encoder_hidden_states"]
    forms = hetcache.rewrite(model, plan, (), first[0])

    def interrupt() -> None:
        raise KeyboardInterrupt

    for stop in range(5):
        with hetcache.session(plan) as session, session.branch("cond") if named else contextlib.nullcontext():
            run(fast, first[:stop])
            inner.before_run = interrupt
            with pytest.raises(KeyboardInterrupt):
                run(fast, first[stop : stop + 1])
            inner.before_run = lambda: None
            before = len(session.stats.kinds)
            outputs = run(fast, second)
        kinds = "".join(kind.letter for kind in session.stats.kinds[before:])
        assert kinds == ("FFPRF" if stop == 1 else steps), stop
        check(outputs, expected(forms, kinds, second))


def test_release() -> None:
    model, calls = TinyDiT(), tiny_calls("FPRPR")
    fast, plan = compiled(model), plan_of("FPRPR")
    with hetcache.session(plan) as session:
        run(fast, calls[:2])
        assert session.stats.cache_bytes > 0
        session.release()
        assert session.stats.cache_bytes == 0
        check(run(fast, calls[2:3]), run(model, calls[2:3]))
    assert session.stats.kinds == [FULL, PARTIAL, FULL]


# Options of torch.compile


def test_options_of_compilers() -> None:
    with pytest.raises(ValueError, match="mode='reduce-overhead' is Inductor's: the inner compiler 'eager' takes none"):
        BackendOptions.of({"inner": "eager"}, "reduce-overhead").compiler()
    with pytest.raises(ValueError, match="there is no mode 'fast': Inductor has default, "):
        BackendOptions.of(None, "fast").compiler()


def test_dynamic_shapes_and_fullgraph() -> None:
    model, plan = TinyDiT(), plan_of("FPR")
    fast = torch.compile(model, backend="hetcache", dynamic=True, fullgraph=True, options={"inner": "eager"})
    for length in (11, 13):
        calls = tiny_calls("FPR", text_tokens=length)
        with hetcache.session(plan, strict=True):
            outputs = run(fast, calls)
        check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPR", calls))


def test_masks_share_forms_of_any_kind_but_partial() -> None:
    """M is not known to full and reuse forms, and comes from a short ladder."""
    inner = CountingInner()
    fast, calls = compiled(TinyDiT(), inner), tiny_calls("FPR")
    for number, num_active in enumerate((20, 35, 36, 70)):
        with hetcache.session(plan_of("FPR", num_active), strict=True):
            run(fast, calls)
        assert inner.graphs == 3 + number
    grid = (9, 30, 52)
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(40):
        mask = np.zeros(grid, dtype=bool)
        top, left = rng.integers(0, 20), rng.integers(0, 40)
        mask[:, top : top + rng.integers(1, 28), left : left + rng.integers(1, 50)] = True
        sizes.add(hetcache.Plan.from_mask(mask, grid).num_active)
    assert len(sizes) <= 16


@pytest.mark.wide
def test_positional_arguments_have_no_names() -> None:
    """Dynamo calls them args_0, args_1: the time is found by what becomes of it, for reuse forms that need it too."""
    model = wan()
    fast = compiled(model)
    plan = hetcache.Plan.from_token_mask(
        np.arange(105) % 3 == 0, (3, 5, 7), num_inference_steps=5, schedule=list("FPRPF"), extrapolation=1
    )
    calls = [call(model, seed=seed) for seed in range(5)]
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    outputs = []
    with hetcache.session(plan, strict=True) as session:
        for kwargs in calls:
            outputs.append(fast(*(kwargs[name] for name in names), return_dict=False)[0])
    assert session.stats.kinds == [FULL, PARTIAL, REUSE, PARTIAL, FULL]
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPRPF", calls))


def test_a_model_that_dynamo_will_compile_no_more() -> None:
    """Said when it is compiled for the last time: from then on it would run eagerly, and nobody would know."""
    fast = compiled(TinyDiT(patch=(1, 1, 1)))
    with torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False):
        fast(**tiny_calls("F", patch=(1, 1, 1), text_tokens=5)[0])
        with pytest.warns(HetCacheWarning, match="compiled this model 2 times, which is its limit"):
            fast(**tiny_calls("F", patch=(1, 1, 1), text_tokens=6)[0])
