"""The second edit of a clip: it reads the caches that the first one recorded, or is refused."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import (
    Kwargs,
    check,
    compiled,
    frozen_calls,
    ignoring_time,
    max_error,
    run,
    tensor_of,
    tiny_calls,
)
from models import GRID, NUM_TOKENS, PATCH, TinyDiT, call, vace, wan
from test_extrapolate import PolynomialDiT
from test_extrapolate import latents as polynomial_latents
from test_multistep import TIMES, Prediction
from test_multistep import plan_of as weighted_plan
from test_streaming import Device, device  # noqa: F401  a fixture

import hetcache_compile as hetcache
from hetcache_compile import Plan, Record, RecordError, StepKind
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.record.signature import model_signature

STEPS = "FPRFPRF"
N = NUM_TOKENS
TEXTS = ("text", "encoder_hidden_states")
LATENTS = ("latents", "hidden_states", "control_hidden_states")


@pytest.fixture(autouse=True, scope="module")
def fresh_once() -> Iterator[None]:
    """Tests share what Dynamo compiles: a record knows nothing of it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mask_of(num_active: int = 35, seed: int = 0) -> np.ndarray:
    """Bool `[N]`; a mask of more tokens holds those of fewer."""
    mask = np.zeros(N, dtype=bool)
    mask[np.random.default_rng(seed).permutation(N)[:num_active]] = True
    return mask


def plan_of(steps: str = STEPS, mask: np.ndarray | None = None, **changes: Any) -> Plan:
    plan = Plan.from_token_mask(
        mask_of() if mask is None else mask, GRID, num_inference_steps=len(steps), schedule=list(steps)
    )
    return replace(plan, **changes)


def in_pixels(mask: np.ndarray) -> torch.Tensor:
    """The mask of tokens as one of latents `[1, 1, T, H, W]`."""
    grid = torch.from_numpy(mask).view(GRID)
    return grid.repeat_interleave(PATCH[1], 1).repeat_interleave(PATCH[2], 2)[None, None]


def edit_calls(model: torch.nn.Module, steps: str = STEPS, edit: int = 0) -> list[Kwargs]:
    """The calls of one edit; edits differ in text, noise and clip, not in how the model is run."""
    if isinstance(model, TinyDiT):
        return tiny_calls(steps, 50 * edit)
    calls = [call(model, seed=50 * edit + step) for step in range(len(steps))]
    scale = call(model).get("control_hidden_states_scale")
    for kwargs in calls if scale is not None else ():
        kwargs["control_hidden_states_scale"] = scale
    return calls


def second_calls(
    model: torch.nn.Module, mask: np.ndarray, first: Sequence[Kwargs], other_text: bool = False
) -> list[Kwargs]:
    """Other noise inside the mask, and another text; all latents are others from the second step on."""
    calls = edit_calls(model, STEPS[: len(first)], edit=1)
    for kwargs in calls:
        kwargs |= {} if other_text else {name: first[0][name] for name in kwargs.keys() & TEXTS}
    for name in calls[0].keys() & LATENTS:
        calls[0][name] = torch.where(in_pixels(mask), calls[0][name], first[0][name])
    return calls


def recorded(fast: Any, plan: Plan, calls: Sequence[Kwargs]) -> tuple[Record, list[torch.Tensor]]:
    with hetcache.session(plan, strict=True, record=True) as session:
        outputs = run(fast, calls)
    assert session.stats.recalled == 0
    assert session.record is not None
    return session.record, outputs


def by_hand(
    model: torch.nn.Module, plan: Plan, first: Sequence[Kwargs], second: Sequence[Kwargs], own: Plan | None = None
) -> list[torch.Tensor]:
    """The second edit by functional forms: each FULL step is a PARTIAL one on the cache of the first edit's step.

    With another text the first one is FULL, and later ones read what it changed in keys and values, too.
    """
    forms = hetcache.rewrite(model, plan, (), first[0])
    full = [step for step, kind in enumerate((own or plan).steps) if kind is StepKind.FULL]
    caches = {step: forms.full(**first[step])[1] for step in full}
    cache: dict[str, torch.Tensor] = {}
    text = "text" if "text" in first[0] else "encoder_hidden_states"
    if not torch.equal(first[0][text], second[0][text]):
        _, moved = forms.full(**second[0])
        names = [name for name in moved if name.startswith("past_key_values")]
        changes = {name: moved[name] - caches[0][name] for name in names}
        caches = {step: cache | {n: cache[n] + changes[n] for n in names} for step, cache in caches.items()}
        caches[0] = moved
    outputs = []
    for step, kind in enumerate(plan.steps):
        if step in caches and kind is not StepKind.REUSE:
            cache, kind = caches[step], StepKind.PARTIAL
        output, cache = forms.run(kind.form, cache, (), second[step])
        outputs.append(tensor_of(output))
    return outputs


OPTIONS: dict[str, dict[str, Any]] = {
    "as computed": {},
    "int8": {"cache_dtype": "int8"},
    "predicted": {"context_extrapolation": 1, "extrapolation": 1},
    "moving": {"context_motion": 1, "extrapolation": 1},
    "some tokens": {"context_index": np.flatnonzero(~mask_of())[::2].copy()},
    "merged": {"context_cluster": np.arange(N - 35) // 2, "merging": "kmeans"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_edit_again(options: dict[str, Any]) -> None:
    """On a model whose context does not move, every step gives what it gave.

    Where a cache holds less than FULL steps compute, a FULL step of the second edit is what a PARTIAL one of the first
    was.
    """
    model = ignoring_time(wan(num_layers=1))
    fast, plan, calls = compiled(model), plan_of(**options), frozen_calls(call(model), len(STEPS))
    record, first = recorded(fast, plan, calls)
    with hetcache.session(plan, strict=True, memory_of=record) as session:
        second = run(fast, calls)
    exact = options.keys() <= {"context_extrapolation", "context_motion", "extrapolation"}
    check(second, first if exact else [first[1]] * len(STEPS))
    assert session.stats.steps == {"FULL": 0, "PARTIAL": 5, "REUSE": 2}
    assert session.stats.recalled == STEPS.count("F")


@pytest.mark.parametrize("other_text", [False, True])
@pytest.mark.parametrize("architecture", [TinyDiT, pytest.param(vace, marks=pytest.mark.wide)])
def test_other_noise_inside_and_another_text(architecture: Callable[..., torch.nn.Module], other_text: bool) -> None:
    """Every step is what a PARTIAL step is on the cache that was recorded of it, corrected for the text."""
    model = architecture()
    fast, plan, first = compiled(model), plan_of(), edit_calls(model)
    record, _ = recorded(fast, plan, first)
    second = second_calls(model, mask_of(), first, other_text)
    with hetcache.session(plan, strict=True, memory_of=record) as session:
        outputs = run(fast, second)
    assert session.stats.steps["FULL"] == int(other_text)
    check(outputs, by_hand(model, plan, first, second))
    uncached = run(model, second)
    assert max(map(max_error, outputs, uncached)) > 0.01, "the context is the first edit's"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("recorded_too", [False, True])
def test_a_text_that_changes_midway(recorded_too: bool, named: bool) -> None:
    """Each step is corrected for the text that it has, in place of the one that was recorded of it."""
    model, plan = TinyDiT(), plan_of("FFFFF")
    fast, first = compiled(model), edit_calls(model)[:5]
    other = edit_calls(model, edit=1)[0]["text"]
    second = second_calls(model, mask_of(), first)
    texts = [first[0]["text"]] * 2 + [other] * 2 + [first[0]["text"]]
    second = [{**kwargs, "text": text} for kwargs, text in zip(second, texts, strict=True)]
    if recorded_too:
        first = [{**kwargs, "text": text} for kwargs, text in zip(first, texts, strict=True)]

    def branch(session: hetcache.Session) -> Any:
        return session.branch("a") if named else contextlib.nullcontext()

    with hetcache.session(plan, strict=True, record=True) as session, branch(session):
        run(fast, first)
    with hetcache.session(plan, strict=True, memory_of=session.record) as session, branch(session):
        outputs = run(fast, second)
    assert session.stats.steps == {"FULL": int(not recorded_too), "PARTIAL": 4 + int(recorded_too), "REUSE": 0}
    forms = hetcache.rewrite(model, plan, (), first[0])
    caches = [forms.full(**kwargs)[1] for kwargs in first]
    if not recorded_too:
        moved = forms.full(**second[2])[1]
        names = [name for name in moved if name.startswith("past_key_values")]
        caches[3] |= {name: caches[3][name] + moved[name] - caches[2][name] for name in names}
        caches[2] = moved
    truths = [tensor_of(forms.partial(cache, **one)[0]) for cache, one in zip(caches, second, strict=True)]
    check(outputs, truths)


@pytest.mark.parametrize("first_other", [0, 1])
def test_older_values_are_of_the_other_text_too(first_other: int) -> None:
    """A line in time goes through two FULL steps: both are corrected by what the text changes in the latest one."""
    model, plan = wan(num_layers=2), plan_of("FFRF", context_extrapolation=1)
    fast, first = compiled(model), edit_calls(model, "FFRF")
    for step, kwargs in enumerate(first):
        kwargs["encoder_hidden_states"] = first[0]["encoder_hidden_states"]
        kwargs["timestep"] = torch.full((1,), 900 - 200.0 * step)
    other = edit_calls(model, edit=1)[0]["encoder_hidden_states"]
    second = [
        {**kwargs, "encoder_hidden_states": other} if n >= first_other else kwargs for n, kwargs in enumerate(first)
    ]
    record, _ = recorded(fast, plan, first)
    followed = plan_of("FFPF", context_extrapolation=1)  # step 2 goes on from step 1
    with hetcache.session(followed, strict=True, memory_of=record) as session:
        outputs = run(fast, second)
    assert [kind.letter for kind in session.stats.kinds] == ["F" if n == first_other else "P" for n in range(4)]

    forms = hetcache.rewrite(model, plan, (), first[0])
    caches: list[dict[str, torch.Tensor]] = [{}]
    for kind, kwargs in zip(("full", "full", "reuse", "full"), first, strict=True):
        caches.append({**caches[-1], **forms.run(kind, caches[-1], (), kwargs)[1]})
    caches = caches[1:]
    output, moved = forms.run("full", {}, (), second[first_other])
    changes = {name: moved[name] - caches[first_other][name] for name in moved if name.endswith((".key", ".value"))}
    for cache in caches[first_other:]:
        cache |= {one: cache[one] + change for name, change in changes.items() for one in (name, f"{name}.1")}
    if first_other == 1:
        caches[2] |= {name: value for name, value in moved.items() if "output" in name}
    truths = [tensor_of(forms.run("partial", one, (), kwargs)[0]) for one, kwargs in zip(caches, second, strict=True)]
    truths[first_other] = tensor_of(output)
    check(outputs, truths)


class Controlled(TinyDiT):
    """A model whose text may be controlled."""

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor | None = None, control: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert text is not None
        return super().forward(latents, text if control is None else text + control)


def test_a_condition_that_comes_midway() -> None:
    """From then on it is another graph, with a record and conditions of its own."""
    model, plan = Controlled(), plan_of("FFFF")
    fast, calls = compiled(model), edit_calls(model)[:4]

    def controlled(control: torch.Tensor) -> list[Kwargs]:
        return [*calls[:2], *({**kwargs, "control": control} for kwargs in calls[2:])]

    control = torch.ones_like(calls[0]["text"])
    record, first = recorded(fast, plan, controlled(control))
    with hetcache.session(plan, strict=True, memory_of=record) as session:
        check(run(fast, controlled(control)), first)
    assert session.stats.steps == {"FULL": 0, "PARTIAL": 4, "REUSE": 0}
    with hetcache.session(plan, strict=True, memory_of=record) as session:
        other = run(fast, controlled(-control))
    assert session.stats.kinds == [StepKind.PARTIAL] * 2 + [StepKind.FULL, StepKind.PARTIAL]
    check(other[:3], run(model, controlled(-control)[:3]))


@pytest.mark.parametrize("begins", [0, 2])
def test_a_setting_that_changes_midway(begins: int, tmp_path: Path) -> None:
    """It has to be the recorded one at every step, whether it was given from the first step on or not."""
    model, plan = Controlled(), plan_of("FFFF")
    fast, calls = compiled(model), edit_calls(model)[:4]

    def controlled(*scales: float) -> list[Kwargs]:
        return [
            kwargs if step < begins else {**kwargs, "control": torch.tensor([float(scale)])}
            for step, (kwargs, scale) in enumerate(zip(calls, scales, strict=True))
        ]

    saved, first = recorded(fast, plan, controlled(1, 1, 1, 2))
    saved.save(tmp_path / "clip.hetrecord")
    for record in (saved, Record.load(tmp_path / "clip.hetrecord")):
        with hetcache.session(plan, strict=True, memory_of=record) as session:
            check(run(fast, controlled(1, 1, 1, 2)), first)
        assert session.stats.steps == {"FULL": 0, "PARTIAL": 4, "REUSE": 0}
        for scales, message in (
            ((1, 1, 3, 2), r"control is \[3.0\] and was \[1.0\]"),
            ((1, 1, 1, 1), r"\[1.0\] and was \[2.0\]"),
        ):
            with pytest.raises(RecordError, match=message), hetcache.session(plan, strict=True, memory_of=record):
                run(fast, controlled(*scales))


def test_another_mask_and_another_plan() -> None:
    """More tokens are active, and steps that were FULL may be PARTIAL: each reads the cache of its own step."""
    model = TinyDiT()
    fast, own, first = compiled(model), plan_of("FFFFF"), edit_calls(model)[:5]
    record, _ = recorded(fast, own, first)
    larger = mask_of(50)
    plan = plan_of("FPRPF", larger)
    second = second_calls(model, larger, first)
    with hetcache.session(plan, strict=True, memory_of=record) as session:
        outputs = run(fast, second)
    assert session.stats.recalled == 4
    check(outputs, by_hand(model, plan, first, second, own))


def test_a_step_that_was_not_recorded_goes_on_from_the_last_one_that_was() -> None:
    model = TinyDiT()
    fast, first = compiled(model), edit_calls(model)
    record, _ = recorded(fast, plan_of("FRRFRRF"), first)
    plan = plan_of("FPPFPRF")
    second = second_calls(model, mask_of(), first)
    with hetcache.session(plan, strict=True, memory_of=record):
        outputs = run(fast, second)
    check(outputs, by_hand(model, plan, first, second, plan_of("FRRFRRF")))


def test_active_rows_are_weighed_as_planned() -> None:
    """Fitted weights correct the active rows of a step from memory as they did in the FULL step that it stands for."""
    model = PolynomialDiT(2)
    plan = weighted_plan(2, Prediction(1, True, corrects=True), "FFRPRFFPRPRF")
    fast, rows = compiled(model), torch.from_numpy(plan.active_mask).view(1, 1, *plan.grid)
    inside = rows.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4).expand(1, 4, -1, -1, -1)
    calls = [{"latents": polynomial_latents(), "timestep": torch.tensor([time]).float()} for time in TIMES]
    record, first = recorded(fast, plan, calls)
    with hetcache.session(plan, strict=True, memory_of=record):
        second = run(fast, calls)
    for again, before in zip(second, first, strict=True):
        torch.testing.assert_close(again[inside], before[inside], rtol=1e-4, atol=1e-5)


def test_guidance() -> None:
    """A record for each branch, by its name or by its place."""
    model = TinyDiT()
    fast, plan = compiled(model), plan_of("FPF")
    conditional = edit_calls(model)[:3]
    unconditional = [{**kwargs, "text": torch.zeros_like(kwargs["text"])} for kwargs in conditional]

    def guided(session: Any, named: bool) -> list[torch.Tensor]:
        outputs = []
        for pair in zip(conditional, unconditional, strict=True):
            for name, kwargs in zip(("cond", "uncond"), pair, strict=True):
                if named:
                    with session.branch(name):
                        outputs += run(fast, [kwargs])
                else:
                    outputs += run(fast, [kwargs])
        return outputs

    for named in (True, False):
        with hetcache.session(plan, strict=True, record=True) as session:
            first = guided(session, named)
        record = session.record
        assert record is not None
        assert len(record.branches) == 2
        with hetcache.session(plan, strict=True, memory_of=record) as session:
            second = guided(session, named)
        check(second[:2], first[:2])  # the same inputs, and the same context
        assert session.stats.recalled == 4
    with (
        pytest.raises(RecordError, match="2 calls at each time were recorded, and this edit makes 1"),
        hetcache.session(plan, memory_of=record),
    ):
        run(fast, conditional)
    with (
        pytest.raises(RecordError, match="calls named 'other' were not recorded"),
        hetcache.session(plan, memory_of=record) as session,
        session.branch("other"),
    ):
        run(fast, conditional)


def test_two_experts() -> None:
    """Each has a record of its own, which begins with its own first step."""
    steps, times = (0, 0, 1, 1), (900.0, 700.0, 500.0, 300.0)
    fast = [compiled(PolynomialDiT(degree)) for degree in (1, 2)]
    calls = [{"latents": polynomial_latents(), "timestep": torch.tensor([time])} for time in times]
    own = weighted_plan(2, Prediction(1, True))
    plan = replace(own.with_steps(plan_of("FPFP").steps), timesteps=np.array(times), extrapolation=0)

    def edit() -> list[torch.Tensor]:
        return [run(fast[number], [kwargs])[0] for number, kwargs in zip(steps, calls, strict=True)]

    with hetcache.session(plan, strict=True, record=True) as session:
        first = edit()
    assert session.record is not None
    with hetcache.session(plan, strict=True, memory_of=session.record) as again:
        second = edit()
    check(second, first)
    assert again.stats.steps == {"FULL": 0, "PARTIAL": 4, "REUSE": 0}


# Refusals


@pytest.fixture(scope="module")
def one() -> tuple[torch.nn.Module, Record, list[Kwargs]]:
    """A model, a record of an edit, and its calls."""
    with torch.no_grad():
        model = vace(num_layers=1, vace_layers=(0,))
        calls = edit_calls(model)
        return model, recorded(compiled(model), plan_of(), calls)[0], calls


PLANS: dict[str, tuple[Plan, str]] = {
    "another grid": (
        Plan.from_token_mask(np.arange(30) < 7, (3, 2, 5), num_inference_steps=7, schedule="F"),
        r"of the token grid \(3, 5, 7\)",
    ),
    "more steps": (plan_of("FPRFPRFF"), "another schedule: its 7 steps are not at the times of the plan's 8"),
    "other times": (plan_of(timesteps=np.linspace(900.0, 0.0, 7)), "another schedule"),
    "another cache": (plan_of(cache_dtype="int8"), r"another cache_dtype \(same, int8\)"),
    "outputs predicted": (plan_of(extrapolation=1), r"another extrapolation \(0, 1\)"),
    "FULL where it was not": (plan_of("FPFFPRF"), "step 2 is FULL in the plan and was not recorded"),
    "a mask that leaves some out": (plan_of(mask=mask_of(30)), "5 tokens that the recorded edit generated"),
    "some tokens": (plan_of(context_index=np.flatnonzero(~mask_of())[::2].copy()), "another num_active"),
    "a selection of FULL steps": (plan_of(selection="attention"), "selection='uniform'"),
}


@pytest.mark.parametrize(("plan", "reason"), PLANS.values(), ids=PLANS)
def test_plans_that_cannot_read_a_record(one: Any, plan: Plan, reason: str) -> None:
    _, record, _ = one
    with pytest.raises(RecordError, match=reason):
        hetcache.session(plan, memory_of=record)


def changed(calls: Sequence[Kwargs], **changes: Callable[[torch.Tensor], torch.Tensor]) -> list[Kwargs]:
    return [{**kwargs, **{name: change(kwargs[name]) for name, change in changes.items()}} for kwargs in calls]


def outside_the_mask(value: torch.Tensor) -> torch.Tensor:
    return torch.where(in_pixels(mask_of()), value, torch.randn_like(value))


EDITS: dict[str, tuple[Callable[[list[Kwargs]], list[Kwargs]], str]] = {
    "other noise": (
        lambda calls: changed(calls, hidden_states=outside_the_mask),
        r"hidden_states differs by 1\d\d% from the recorded edit's outside",
    ),
    "another clip": (
        lambda calls: changed(calls, control_hidden_states=outside_the_mask),
        r"control_hidden_states differs by 1\d\d% from",
    ),
    "another scale": (
        lambda calls: changed(calls, control_hidden_states_scale=lambda scale: scale + 1),
        "control_hidden_states_scale is .* and was .* in the recorded edit",
    ),
    "another length of text": (
        lambda calls: changed(calls, encoder_hidden_states=lambda text: text[:, :-2]),
        "the model is not the recorded one",
    ),
    "a later start": (lambda calls: calls[3:], "the recorded calls begin at step 0"),
}


@pytest.mark.parametrize(("change", "reason"), EDITS.values(), ids=EDITS)
def test_edits_that_are_not_of_the_recorded_clip(one: Any, change: Any, reason: str) -> None:
    model, record, calls = one
    times = np.array([float(kwargs["timestep"][0]) for kwargs in calls])
    timed = Record(replace(record.plan, timesteps=times), record.branches)
    torch.manual_seed(4321)
    with pytest.raises(RecordError, match=reason), hetcache.session(plan_of(timesteps=times), memory_of=timed):
        run(compiled(model), change(calls))


def test_other_weights_and_another_graph(one: Any) -> None:
    model, record, calls = one
    other = vace(seed=1, num_layers=1, vace_layers=(0,))
    with pytest.raises(RecordError, match="not the recorded one"), hetcache.session(plan_of(), memory_of=record):
        run(compiled(other), calls)
    fast = compiled(model)
    with hetcache.session(plan_of(), memory_of=record):
        run(fast, calls[:2])
        kept = model.proj_out.weight.clone()
        model.proj_out.weight[0, :2] = kept[0, :2].flip(0)  # the same numbers, elsewhere
        try:
            with pytest.raises(RecordError, match="not the recorded one"):
                run(fast, calls[2:4])
        finally:
            model.proj_out.weight.copy_(kept)
    with hetcache.session(plan_of(), memory_of=record, strict=True):
        run(fast, calls)


def test_what_a_session_refuses(one: Any) -> None:
    _, record, _ = one
    with pytest.raises(hetcache.SessionError, match="give record or memory_of"):
        hetcache.session(plan_of(), record=True, memory_of=record)
    for options in ({"record": True}, {"memory_of": record}):
        with pytest.raises(hetcache.SessionError, match="a record is of one mask"):
            hetcache.session([plan_of(), plan_of()], **options)
    with pytest.raises(RecordError, match="selection='uniform'"):
        hetcache.session(plan_of(selection="attention"), record=True)


def test_an_edit_that_was_cut_short(one: Any) -> None:
    model, _, calls = one
    record, _ = recorded(compiled(model), plan_of(), calls[:2])
    with pytest.raises(RecordError, match="step 3 is FULL in the plan and was not recorded: recorded were 0"):
        hetcache.session(plan_of(), memory_of=record)


# Memory and files


def test_a_record_in_a_file(one: Any, tmp_path: Path) -> None:
    model, record, calls = one
    path = tmp_path / "edit.hetrecord"
    record.save(path)
    assert record.num_bytes < path.stat().st_size < record.num_bytes + 20_000
    loaded, fast = Record.load(path), compiled(model)
    assert loaded.num_bytes == record.num_bytes
    outputs = []
    for memory in (record, loaded):
        with hetcache.session(plan_of(), memory_of=memory, strict=True):
            outputs.append(run(fast, calls))
    assert all(map(torch.equal, *outputs))
    path.write_bytes(path.read_bytes()[:-100])
    plan_of().save(tmp_path / "edit.hetplan")
    for wrong, reason in ((path, "cannot be read as a record"), (tmp_path / "edit.hetplan", "not a record")):
        with pytest.raises(hetcache.RecordFileError, match=reason):
            Record.load(wrong)


def test_types_that_numpy_does_not_know(tmp_path: Path) -> None:
    model = TinyDiT()
    plan, calls = plan_of("FF", cache_dtype="bf16"), edit_calls(model)[:2]
    record, _ = recorded(compiled(model), plan, calls)
    record.save(tmp_path / "a.hetrecord")
    with hetcache.session(plan, memory_of=Record.load(tmp_path / "a.hetrecord"), strict=True):
        run(compiled(model), calls)


def test_inputs_that_lie_otherwise_in_memory(tmp_path: Path) -> None:
    """Latents that a pipeline has permuted, and a text that was transposed."""
    model, plan = TinyDiT(), plan_of("FF")
    fast, calls = compiled(model), edit_calls(model)[:2]
    recorded(fast, plan, calls)  # from the second layout on, strides are symbols to Dynamo
    for kwargs in calls:
        kwargs["latents"] = kwargs["latents"].to(memory_format=torch.channels_last_3d)
        kwargs["text"] = kwargs["text"].mT.contiguous().mT
    record, first = recorded(fast, plan, calls)
    record.save(tmp_path / "a.hetrecord")
    with hetcache.session(plan, strict=True, memory_of=Record.load(tmp_path / "a.hetrecord")) as session:
        check(run(fast, calls), first)
    assert session.stats.recalled == 2


def test_no_room_for_a_file(one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record, _ = one
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(hetcache.OutputFileError, match=r"the record has .* GiB are free"):
        record.save(tmp_path / "a.hetrecord")
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_known_from_the_first_step_on_and_freed() -> None:
    model = TinyDiT()
    fast, plan, calls = compiled(model), plan_of(), edit_calls(model)
    with hetcache.session(plan, record=True, strict=True) as session:
        run(fast, calls[:1])
        told = session.stats.record_bytes
        run(fast, calls[1:])
        assert session.stats.record_bytes == told
    record = session.record
    assert record is not None
    groups = [g for one in record.branches.values() for g in (one.inputs.values(), *one.conditions.values())]
    given = sum(tensor.nbytes for group in groups for tensor in group)
    assert record.num_bytes == told + given
    forms = hetcache.rewrite(model, plan, (), calls[0])
    assert told == Record.bytes_for(forms)
    with hetcache.session(plan, memory_of=record, strict=True) as second:
        run(fast, calls)
    held = [weakref.ref(t) for one in record.branches.values() for s in one.steps.values() for t in s.values()]
    assert all(reference() is not None for reference in held)
    del record, session, second
    gc.collect()
    assert not any(reference() is not None for reference in held)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("options", "other_text"),
    [
        ({}, False),
        ({"context_extrapolation": 1}, False),
        ({"context_motion": 1}, False),
        ({"cache_dtype": "int8"}, True),
        ({"cache_device": "cpu"}, True),
    ],
)
def test_where_keys_and_values_are_streamed(
    device: Device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    other_text: bool,
) -> None:
    """On a GPU: a record takes the host's buffers over, and an edit from memory streams from them; no copy is made."""
    monkeypatch.setattr("hetcache_compile.runtime.buffers.free_bytes", lambda _: 10**9)
    model = wan(num_layers=1)
    plan, first = plan_of(**options), edit_calls(model)
    second = second_calls(model, mask_of(), first, other_text)
    fast = compiled(model)
    record, outputs = recorded(fast, plan, first)
    truths = []
    for _ in range(2):  # nothing was written into the record
        with hetcache.session(plan, memory_of=record, strict=True) as session:
            again = run(fast, second)
            assert session.stats.recalled == 3 - other_text
            truths.append(again)
    assert device.bytes_out > 0
    assert all(map(torch.equal, *truths))
    # The same without another memory.
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("buffers", "dispatch", "prepare"):
            patch.setattr(f"hetcache_compile.runtime.{module}.can_stream", lambda _: False)
        fast = compiled(model)
        record, expected = recorded(fast, plan, first)
        check(outputs, expected)
        with hetcache.session(plan, memory_of=record, strict=True):
            check(truths[0], run(fast, second))


def test_a_call_out_of_order_is_full_and_leaves_the_record_alone(device: Device) -> None:  # noqa: F811
    model = wan(num_layers=1)
    fast, calls = compiled(model), edit_calls(model)
    times = np.array([float(kwargs["timestep"][0]) for kwargs in calls])
    plan = plan_of(timesteps=times)
    record, _ = recorded(fast, plan, calls)
    before = {name: tensor.clone() for name, tensor in record._tensors().items()}
    with hetcache.session(plan, memory_of=record) as session:
        run(fast, calls[:1])
        stray = {**edit_calls(model, edit=1)[3], "timestep": calls[0]["timestep"] - 3.21}
        with pytest.warns(HetCacheWarning, match="the plan knows no time"):
            outputs = run(fast, [stray])
    check(outputs, run(model, [stray]))
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in record._tensors().items())


def test_a_model_is_the_same_on_every_device() -> None:
    """Where a tensor is made is not what is computed."""
    digests = set()
    for place in ("cpu", "meta"):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device(place)}))
        digests.add(model_signature(graph, [torch.ones(3)]))
    other = torch.fx.Graph()
    other.output(other.call_function(torch.ops.aten.zeros.default, ([3],), {"device": torch.device("cpu")}))
    assert len(digests) == 1
    assert model_signature(other, [torch.ones(3)]) not in digests
