"""The optimal schedule against brute force; the recorded error model against velocities that are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest

from hetcache_compile import CalibrationError, Plan, PlanError, StepKind
from hetcache_compile.calibration.best_schedule import expect, optimal_schedule
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.calibration.error_model import RecordedErrors
from hetcache_compile.calibration.output_weights import Outputs, moved
from hetcache_compile.calibration.record import FEW_STEPS, Costs, Measured
from hetcache_compile.calibration.schedule_search import Budget, StepCosts, shortest, total_error
from hetcache_compile.pipelines.planning import choices
from hetcache_compile.plan.prediction import Prediction

F, P, R = StepKind
STEPS = 12


class RandomErrors:
    """Errors of its own for each history that the model may depend on; some PARTIAL steps are not allowed."""

    def __init__(self, seed, horizon=6, correlation=0.0):
        self.seed, self.horizon, self.correlation = seed, horizon, correlation

    def draw(self, *key):
        return np.random.default_rng([self.seed, *(int(part) for part in key)]).random(2)

    def to_full(self, full, computed, stop):
        return self.draw(2, full, stop, *computed)

    def to_partial(self, full, computed, stop):
        return 0.5 * self.draw(1, full, stop, *computed) if stop - full <= self.horizon else np.full(2, np.inf)

    def last_run(self, full, computed):
        return self.draw(3, full, *computed)

    def runs(self, full, computed, stops):
        every = list(zip(full, computed, stops, strict=True))
        return tuple(np.array([kind(*one) for one in every]) for kind in (self.to_full, self.to_partial))

    def last_runs(self, full, computed):
        return np.array([self.last_run(*one) for one in zip(full, computed, strict=True)])


def brute_force(errors, num_steps, order, longest_run):
    """Every schedule with its error: each step is looked at with the whole history in view."""
    memo = {}

    def remembered(function, *key):
        if (function, key) not in memo:
            memo[function, key] = function(*key)
        return memo[function, key]

    to_full, to_partial, last_run = errors.to_full, errors.to_partial, errors.last_run
    for steps in product((F, P, R), repeat=num_steps - 1):
        steps = (F, *steps)
        if any(all(s is R for s in steps[i : i + longest_run + 1]) for i in range(num_steps - longest_run)):
            continue
        error = np.zeros(2)
        for step, kind in enumerate((*steps, None)):
            before = tuple(earlier for earlier in range(step) if steps[earlier] is not R)[-order - 1 :]
            full = max((earlier for earlier in range(step) if steps[earlier] is F), default=0)
            if kind is None:
                error += remembered(last_run, full, before)
            elif kind is not R and step:
                error += remembered(to_full if kind is F else to_partial, full, before, step)
        # What n PARTIAL steps are off by adds up to n of their squares, and n (n - 1) products.
        number = steps.count(P)
        repeated = 1 if number < 2 else (number + errors.correlation * number * (number - 1)) / number
        yield steps, float(error[0] + repeated * error[1])


@pytest.mark.parametrize(
    ("num_steps", "order", "longest_run"),
    [(1, 0, 3), (2, 0, 3), (7, 0, 12), (8, 0, 2), (7, 1, 12), (7, 1, 1), (6, 2, 3)],
)
def test_no_schedule_is_better_than_the_one_found(num_steps, order, longest_run):
    for seed, correlation in ((0, 0.0), (1, 0.4), (2, 1.0)):
        errors = RandomErrors(seed, correlation=correlation)
        costs = StepCosts(1.0, 0.1 + 0.6 * errors.draw(0)[0], 0.05 * errors.draw(1)[0])
        found = [
            (steps, error, costs.of(steps.count(F), steps.count(P), num_steps))
            for steps, error in brute_force(errors, num_steps, order, longest_run)
        ]
        for factor in (1.0, 1.3, 1.9, 2.7, 4.0):
            allowed = [entry for entry in found if entry[2] <= num_steps / factor + 1e-9 and np.isfinite(entry[1])]
            settings = {"order": order, "longest_run": longest_run}
            if not allowed:
                with pytest.raises(PlanError, match="faster than FULL"):
                    shortest(errors, costs, num_steps, Budget(factor=factor), **settings)
                continue
            steps = shortest(errors, costs, num_steps, Budget(factor=factor), **settings)
            least = min(error for _, error, _ in allowed)
            assert steps in [entry[0] for entry in allowed]
            assert total_error(errors, steps, order) == pytest.approx(least, abs=1e-12)
            bound = least + 1e-9
            steps = shortest(errors, costs, num_steps, Budget(error=bound**0.5), **settings)
            assert total_error(errors, steps, order) <= bound
            cheapest = min(cost for _, error, cost in found if error <= bound)
            assert costs.of(steps.count(F), steps.count(P), num_steps) == pytest.approx(cheapest)


@pytest.mark.parametrize("costs", [StepCosts(1.0, 0.5, 0.125), StepCosts(1.0, 0.25, 0.375), StepCosts(0.5, 0.5, 0.75)])
@pytest.mark.parametrize("order", [0, 1])
def test_of_equals_the_better_is_found(order, costs):
    """Errors are whole numbers, some of FULL steps infinite; REUSE may be dearer than the others."""

    class Whole(RandomErrors):
        def draw(self, *key):
            found = np.floor(3 * super().draw(*key))
            return np.full(2, np.inf) if key[0] == 2 and found[0] == found[1] == 2 else found

    for seed in range(3):
        errors = Whole(seed, correlation=0.5)
        found = [
            (error, costs.of(steps.count(F), steps.count(P), 6))
            for steps, error in brute_force(errors, 6, order, 3)
            if np.isfinite(error)
        ]
        settings = {"order": order, "longest_run": 3}
        for time in {cost for _, cost in found}:
            steps = shortest(errors, costs, 6, Budget(factor=6 * costs.full / time), **settings)
            reached = total_error(errors, steps, order), costs.of(steps.count(F), steps.count(P), 6)
            assert reached == min(entry for entry in found if entry[1] <= time)
        for bound in {error for error, _ in found}:
            steps = shortest(errors, costs, 6, Budget(error=bound**0.5), **settings)
            reached = costs.of(steps.count(F), steps.count(P), 6), total_error(errors, steps, order)
            assert reached == min(entry[::-1] for entry in found if entry[0] <= bound)


def test_the_total_error_of_a_schedule_is_the_sum_of_its_steps():
    errors = RandomErrors(7, correlation=0.3)
    for order in (0, 1):
        for steps, error in brute_force(errors, 6, order, 3):
            assert total_error(errors, steps, order) == pytest.approx(error)


def test_budgets():
    assert Budget.parse("3x") == Budget(factor=3)
    assert Budget.parse("2.5%") == Budget(error=0.025)
    for text in ("3", "x", "0x", "-1x", "three", "1e9", ""):
        with pytest.raises(PlanError, match="time factor such as 3x"):
            Budget.parse(text)
    costs = StepCosts(1.0, 0.5, 0.01)
    assert shortest(RandomErrors(0), costs, 5, Budget(factor=1)) is not None
    with pytest.raises(PlanError, match="keeps the error below"):
        shortest(RandomErrors(0), costs, 5, Budget(error=0.0))
    for factor in (60, 99, 101, 1e6):
        with pytest.raises(PlanError, match="at most 14 REUSE steps in a row"):
            shortest(RandomErrors(0), costs, 5, Budget(factor=factor))


def velocities(timesteps, degree=3, seed=0):
    """`[3, S, D]`: polynomials of the timestep with random coefficients, by token kind."""
    coefficients = np.random.default_rng(seed).normal(size=(3, degree + 1, 40))
    return np.einsum("sp,kpd->ksd", (timesteps[:, None] / 1000) ** np.arange(degree + 1), coefficients)


def calibration_of(timesteps, share=0.25, degree=3):
    """A calibration of known velocities, whose PARTIAL steps are off by `share` of what REUSE is off by."""
    v = velocities(timesteps, degree)
    v /= np.sqrt((v**2).sum(axis=2).mean(axis=1))[:, None, None]
    sources, offsets = np.array([0, 3, len(timesteps) - 2]), np.array([1, 2, 5])
    empty = np.zeros((3, 3, 3))
    known = Calibration(timesteps, np.zeros((3, len(timesteps), len(timesteps))), sources, offsets, empty[None])
    off = empty.copy()
    for a, source in enumerate(sources):
        for b, offset in enumerate(offsets):
            off[:, a, b] = share**2 * ((v[:, source] - v[:, known.target(source, offset)]) ** 2).sum(axis=1)
    gram = np.einsum("ksd,ktd->kst", v, v)
    known = known.add("a", Measured(gram, off, np.array([True, True, True])))
    return replace(known, costs=Costs(2.0, 0.02, np.array([0.25, 0.5]), np.array([0.6, 1.1]))), v


def relative(estimate, truth):
    return np.linalg.norm(estimate - truth, axis=-1) / np.linalg.norm(truth, axis=-1)


def test_recorded_errors_are_those_of_the_velocities():
    timesteps = np.linspace(1000, 30, STEPS)
    known, v = calibration_of(timesteps)
    assert known.reuse_errors()[:, 2, 5] == pytest.approx(relative(v[:, 2], v[:, 5]))
    assert known.partial_errors()[:, 3, 8] == pytest.approx(0.25 * relative(v[:, 3], v[:, 8]))
    assert np.isinf(known.partial_errors()[:, 3, [1, 2, 3]]).all()


def test_in_few_steps_errors_go_on_as_they_were_measured_last():
    """A share of what REUSE is off by, on a line over the offset, and never more than all of it. Not in many steps."""
    timesteps = np.linspace(1000, 30, STEPS)
    known, v = calibration_of(timesteps, share=0.1)
    last = int(known.offsets[-1])
    rising = replace(known, partial=known.partial * known.offsets**2)  # shares of 0.1 times the offset
    assert last + 1 < FEW_STEPS < STEPS - 1
    assert np.isinf(rising.partial_errors()[:, 0, FEW_STEPS + 1 :]).all()
    for target in range(1, FEW_STEPS + 1):
        share = min(0.1 * target, 1) if target > last else 0.1 * target
        assert rising.partial_errors()[:, 0, target] == pytest.approx(share * relative(v[:, 0], v[:, target]))


def moves(v, timesteps):
    """`[S, D]`: what each step moves the latents by, of a path of length 1."""
    return v * -np.diff([*timesteps, 0.0])[:, None] / timesteps[0]


def runs(errors, full, computed, stops):
    """`[stops, 2]` to FULL and to PARTIAL steps, from one history."""
    many = len(stops)
    return errors.runs(np.full(many, full), np.tile(computed, (many, 1)), np.array(stops))


def test_what_a_run_leaves_wrong_without_correction():
    timesteps = np.linspace(1000, 30, STEPS)
    known, v = calibration_of(timesteps)
    errors, m = RecordedErrors(known, timesteps), [moves(kind, timesteps) for kind in v]
    lengths = errors.lengths[:, None]

    def repeated(kind, source, stop):
        return ((m[kind][source:stop] - lengths[source:stop] * v[kind, source]).sum(axis=0) ** 2).sum()

    (to_full, nothing), (to_partial, own) = (found.T for found in runs(errors, 4, (4,), [6, 8]))
    assert not nothing.any()
    assert not own.any()  # of the step that ends the run: it counts in the run that begins with it
    assert to_full == pytest.approx([(repeated(0, 4, stop) + repeated(2, 4, stop)) / 2 for stop in (6, 8)])
    assert to_partial == pytest.approx([repeated(0, 4, stop) / 2 for stop in (6, 8)])
    # After a PARTIAL step, its own error is repeated too.
    noise = (0.25 * relative(v[0, 4], v[0, 6])) ** 2 * (v[0, 6] ** 2).sum() * errors.lengths[6:9].sum() ** 2
    to_full, _ = runs(errors, 4, (6,), [9])
    assert to_full[0] == pytest.approx([(repeated(0, 6, 9) + repeated(2, 4, 9)) / 2, noise / 2])
    last = errors.last_runs(np.array([4]), np.array([[4]]))[0]
    assert last == pytest.approx([(repeated(0, 4, STEPS) + repeated(2, 4, STEPS)) / 2, 0])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fitted", [False, True])
def test_prediction_has_no_error_on_polynomials_of_its_degree(order, fitted):
    timesteps = np.linspace(1000, 30, STEPS)
    known, _ = calibration_of(timesteps, degree=order)
    computed = (3, 4, 5)[-(order + 1) :]
    exact = RecordedErrors(known, timesteps, Prediction(order, fitted))
    lower = RecordedErrors(known, timesteps, Prediction(order - 1, fitted))
    missed, of_lower = (runs(e, 5, c, [8])[1][0, 0] for e, c in ((exact, computed), (lower, computed[1:])))
    # The ridge of the regression keeps fitted weights from being exact.
    assert missed < (0.02 if fitted else 1e-9) * of_lower


def test_a_step_that_corrects_leaves_less_than_one_that_does_not():
    timesteps = np.geomspace(1000, 30, STEPS)
    known, _ = calibration_of(timesteps)
    predicts, corrects = (RecordedErrors(known, timesteps, Prediction(1, True, c)) for c in (False, True))
    for stops in ([6], [9]):
        for plain, better in zip(runs(predicts, 4, (2, 4), stops), runs(corrects, 4, (2, 4), stops), strict=True):
            assert better.sum() < 0.5 * plain.sum()


def test_a_step_of_no_length_leaves_nothing_wrong():
    """A solver that stays at a time, or ends at 0 before its last step."""
    timesteps = np.array([1000.0, 800, 800, 500, 250, 0])
    known, _ = calibration_of(np.linspace(1000, 30, STEPS))
    known = replace(known, probes=np.array([1, 5]), log_amplification=np.zeros((3, 2)), sensitivity=np.ones((3, 2)))
    errors = RecordedErrors(known, timesteps, Prediction(1, True, True))
    assert np.isfinite(total_error(errors, [F, R, F, R, R, F], 1))


@pytest.mark.parametrize("sways", [0.0, 0.1, 1.5])
def test_an_output_is_off_where_predictions_led_the_latents_astray(sways):
    """Steps 4 to 7 repeat an output. That of 8 is off, some way: it adds to the latents `sways` of their error."""
    timesteps, (start, stop) = np.geomspace(1000, 30, STEPS), (4, 8)
    _, v = calibration_of(timesteps)
    v, lengths = v[0], -np.diff([*timesteps, 0.0]) / timesteps[0]
    aside = np.linalg.svd(v)[2][-1]  # where no output lies
    outputs = Outputs(v @ v.T, lengths, np.full(STEPS, sways))
    points, none = np.array([[start]]), np.zeros((1, 1))
    weights, missed, passed_on = outputs.correct(np.array([stop]), points, none, np.zeros(1))
    assert passed_on == 0

    def left(weights):
        """By running the steps."""
        repeated = moved(outputs, np.array([stop]), points, none)[0, 0]
        truth = (lengths[start:stop, None] * v[start:stop]).sum(axis=0)
        astray = repeated * v[start] - truth
        off = sways / lengths[stop] * np.linalg.norm(astray) * aside
        corrected = weights @ np.stack([v[start], v[stop] + off]) - truth
        return ((corrected + lengths[stop] * off) ** 2).sum()

    assert missed == pytest.approx(left(weights[0]))
    assert all(left(weights[0] + step) >= left(weights[0]) for step in 0.02 * np.array([[0, 1], [0, -1], [1, 0]]))
    unaware = Outputs(v @ v.T, lengths, np.zeros(STEPS)).correct(np.array([stop]), points, none, np.zeros(1))[0]
    assert left(unaware[0]) > left(weights[0]) if sways else np.array_equal(unaware, weights)


def test_errors_that_are_alike_do_not_average_out():
    """A sum of two outputs whose errors are one and the same is off by twice that error, a difference by none of it."""
    noise, weights = np.array([[4.0, 4.0], [4.0, 4.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
    for correlation, expected in ((0.0, [8, 8]), (0.5, [12, 4]), (1.0, [16, 0])):
        outputs = Outputs(np.eye(3), np.ones(3), np.zeros(3), correlation)
        assert outputs.passed_on(noise, weights) == pytest.approx(expected)


def test_fewer_partial_steps_where_their_errors_are_alike():
    timesteps = np.linspace(1000, 30, STEPS)
    known, _ = calibration_of(timesteps, share=0.9)
    known = replace(known, costs=replace(known.costs, partial=np.array([0.02, 0.03])))
    counts = []
    for correlation in (0.0, 1.0):
        alike = replace(known, partial_correlation=np.full((1, 3), correlation))
        steps = optimal_schedule(alike, "3x", timesteps, 0.25)
        counts.append(steps.count(P))
        found = expect(alike, steps, timesteps, 0.25).error
        for other in ("3x", "4x", "6x"):
            searched = optimal_schedule(known, other, timesteps, 0.25)
            assert expect(alike, searched, timesteps, 0.25).error >= found * (1 - 1e-9)
    assert counts[1] < counts[0]


@pytest.mark.parametrize("num_steps", [7, 30])
def test_other_numbers_of_steps_are_interpolated(num_steps):
    timesteps = np.linspace(1000, 20, 50)
    known, v = calibration_of(timesteps)
    asked = np.linspace(1000, 20, num_steps)
    truth = velocities(asked) * (v / velocities(timesteps)).mean(axis=(1, 2), keepdims=True)
    expected = relative(truth[:, 0], truth[:, -1])
    assert known.reuse_errors(asked)[:, 0, -1] == pytest.approx(expected, rel=0.02)
    assert known.timesteps_for(50) is known.timesteps
    assert (np.diff(known.timesteps_for(num_steps)) < 0).all()


def test_a_plan_follows_the_calibration():
    known, _ = calibration_of(np.linspace(1000, 30, STEPS))
    mask = np.zeros((2, 4, 4), dtype=bool)
    mask[:, :2, :2] = True
    settings = {"num_inference_steps": STEPS, "multiple": 1, "margin": 0, "context_ratio": 0}
    plan = Plan.from_mask(mask, (2, 4, 4), schedule="optimal:3x", calibration=known, **settings)
    assert plan.steps == optimal_schedule(known, "3x", known.timesteps, share=0.25)
    expectation = expect(known, plan.steps, known.timesteps, 0.25)
    seconds = sum({F: 2.0, P: 0.6, R: 0.02}[kind] for kind in plan.steps)
    assert expectation.seconds == pytest.approx(seconds)
    assert expectation.time_factor >= 3
    assert "error of the result" in expectation.describe()
    for schedule in ("FRR", "FRRR", "full"):
        other = Plan.from_mask(mask, (2, 4, 4), schedule=schedule, **settings)
        beside = expect(known, other.steps, known.timesteps, 0.25)
        assert beside.time_factor < 3 or beside.error >= expectation.error
    shared = Plan.from_mask(mask, (2, 4, 4), schedule="optimal:3x", calibration=known, shared_context=1, **settings)
    found = expect(known, shared.steps, known.timesteps, 0.25, shared_context=True)
    assert found.seconds == pytest.approx(sum({F: (2.0 + 0.6) / 2, P: 0.6, R: 0.02}[kind] for kind in shared.steps))
    assert found.full_seconds == expectation.full_seconds
    assert found.time_factor >= 3
    assert found.error < expectation.error  # what FULL steps save goes into more of them
    bounded = optimal_schedule(known, Budget(error=expectation.error), known.timesteps, share=0.25)
    assert expect(known, bounded, known.timesteps, 0.25).seconds <= expectation.seconds
    with pytest.raises(PlanError, match="needs a calibration"):
        Plan.from_mask(mask, (2, 4, 4), schedule="optimal:3x", **settings)
    unknown = expect(known, (F, *[P] * (STEPS - 1)), known.timesteps, 0.25)
    assert "unknown" in unknown.describe()


VARIANTS = tuple({"margin": m, "context_extrapolation": e, "context_ratio": 0.0} for m in (2.0, 1.0) for e in (0, 1))


def with_variants(shares):
    """A calibration whose variants have PARTIAL errors of these shares of what REUSE is off by."""
    timesteps = np.linspace(1000, 30, STEPS)
    each = [calibration_of(timesteps, share)[0] for share in shares]
    off = np.concatenate([known.partial for known in each])
    costs = Costs(1.0, 0.01, np.array([0.02, 0.2]), np.array([0.05, 0.3]))
    none = np.zeros((len(VARIANTS), 3))
    return replace(each[0], variants=VARIANTS, partial=off, partial_correlation=none, costs=costs)


def considered(known, budget="3x", **options):
    mask = np.zeros((4, 8, 8), dtype=bool)
    mask[1, 2:4, 2:4] = True
    make = partial(
        Plan.from_mask, mask, (4, 8, 8), num_inference_steps=STEPS, schedule=f"optimal:{budget}", calibration=known,
        multiple=1, context_ratio=0.0,
    )  # fmt: skip
    return choices(make, f"optimal:{budget}", known, options)


def test_an_optimal_plan_is_the_best_of_the_variants_calibrated():
    for shares in ((0.02, 0.9, 0.9, 0.9), (0.9, 0.9, 0.9, 0.02), (0.9, 0.02, 0.9, 0.9)):
        known = with_variants(shares)
        best, *others = considered(known)
        assert best.options == {name: VARIANTS[np.argmin(shares)][name] for name in ("margin", "context_extrapolation")}
        assert best.plan.context_extrapolation == best.options["context_extrapolation"]
        assert len(others) == 3
        assert all(best.expectation.error <= other.expectation.error for other in others)
        assert best.expectation.time_factor >= 3
    # Alike in error, the smaller margin costs less, and what that saves buys a better schedule.
    assert considered(with_variants((0.2, 0.2, 0.2, 0.2)))[0].options["margin"] == 1
    bounded = considered(with_variants((0.2, 0.2, 0.2, 0.2)), "2%")
    assert bounded[0].expectation.error <= 0.02
    assert bounded[0].expectation.seconds == min(choice.expectation.seconds for choice in bounded)


def test_what_is_given_is_not_chosen():
    known = with_variants((0.4, 0.4, 0.4, 0.1))
    assert [choice.options for choice in considered(known, margin=2.0, context_extrapolation=0)] == [{}]
    assert {choice.options["margin"] for choice in considered(known, context_extrapolation=0)} == {1, 2}
    assert all(set(choice.options) == {"margin"} for choice in considered(known, context_extrapolation=0))
    merged = considered(known, merged_ratio=0.5, merging="kmeans")
    assert {choice.options["context_extrapolation"] for choice in merged} == {0}, "the other has no plan"
    with pytest.raises(PlanError, match="kmeans"):
        considered(known, merged_ratio=0.5, merging="kmeans", context_extrapolation=1)
    with pytest.raises(PlanError, match="90x faster"):
        considered(known, "90x")


@pytest.mark.parametrize("asked", [-1, 0, 1])
def test_what_is_expected_is_of_the_plan_as_it_is(asked):
    """Where an option says where the plan can, what it came to counts."""
    known = with_variants((0.9, 0.1, 0.9, 0.9))
    known = replace(known, variants=tuple({"margin": 2.0, "context_motion": moves} for moves in (0, 1, 0, 0)))
    (choice,) = considered(known, margin=2.0, context_motion=asked, context_ratio=0.05)
    own = known.like({"margin": 2.0, "context_motion": abs(asked)})
    share = choice.plan.num_active / choice.plan.num_tokens
    again = expect(own, choice.plan.steps, known.timesteps, share, choice.plan.prediction)
    assert choice.plan.context_motion == abs(asked)
    assert choice.expectation == again


def test_kinds_that_no_clip_has_do_not_count():
    known, _ = calibration_of(np.linspace(1000, 30, STEPS))
    present = np.array([True, False, True])
    empty = replace(known, gram=0 * known.gram, partial=0 * known.partial, counts=0 * known.counts, clips=())
    shown, one = present[:, None, None], np.array([False, True, False])[:, None, None]
    alone = empty.add("a", Measured(known.gram * shown, known.partial * shown, present))
    errors, all_kinds = RecordedErrors(alone, alone.timesteps), RecordedErrors(known, known.timesteps)
    for some, every in zip(runs(errors, 2, (2,), [4, 6]), runs(all_kinds, 2, (2,), [4, 6]), strict=True):
        assert some == pytest.approx(every)  # generative tokens and context stand for the others
    only = empty.add("a", Measured(known.gram * one, known.partial * one, one.ravel()))
    errors = RecordedErrors(only, only.timesteps)
    to_full, to_partial = runs(errors, 2, (2,), [4])
    assert to_full == pytest.approx(2 * to_partial)
    with pytest.raises(CalibrationError, match="no clip"):
        RecordedErrors(empty, empty.timesteps)
    with pytest.raises(CalibrationError, match="no step costs"):
        optimal_schedule(replace(known, costs=None), "2x", known.timesteps, 0.5)


def test_costs_between_what_was_timed():
    costs = Costs(1.0, 0.0, np.array([0.1, 0.5]), np.array([0.2, 0.6]))
    assert [costs.partial_at(share) for share in (0.05, 0.1, 0.3, 0.5, 0.75, 1.0)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.8, 1.0]
    )
