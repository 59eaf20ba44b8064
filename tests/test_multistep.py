"""Outputs by fitted weights: what a calibration knows exactly is predicted and corrected exactly, in every layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from test_extrapolate import GRID, N, PolynomialDiT, error, latents

import hetcache_compile as hetcache
from hetcache_compile import Plan, PlanError, StepKind
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.calibration.output_weights import step_lengths, step_weights
from hetcache_compile.calibration.record import Measured
from hetcache_compile.engine.engine import Engine
from hetcache_compile.plan.prediction import Prediction

STEPS = 12
TIMES = np.linspace(1000, 40, STEPS)
LENGTHS = -np.diff([*TIMES, 0.0]) / 1000
SCHEDULE = "FFRPRRFRPRRF"
KINDS = {"F": "full", "P": "partial", "R": "reuse"}


def calibration_of(degree: int, partial: float = 0.0) -> Calibration:
    """A calibration of outputs that are polynomials of the time with random coefficients."""
    coefficients = np.random.default_rng(0).normal(size=(3, degree + 1, 40))
    v = np.einsum("sp,kpd->ksd", (TIMES[:, None] / 1000) ** np.arange(degree + 1), coefficients)
    v /= np.sqrt((v**2).sum(axis=2).mean(axis=1))[:, None, None]
    sources, offsets = np.array([0, STEPS - 2]), np.array([1, STEPS - 2])
    empty = Calibration(TIMES, np.zeros((3, STEPS, STEPS)), sources, offsets, np.zeros((1, 3, 2, 2)), one_step=True)
    gram = np.einsum("ksd,ktd->kst", v, v)
    return empty.add("a", Measured(gram, np.full((1, 3, 2, 2), partial), np.array([True, True, True])))


def plan_of(degree: int, method: Prediction, steps: str = SCHEDULE) -> Plan:
    active = np.random.default_rng(0).permutation(N) < 7
    plan = Plan.from_token_mask(active, GRID, schedule=list(steps), num_inference_steps=len(steps), extrapolation=1)
    weights = step_weights(calibration_of(degree), plan.steps, TIMES, LENGTHS, method)
    return replace(plan, weights=weights)


@torch.no_grad()
def denoise(model: torch.nn.Module, plan: Plan | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Euler's method on an output that depends on the time alone: the last latents, and the output of each step."""
    fixed, x, outputs = latents(), torch.zeros_like(latents()), []
    forms = hetcache.rewrite(model, plan, (fixed, torch.tensor([900.0]))) if plan else None
    cache: dict[str, torch.Tensor] = {}
    for step, time in enumerate(TIMES):
        arguments = (fixed, torch.tensor([time], dtype=torch.float32))
        if forms is None or plan is None:
            output = model(*arguments)
        else:
            output, cache = forms.run(KINDS[plan.steps[step].letter], cache, arguments, {}, step=step)
        x = x + float(LENGTHS[step]) * output
        outputs.append(output)
    return x, outputs


def test_what_lies_in_the_span_of_the_points_is_predicted_exactly() -> None:
    model = PolynomialDiT(1)
    _, truth = denoise(model, None)
    _, outputs = denoise(model, plan_of(1, Prediction(1, True)))
    _, repeated = denoise(
        model, replace(plan_of(1, Prediction(1, True)), extrapolation=0, weights=np.zeros(0, np.float32))
    )
    assert max(map(error, outputs, truth)) < 1e-3
    assert max(map(error, repeated, truth)) > 0.05


def test_corrections_make_the_latents_right_where_predictions_were_wrong() -> None:
    """Degree 2 is beyond two points, not beyond two points and the fresh output."""
    model = PolynomialDiT(2)
    x, _ = denoise(model, None)
    predicted, corrected = (
        denoise(model, plan_of(2, Prediction(1, True, corrects=c), "FFRRFRRFRRRF"))[0] for c in (False, True)
    )
    assert error(predicted, x) > 2e-3
    assert error(corrected, x) < 2e-4


def test_inactive_tokens_are_corrected_by_the_next_full_step() -> None:
    x, _ = denoise(PolynomialDiT(2), None)
    corrected, _ = denoise(PolynomialDiT(2), plan_of(2, Prediction(1, True, corrects=True), "FFRPRFPRPRRF"))
    assert error(corrected, x) < 2e-4


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "partial", "reuse"])
def test_a_form_adds_up_what_the_weights_say(form: str) -> None:
    """By hand: fresh and cached outputs are known, and the cache keeps computed values, not corrected ones."""
    plan = plan_of(2, Prediction(1, True))
    weights = np.random.default_rng(1).normal(size=plan.weights.shape).astype(np.float32)
    plan, model, x = replace(plan, weights=weights), PolynomialDiT(2), latents()
    forms = hetcache.rewrite(model, plan, (x, torch.tensor([900.0])))
    calls = [(x, torch.tensor([time])) for time in (900.0, 700.0, 500.0)]
    older, latest, fresh = (model(*call) for call in calls)
    _, cache = forms.full(*calls[0])
    _, cache = forms.run("full", cache, calls[1], {})
    output, after = forms.run(form, cache, calls[2], {}, step=5)
    expected = {}
    for tokens in (0, 1):
        own, *points = map(float, weights[5, tokens])
        computed = fresh if form == "full" or (form == "partial" and tokens) else latest
        expected[tokens] = own * computed * (form != "reuse") + points[0] * latest + points[1] * older
    active = torch.zeros(N, dtype=torch.bool)
    active[torch.from_numpy(plan.active_index)] = True
    rows = active.view(1, 1, *GRID).repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    torch.testing.assert_close(output, torch.where(rows, expected[1], expected[0]), rtol=1e-4, atol=1e-5)
    _, unweighted = forms.run(form, cache, calls[2], {})
    torch.testing.assert_close(after["past_output.0"], unweighted["past_output.0"])


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "partial", "reuse"])
def test_inputs_that_stay_the_same_give_the_full_output(form: str) -> None:
    """The frozen-input invariant, in a step whose weights would correct."""
    plan = plan_of(2, Prediction(1, True, corrects=True))
    model, x = PolynomialDiT(2), latents()
    forms = hetcache.rewrite(model, plan, (x, torch.tensor([900.0])))
    _, cache = forms.full(x, torch.tensor([900.0]))
    _, cache = forms.run("full", cache, (x, torch.tensor([300.0])), {})
    output, _ = forms.run(form, cache, (x, torch.tensor([300.0])), {}, step=6)
    assert error(output, model(x, torch.tensor([300.0]))) < 1e-6


@torch.no_grad()
def test_without_the_points_that_weights_need_a_step_goes_by_its_time() -> None:
    """A second expert begins in the middle of a plan: its first steps have no history."""
    plan = plan_of(2, Prediction(1, True, corrects=True))
    model, x = PolynomialDiT(2), latents()
    forms = hetcache.rewrite(model, plan, (x, torch.tensor([900.0])))
    first, cache = forms.run("full", {}, (x, torch.tensor([500.0])), {}, step=6)
    assert error(first, model(x, torch.tensor([500.0]))) < 1e-6
    again, _ = forms.run("reuse", cache, (x, torch.tensor([400.0])), {}, step=7)
    assert error(again, first) < 1e-6


def test_weights_of_a_stale_step_shrink() -> None:
    """The more a PARTIAL step is off, the less the steps after it rely on it."""
    steps = tuple(StepKind[name] for name in ("FULL", "FULL", "PARTIAL", "REUSE", "REUSE", "FULL"))
    relied = []
    for partial in (0.0, 0.01, 0.3):
        known = calibration_of(2, partial)
        known = replace(known, timesteps=TIMES)
        padded = (*steps, *[StepKind.FULL] * (STEPS - len(steps)))
        weights = step_weights(known, padded, TIMES, LENGTHS, Prediction(1, True, corrects=True))
        assert weights.shape == (STEPS, 2, 3)
        relied.append(float(weights[3, 1, 1]))
        assert weights[3, 0, 1] == pytest.approx(
            step_weights(calibration_of(2), padded, TIMES, LENGTHS, Prediction(1, True))[3, 0, 1]
        )
    assert relied[0] > relied[1] > relied[2]


@pytest.mark.wide
def test_the_session_follows_the_weights_through_compilation() -> None:
    model = PolynomialDiT(2)
    plan = plan_of(2, Prediction(1, True, corrects=True), "FFRRFRRFRPRF")
    x, _ = denoise(model, None)
    fast = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "inductor"})
    by_hand, expected = denoise(model, plan)
    moved = torch.zeros_like(x)
    with torch.no_grad(), hetcache.session(plan) as session:
        for step, time in enumerate(TIMES):
            output = fast(latents(), torch.tensor([time], dtype=torch.float32))
            assert error(output, expected[step]) < 1e-5
            moved = moved + float(LENGTHS[step]) * output
    assert session.stats.steps == {"FULL": 5, "PARTIAL": 1, "REUSE": 6}
    assert error(moved, by_hand) < 1e-5
    assert error(moved, x) < 1e-3


def test_a_step_that_turns_out_full_is_not_corrected() -> None:
    """A call that finds no cache is FULL whatever the plan says; then weights of another kind do not hold."""
    plan = plan_of(2, Prediction(1, True, corrects=True))
    session = hetcache.session(plan)
    for step, kind in enumerate(plan.steps):
        planned = session.index("step_weights", torch.device("cpu"), kind=kind, step=step)
        assert planned.numpy() == pytest.approx(plan.weights[step])
    other = session.index("step_weights", torch.device("cpu"), kind=StepKind.FULL, step=2)
    assert not other.any()


def test_how_far_solvers_step() -> None:
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    lengths = step_lengths(euler, 20)
    with torch.device("meta"):  # whoever sets a default device
        assert np.array_equal(step_lengths(euler, 20), lengths)
    euler.set_timesteps(20)
    assert lengths == pytest.approx(np.abs(np.diff(euler.sigmas.numpy())), rel=1e-3)
    multistep = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for scheduler in (
        multistep,
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.DDIMScheduler(),
    ):
        before = copy.deepcopy(scheduler.config)
        assert step_lengths(scheduler, 10) is None
        assert scheduler.config == before


def test_a_plan_keeps_its_weights(tmp_path: Path) -> None:
    plan = plan_of(1, Prediction(1, True, corrects=True))
    path = tmp_path / "a.hetplan"
    plan.save(path)
    loaded = Plan.load(path)
    assert (loaded.weights == plan.weights).all()
    assert loaded.prediction == plan.prediction == Prediction(1, True, True)
    assert "fitted weights" in plan.describe()
    assert not plan.with_schedule("full").weights.size


def test_plans_with_a_calibration_are_weighted_unless_they_cannot_be() -> None:
    known, mask = calibration_of(2), np.zeros(GRID, dtype=bool)
    mask[:, 0, 0] = True

    def method(calibration: Calibration | None, **options: object) -> Prediction:
        settings = {"num_inference_steps": 8, "schedule": "FRP", "extrapolation": 1, **options}
        return Plan.from_mask(mask, GRID, calibration=calibration, **settings).prediction  # type: ignore[arg-type]

    assert method(known) == Prediction(1, True, True)
    assert method(replace(known, one_step=False)) == Prediction(1, True, False)
    for plain in (
        method(None),
        method(known, multistep=0),
        method(known, selection="attention"),
    ):
        assert plain == Prediction(1)
    assert method(known, extrapolation=0) == Prediction(0)


def test_weights_that_a_plan_cannot_have_are_refused() -> None:
    plan = plan_of(1, Prediction(1, True))
    for change, message in (
        ({"weights": plan.weights[:-1]}, "weights must be"),
        ({"weights": plan.weights.astype(np.float64)}, "weights must be"),
        ({"weights": plan.weights * np.float32(np.nan)}, "finite"),
        ({"extrapolation": 0}, "weights must be"),
        ({"selection": "attention"}, "a selection that full steps do not make"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(plan, **change)  # type: ignore[arg-type]


class Squashed(PolynomialDiT):
    """Something other than a move comes after the last token."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(latents, timestep))


def test_a_model_whose_output_is_not_linear_in_its_last_tokens_is_refused() -> None:
    x = (latents(), torch.tensor([900.0]))
    plan = plan_of(1, Prediction(1, True))
    with pytest.raises(hetcache.UnsupportedGraphError, match="other than moves"):
        hetcache.rewrite(Squashed(1), plan, x)
    forms = hetcache.rewrite(Squashed(1), replace(plan, weights=plan.weights[:0]), x)
    assert "step_weights" not in forms.by_kind["reuse"].indices
    with pytest.raises(hetcache.UnsupportedGraphError, match="other than moves"):
        forms.for_plan(plan)


def test_plans_with_and_without_weights_do_not_stand_in_for_each_other() -> None:
    """They share compiled forms, so what one of them can do says nothing of the other."""
    model, plan = Squashed(1), plan_of(1, Prediction(1, True), "FFR" + "F" * (STEPS - 3))
    plain = replace(plan, weights=plan.weights[:0])
    fast = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})

    def steps(of: Plan) -> dict[str, int]:
        with torch.no_grad(), hetcache.session(of) as session:
            for time in TIMES[:3]:
                fast(latents(), torch.tensor([time], dtype=torch.float32))
        return session.stats.steps

    assert steps(plain) == {"FULL": 2, "PARTIAL": 0, "REUSE": 1}
    with pytest.warns(UserWarning, match="other than moves|all 3 calls ran plainly"):
        assert steps(plan) == {"FULL": 0, "PARTIAL": 0, "REUSE": 0}
    assert steps(plain) == {"FULL": 2, "PARTIAL": 0, "REUSE": 1}


def test_an_engine_that_takes_no_weights_refuses_a_plan_that_has_them() -> None:
    plan = plan_of(1, Prediction(1, True))
    engine = SimpleNamespace(plan=plan, manifest=SimpleNamespace(dynamic_dims={}), indices=("active_index",))
    with pytest.raises(hetcache.SessionError, match="takes no weights"):
        Engine.check_plan(engine, plan)  # type: ignore[arg-type]
    Engine.check_plan(engine, replace(plan, weights=plan.weights[:0]))  # type: ignore[arg-type]
    engine.indices = ("active_index", "step_weights")
    Engine.check_plan(engine, plan)  # type: ignore[arg-type]


def test_behind_an_exact_output_nothing_is_corrected() -> None:
    weights = plan_of(2, Prediction(1, True, corrects=True), "FFFRFP" + "F" * (STEPS - 6)).weights
    exact = [1, 0, 0]
    for step in (0, 1, 2, 5, 8, STEPS - 1):
        assert weights[step, 1].tolist() == exact
    assert weights[4, 1].tolist() != exact
