"""Calls of one step of guidance that share keys and values: what each gives, what is kept, and where nothing is shared.

The oracle is `Forms`: at a FULL step every call but the first is a PARTIAL one on the first one's cache, with outputs
of active tokens of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import CountingInner, Kwargs, check, compiled, max_error, plan_of, run, tensor_of, tiny_calls
from models import GRID, NUM_TOKENS, TinyDiT, call, to_tokens, vace, wan
from test_motion import Moving
from test_session import HetCacheWarning, messages
from test_streaming import Device, device  # noqa: F401  a fixture
from torch._subclasses.fake_tensor import FakeTensorMode

import hetcache_compile as hetcache
from hetcache_compile import Plan, StepKind
from hetcache_compile.errors import PlanError
from hetcache_compile.plan.options import PlanOptions
from hetcache_compile.plan.partition import TokenKind
from hetcache_compile.record.caches import Restorer

STEPS = "FPRFPR"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def branches(model: torch.nn.Module, steps: str = STEPS, number: int = 2, **changes: Any) -> list[list[Kwargs]]:
    """The calls of each branch: the same but for the text, and given the same latents."""
    if isinstance(model, TinyDiT):
        first, texts = tiny_calls(steps), [tiny_calls("F", 50 * edit)[0]["text"] for edit in range(number)]
        return [[{**one, "text": text, **changes} for one in first] for text in texts]
    first = [call(model, seed=step) for step in range(len(steps))]
    name = "encoder_hidden_states"
    texts = [torch.randn(first[0][name].shape, generator=torch.Generator().manual_seed(n)) for n in range(number)]
    return [[{**one, name: text, **changes} for one in first] for text in texts]


def shared(steps: str = STEPS, **changes: Any) -> Plan:
    return replace(plan_of(steps), shared_context=1, **changes)


def by_hand(model: torch.nn.Module, plan: Plan, calls: Sequence[Sequence[Kwargs]]) -> list[list[torch.Tensor]]:
    """What every branch should give."""
    forms = hetcache.rewrite(model, plan, (), calls[0][0])
    outputs_of = [entry for entry in forms.cache_entries if entry.group == "output"]
    rows = {entry.input_name: 1 if entry.role == "times" else entry.dim for entry in outputs_of}
    active = torch.from_numpy(plan.active_index)
    caches: list[dict[str, torch.Tensor]] = [{} for _ in calls]
    outputs: list[list[torch.Tensor]] = [[] for _ in calls]
    for step, kind in enumerate(plan.steps):
        for branch, given in enumerate(calls):
            form, cache = kind.form, caches[branch]
            if branch and kind is StepKind.FULL:
                form, own, cache = "partial", cache, {name: one.clone() for name, one in caches[0].items()}
                for name, dim in rows.items() if own else ():
                    assert cache[name].shape[dim] == plan.num_tokens
                    cache[name].index_copy_(dim, active, own[name].index_select(dim, active))
            output, caches[branch] = forms.run(form, cache, (), given[step])
            outputs[branch].append(tensor_of(output))
    return outputs


def times(*calls: Kwargs) -> np.ndarray:
    """Of some calls of Wan."""
    return np.array([float(one["timestep"].max()) for one in calls])


def edit(
    model: Any, plan: Plan | Sequence[Plan], calls: Sequence[Sequence[Kwargs]], named: bool = True, **options: Any
) -> tuple[list[list[torch.Tensor]], hetcache.Session]:
    """The outputs of every branch in a session."""
    outputs: list[list[torch.Tensor]] = [[] for _ in calls]
    with hetcache.session(plan, **{"strict": True, **options}) as session:
        for step in range(len(calls[0])):
            for branch, given in enumerate(calls):
                if named:
                    with session.branch(str(branch)):
                        outputs[branch] += run(model, [given[step]])
                else:
                    outputs[branch] += run(model, [given[step]])
    return outputs, session


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("number", [2, 3])
def test_outputs_and_memory(number: int, named: bool) -> None:
    model, plan = TinyDiT(), shared()
    calls = branches(model, number=number)
    outputs, session = edit(compiled(model), plan, calls, named)
    for found, truth in zip(outputs, by_hand(model, plan, calls), strict=True):
        check(found, truth)
    assert session.stats.shared == 2 * (number - 1)
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 2 * number + 2 * (number - 1), "REUSE": 2 * number}
    _, apart = edit(compiled(model), replace(plan, shared_context=0), calls, named)
    assert apart.stats.shared == 0
    keys_and_values = 2 * NUM_TOKENS * 22 * 4  # buffers have rows for active tokens too
    assert apart.stats.cache_bytes - session.stats.cache_bytes == (number - 1) * keys_and_values


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"extrapolation": 1}, marks=pytest.mark.wide),
        pytest.param({"extrapolation": 1, "context_motion": 1}, marks=pytest.mark.wide),
        {"extrapolation": 2, "context_extrapolation": 1, "context_motion": 1},
        pytest.param({"extrapolation": 1, "cache_dtype": "int8"}, marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_predictions(options: dict[str, Any]) -> None:
    """Each branch has the points of its own active tokens, and the first one's of all others."""
    model, plan = wan(num_layers=1), shared(**options)
    calls = branches(model)
    outputs, session = edit(compiled(model), plan, calls)
    for found, truth in zip(outputs, by_hand(model, plan, calls), strict=True):
        check(found, truth)
    assert session.stats.shared == 2


@pytest.mark.parametrize(
    "kind",
    ["kmeans", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ("fewer", "boxes", "attention", "int8"))],
)
def test_smaller_caches(kind: str) -> None:
    """Which tokens are cached, and what stands for them, is the first call's business too."""
    model, plan = wan(num_layers=1), plan_of(STEPS, num_context=40 if kind in ("fewer", "attention") else None)
    changes: dict[str, Any] = {"int8": {"cache_dtype": "int8"}, "attention": {"cached_by": "attention"}}.get(kind, {})
    if kind in ("boxes", "kmeans"):
        clusters = np.arange(plan.num_context, dtype=np.int64) % 12
        changes = {"merging": kind, "context_cluster": clusters}
    plan = replace(plan, shared_context=1, extrapolation=1, **changes)
    calls = branches(model)
    outputs, session = edit(compiled(model), plan, calls)
    for found, truth in zip(outputs, by_hand(model, plan, calls), strict=True):
        check(found, truth)
    assert session.stats.shared == 2


@pytest.mark.wide
def test_in_the_memory_of_the_host(device: Device) -> None:  # noqa: F811
    """It is copied out once for both calls."""
    model = vace(num_layers=1, vace_layers=(0,))
    plan = shared("FPF", cache_device="cpu", context_motion=1)
    calls = branches(model, "FPF")
    outputs, session = edit(compiled(model), plan, calls)
    for found, truth in zip(outputs, by_hand(model, plan, calls), strict=True):
        check(found, truth)
    assert session.stats.shared == 2
    copied = device.bytes_out
    edit(compiled(model), replace(plan, shared_context=0), calls)
    assert device.bytes_out == 3 * copied


@pytest.mark.wide
def test_inductor() -> None:
    model, plan = wan(), shared(extrapolation=1, context_motion=1)
    calls = branches(model)
    outputs, _ = edit(compiled(model, "inductor"), plan, calls)
    for found, truth in zip(outputs, by_hand(model, plan, calls), strict=True):
        check(found, truth)


def test_exact_where_keys_and_values_do_not_know_the_text() -> None:
    model, active = Moving(layout="text, tokens"), np.arange(30) < 9
    plan = Plan.from_token_mask(active, (2, 3, 5), num_inference_steps=4, schedule=list("FPFP"), context_motion=1)
    plan = replace(plan, shared_context=1)
    random = torch.Generator().manual_seed(0)
    latents, texts = torch.randn(1, 3, 2, 3, 5, generator=random), torch.randn(2, 1, 4, 24, generator=random)
    calls = [
        [{"latents": latents, "text": text, "timestep": torch.tensor([t])} for t in (900.0, 700.0, 500.0, 200.0)]
        for text in texts
    ]
    outputs, session = edit(compiled(model), plan, calls)
    for found, given in zip(outputs, calls, strict=True):
        for output, one in zip(found, given, strict=True):
            assert max_error(output.flatten(2)[..., active], model(**one).flatten(2)[..., active]) < 1e-5
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 6, "REUSE": 0}


def test_a_batch_with_masks_of_its_own() -> None:
    """Two samples in each of two calls: each has the inactive rows of its own mask from the first call."""
    model = TinyDiT()
    plans = [replace(plan_of(STEPS, seed=seed), shared_context=1) for seed in (0, 1)]
    first = tiny_calls(STEPS, batch=2)
    texts = [tiny_calls("F", 50 * edit, batch=2)[0]["text"] for edit in (0, 1)]
    calls = [[{**one, "text": text} for one in first] for text in texts]
    outputs, session = edit(compiled(model), plans, calls)
    for sample, plan in enumerate(plans):
        alone = [[{name: one[name][sample : sample + 1] for name in one} for one in given] for given in calls]
        for found, truth in zip(outputs, by_hand(model, plan, alone), strict=True):
            check([one[sample : sample + 1] for one in found], truth)
    assert session.stats.shared == 2


def test_nothing_is_shared_by_calls_that_differ_in_latents() -> None:
    """As where guidance leaves out a picture, or two edits take turns. It is said once, and nothing is wrong."""
    model, plan = TinyDiT(), shared()
    first, second = branches(model)
    for one in second:
        one["latents"] = one["latents"] + 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs, session = edit(compiled(model), plan, [first, second])
    apart, _ = edit(compiled(model), replace(plan, shared_context=0), [first, second])
    for found, truth in zip(outputs, apart, strict=True):
        check(found, truth)
    assert session.stats.shared == 0
    (message,) = messages(caught)
    assert "no call shared another one's" in message


def test_calls_in_another_order_and_without_names() -> None:
    """The branch that comes first at a step is the one that computes; the other one reads its cache from then on."""
    model, plan = TinyDiT(), shared("FPFP")
    calls = branches(model, "FPFP")
    run_model, found = compiled(model), []
    with hetcache.session(plan, strict=True) as session:
        for step, order in enumerate(((0, 1), (0, 1), (1, 0), (1, 0))):
            found += [run(run_model, [calls[branch][step]])[0] for branch in order]
        held = session.stats.cache_bytes
    turned = by_hand(model, plan_of("FP"), [[given[step] for step in (2, 3)] for given in reversed(calls)])
    check(found[4::2], turned[0])
    active = plan.active_mask
    for output, truth in zip(found[5::2], turned[1], strict=True):
        check([to_tokens(output)[:, active]], [to_tokens(truth)[:, active]])
    assert session.stats.shared == 2
    _, in_order = edit(compiled(model), plan, calls, named=False)
    assert held == in_order.stats.cache_bytes


def test_nothing_is_shared_by_calls_with_other_settings() -> None:
    """As where control is for one branch only."""
    model, plan = vace(), shared("FP")
    first, second = ([dict(one) for one in given] for given in branches(model, "FP"))
    for one in second:
        one["control_hidden_states_scale"] = one["control_hidden_states_scale"] * 0
    with pytest.warns(HetCacheWarning, match="no call shared another one's"):
        _, session = edit(compiled(model), plan, [first, second])
    assert session.stats.steps["FULL"] == 2


@pytest.mark.filterwarnings("ignore:hetcache. the plan has shared_context")
def test_latents_that_were_written_since_are_others() -> None:
    model, plan = TinyDiT(), shared("FP")
    first, second = branches(model, "FP")
    latents = first[0]["latents"].clone()
    first[0]["latents"] = second[0]["latents"] = latents
    with hetcache.session(plan) as session:
        run(compiled(model), first[:1])
        latents.add_(1)
        with session.branch("other"):
            run(compiled(model), second[:1])
        assert session.stats.steps["FULL"] == 2
        latents.sub_(1)
        with session.branch("a third"):
            run(compiled(model), second[:1])
        assert session.stats.shared == 0


@pytest.mark.filterwarnings("ignore:hetcache. the plan has shared_context")
def test_latents_of_inference_mode_are_compared_by_value() -> None:
    """torch counts no changes of them."""
    plan, run_model = shared("F"), compiled(TinyDiT())
    (first,), (second,) = branches(TinyDiT(), "F")
    with torch.inference_mode(), hetcache.session(plan) as session:
        buffer, others = first["latents"].clone(), torch.randn_like(first["latents"])
        for name, values, text in (("a", first["latents"], first["text"]), ("b", others, second["text"])):
            buffer.copy_(values)
            with session.branch(name):
                run_model(latents=buffer, text=text)
        assert session.stats.steps["FULL"] == 2
        with session.branch("c"):
            run_model(latents=buffer, text=first["text"])
        assert session.stats.shared == 1


@pytest.mark.filterwarnings("ignore:hetcache. the plan has shared_context")
def test_two_calls_under_one_name_are_no_guidance() -> None:
    """The second begins an edit of the same noise, after one that was cancelled."""
    (first, _), (second, third) = branches(wan(), "FP")
    run_model = compiled(wan())
    with hetcache.session(shared("FP", timesteps=times(first, third))) as session, session.branch("a"):
        run(run_model, [first, second])
        assert session.stats.steps["FULL"] == 2


def test_a_branch_whose_lender_is_called_no_more() -> None:
    """It reads what the other one left for one more step, in which that may still come, and computes its own then."""
    model = wan()
    first, second = branches(model, "FPPP")
    run_model = compiled(model)
    with hetcache.session(shared("FPPP", timesteps=times(*first)), strict=True) as session:
        for name, given in (("a", first[:1]), ("b", second)):
            with session.branch(name):
                found = run(run_model, given)
        assert [kind.letter for kind in session.stats.kinds] == ["F", "P", "P", "F", "P"]
        assert max_error(found[2], tensor_of(model(**second[2]))) < 1e-5


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_devices_of_what_is_read_and_written(where: str) -> None:
    """Fake tensors check devices as operators on a GPU do. A record is on the host, another branch is not."""
    plan = plan_of("FP")
    every = hetcache.rewrite(TinyDiT(), plan, (), tiny_calls("F")[0]).cache_entries
    entries = [entry for entry in every if entry.rows == "tokens"]
    assert entries
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = [torch.empty(entry.shape, dtype=entry.dtype, device="cuda") for entry in entries]
        others = {entry.input_name: torch.empty(entry.shape, dtype=entry.dtype, device=where) for entry in entries}
        Restorer(~plan.active_mask).restore(entries, own, others)


def test_the_second_call_makes_its_own_keys_and_values_of_the_text_anew() -> None:
    """At a FULL step without a look, whatever was done to the text meanwhile."""
    model, plan = TinyDiT(), shared("FP")
    first, second = branches(model, "FP")
    text = second[0]["text"].clone()
    run_model, found = compiled(model), []
    with hetcache.session(plan, strict=True) as session:
        for _ in range(2):
            for step in range(2):
                for name, given in (("a", first[step]), ("b", {**second[step], "text": text})):
                    with session.branch(name):
                        output = run(run_model, [given])[0]
                found += [output] if not step else []
            text.data.mul_(-1)
            session.restart()
    again = by_hand(model, plan, [first, [{**one, "text": -second[0]["text"]} for one in second]])[1][0]
    check(found[1:], [again])
    assert max_error(found[0], again) > 1e-2


def test_records_are_of_each_call() -> None:
    model, plan = TinyDiT(), shared()
    kinds = np.where(plan.active_mask, TokenKind.GENERATIVE, TokenKind.CONTEXT)
    plan = replace(plan, token_kind=kinds.astype(np.uint8))
    calls = branches(model)
    outputs, first = edit(compiled(model), plan, calls, record=True)
    apart, _ = edit(compiled(model), replace(plan, shared_context=0), calls)
    for found, truth in zip(outputs, apart, strict=True):
        check(found, truth)
    assert first.stats.shared == 0
    again, second = edit(compiled(model), plan, calls, memory_of=first.record)
    assert second.stats.shared == 0
    assert second.stats.recalled
    for found, truth in zip(again, outputs, strict=True):
        check(found[:1], truth[:1])


def test_an_error_in_the_first_call_leaves_the_others_nothing_to_read() -> None:
    """The first branch fails at its second FULL step; the other one, which read its cache, is FULL then."""
    inner = CountingInner()
    model, plan = TinyDiT(), shared("FPFP")
    first, second = branches(model, "FPFP")
    run_model = compiled(model, inner)

    def fail() -> None:
        raise RuntimeError("interrupted")

    with hetcache.session(plan) as session:
        for step in range(2):
            for name, given in (("first", first), ("second", second)):
                with session.branch(name):
                    run(run_model, given[step : step + 1])
        inner.before_run = fail
        with session.branch("first"), pytest.raises(RuntimeError, match="interrupted"):
            run(run_model, first[2:3])
        inner.before_run = lambda: None
        with session.branch("second"):
            (output,) = run(run_model, second[2:3])
        assert session.stats.kinds[-1] is StepKind.FULL
        assert max_error(output, model(**second[2])) < 1e-5
        with session.branch("first"):
            run(run_model, first[2:3])
        assert session.stats.kinds[-1] is StepKind.PARTIAL  # and now it reads the other one's
        assert session.stats.shared == 2


def test_an_edit_after_another_one() -> None:
    """Every edit of a session computes its own context, and memory is not taken anew."""
    model, plan = TinyDiT(), shared()
    calls = branches(model)
    run_model = compiled(model)
    with hetcache.session(plan, strict=True) as session:
        held = []
        for _ in range(3):
            for step in range(len(STEPS)):
                for name, given in zip("ab", calls, strict=True):
                    with session.branch(name):
                        run(run_model, [given[step]])
            session.restart()
            held.append(session.stats.cache_bytes)
        assert session.stats.shared == 6
        assert len(set(held)) == 1
        session.release()
        assert session.stats.cache_bytes == 0


def test_bad_values() -> None:
    mask = np.zeros(GRID, dtype=bool)
    mask[0, 0, 0] = True
    with pytest.raises(PlanError, match="shared_context must be 0 or 1, got 2"):
        Plan.from_mask(mask, GRID, shared_context=2)
    with pytest.raises(PlanError, match="'hetcache' chooses tokens in each call: shared_context must be 0"):
        Plan.from_mask(mask, GRID, shared_context=1, selection="hetcache")
    assert PlanOptions().shared_context == 0


def test_plans_of_a_batch_agree() -> None:
    plans = [replace(plan_of(STEPS, seed=seed), shared_context=seed) for seed in (0, 1)]
    with pytest.raises(hetcache.SessionError, match="differ in shared_context"):
        hetcache.session(plans)
