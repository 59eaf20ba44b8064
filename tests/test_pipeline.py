"""The real pipeline classes end to end, on a tiny checkpoint: plan_for, sessions, guidance, experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile.edit.editing import EditRequest, Run, load_pipeline, make_plan, run_compiled, run_hetcache
from hetcache_compile.edit.media import to_pictures
from hetcache_compile.reference.demo import save_random_checkpoint
from hetcache_compile.sessions.stats import Stats

FRAMES, SIZE, STEPS = 5, 64, 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return folder


@pytest.fixture
def pipe(checkpoint):
    torch._dynamo.reset()
    return load_pipeline(checkpoint, torch.float32, "cpu")


@pytest.fixture
def mask():
    mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    mask[:, 20:30, 18:40] = True
    return mask


def call(pipe, mask, **kwargs):
    video = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    arguments = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "video": to_pictures(video),
        "mask": to_pictures(mask),
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **kwargs}).frames


def plan_of(pipe, mask, **kwargs):
    arguments = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "num_inference_steps": STEPS, "multiple": 1}
    return hetcache.plan_for(pipe, mask=mask, **{**arguments, **kwargs})


def compile_with_hetcache(pipe):
    options = {"inner": "eager"}
    pipe.transformer = torch.compile(pipe.transformer, backend="hetcache", options=options)
    if pipe.transformer_2 is not None:
        pipe.transformer_2 = torch.compile(pipe.transformer_2, backend="hetcache", options=options)


def test_all_full_equals_the_uncompiled_pipeline_bit_for_bit(pipe, mask):
    expected = call(pipe, mask)
    plan = plan_of(pipe, mask, schedule="full")
    compile_with_hetcache(pipe)
    with hetcache.session(plan) as session:
        actual = call(pipe, mask)
    assert session.stats.steps == {"FULL": 2 * STEPS, "PARTIAL": 0, "REUSE": 0}
    assert torch.equal(actual, expected)


def test_a_mixed_schedule_counts_its_steps_and_moves_the_result(pipe, mask):
    expected = call(pipe, mask)
    plan = plan_of(pipe, mask, schedule=["F", "P", "R", "P", "F"])
    compile_with_hetcache(pipe)
    with hetcache.session(plan) as session:
        actual = call(pipe, mask)
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 4, "REUSE": 2}
    error = (actual - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.1
    assert torch.equal(call(pipe, mask), expected), "outside a session the compiled model is the plain one"


@pytest.mark.parametrize("stop", [0, *(pytest.param(stop, marks=pytest.mark.wide) for stop in (1, 2))])
def test_an_edit_after_a_cancelled_one(pipe, mask, stop):
    """The pipeline's loop over steps begins anew, and nothing is left of the one before."""
    plan = plan_of(pipe, mask, schedule=["F", "R", "P", "R", "F"])
    compile_with_hetcache(pipe)

    def cancel(_pipe, step, _time, tensors):
        if step == stop:
            raise KeyboardInterrupt
        return tensors

    def again():
        return call(pipe, mask, generator=torch.Generator().manual_seed(1))

    with hetcache.session(plan, strict=True):
        expected = again()
    with hetcache.session(plan, strict=True) as session:
        with pytest.raises(KeyboardInterrupt):
            call(pipe, mask, callback_on_step_end=cancel)
        before = len(session.stats.kinds)
        actual = again()
    assert "".join(kind.letter for kind in session.stats.kinds[before:]) == "FFRRPPRRFF"
    assert torch.equal(actual, expected)


def test_two_edits_in_one_session_do_not_see_each_other(pipe, mask):
    plan = plan_of(pipe, mask, schedule=["F", "P", "R", "P", "F"])
    compile_with_hetcache(pipe)
    with hetcache.session(plan):
        first = call(pipe, mask)
        call(pipe, mask, generator=torch.Generator().manual_seed(1))
        again = call(pipe, mask)
    assert torch.equal(first, again)


@pytest.mark.wide
def test_reference_images_add_frames_in_front(pipe, mask):
    reference = to_pictures(np.full((1, SIZE, SIZE, 3), 90, dtype=np.uint8))
    expected = call(pipe, mask, reference_images=reference)
    plan = plan_of(pipe, mask, num_reference_images=1, schedule="full")
    assert plan.grid == (3, 4, 4)
    assert not plan.tokens_of(hetcache.TokenKind.GENERATIVE)[0].any()
    compile_with_hetcache(pipe)
    with hetcache.session(plan):
        assert torch.equal(call(pipe, mask, reference_images=reference), expected)


def test_two_experts_keep_separate_caches(pipe, mask):
    """Wan 2.2's layout: another model takes over in the middle; its first call must be FULL."""
    second = type(pipe.transformer)(**pipe.transformer.config).eval()
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.9)
    expected = call(pipe, mask)
    plan = plan_of(pipe, mask, schedule=["F", "R", "R", "R", "R"])
    compile_with_hetcache(pipe)
    with hetcache.session(plan) as session:
        call(pipe, mask)
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 0, "REUSE": 6}
    with hetcache.session(plan.with_schedule("full")):
        assert torch.equal(call(pipe, mask), expected)


def test_an_error_in_the_middle_of_an_edit_leaves_nothing_behind(pipe, mask):
    expected = call(pipe, mask)
    plan = plan_of(pipe, mask, schedule="full")
    compile_with_hetcache(pipe)

    def fail(_pipe, step, *_):
        if step == 2:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"), hetcache.session(plan):
        call(pipe, mask, callback_on_step_end=fail)
    assert torch.equal(call(pipe, mask), expected)
    with hetcache.session(plan) as session:
        assert torch.equal(call(pipe, mask), expected)
    assert session.stats.steps["FULL"] == 2 * STEPS


def test_plan_for_reads_the_pipeline_and_leaves_it_alone(pipe, mask):
    before = pipe.scheduler.num_inference_steps
    plan = plan_of(pipe, mask, num_inference_steps=7, schedule="teacache:0.05")
    assert pipe.scheduler.num_inference_steps == before
    assert plan.grid == (2, 4, 4)
    assert len(plan.steps) == 7
    assert plan.distances[0] == 0
    assert (plan.distances[1:] > 0).all()
    assert (np.diff(plan.timesteps) < 0).all()
    with pytest.raises(hetcache.PlanError, match="multiples of 16"):
        plan_of(pipe, mask, height=SIZE + 8)
    with pytest.raises(hetcache.MaskError, match=r"needs \(5, 64, 64\) pixels"):
        plan_of(pipe, mask[:, :32])


def test_plan_for_takes_the_very_mask_of_the_pipeline(pipe, mask):
    expected = plan_of(pipe, mask).active_index
    grid = np.zeros((2, 4, 4), dtype=bool)
    grid[:, 1, 1:3] = True
    still = to_pictures(mask[:1])[0]
    for same in (to_pictures(mask), still, torch.from_numpy(mask)[None, None].float(), mask[..., None], grid):
        assert np.array_equal(plan_of(pipe, same).active_index, expected)


def test_plan_for_takes_a_compiled_pipeline(pipe, mask):
    plan = plan_of(pipe, mask)
    compile_with_hetcache(pipe)
    assert np.array_equal(plan_of(pipe, mask).active_index, plan.active_index)


def test_a_plan_for_another_size_is_an_error(pipe, mask):
    wide = np.concatenate([mask, mask], axis=2)
    plan = plan_of(pipe, wide, width=2 * SIZE)
    compile_with_hetcache(pipe)
    with pytest.raises(hetcache.GridMismatchError, match=r"\(2, 4, 8\).*\(2, 4, 4\)"), hetcache.session(plan):
        call(pipe, mask)


@pytest.mark.wide
def test_compared_runs_leave_the_pipeline_as_it_was(pipe, mask):
    model = pipe.transformer
    video = np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    request = EditRequest(video, mask, "a cat", num_inference_steps=STEPS, max_sequence_length=16)
    plan = make_plan(pipe, request, "full")
    stages = []
    cached = run_hetcache(pipe, request, plan, "eager", lambda *state: stages.append(state))
    uncached = run_compiled(pipe, request, "eager", lambda *state: stages.append(state))
    assert pipe.transformer is model
    assert not model._forward_hooks
    assert np.array_equal(cached.frames, uncached.frames)
    assert len(cached.seconds) == len(uncached.seconds) == 2 * STEPS
    assert ("hetcache", STEPS, STEPS) in stages


def test_a_refused_graph_is_timed_as_the_plain_run_that_it_was():
    run = Run(None, [0.3, 0.1, 0.2], Stats())
    assert run.median_seconds == {"FULL": 0.2}
    assert run.total_seconds == pytest.approx(0.6)
