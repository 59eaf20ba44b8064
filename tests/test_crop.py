"""Crop and stitch: the box, the edit of what is in it, and when a plan is told that it would be better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetcache_compile import Plan
from hetcache_compile.bench.crop import box_of
from hetcache_compile.bench.methods import FULL, parse_method, parse_methods
from hetcache_compile.bench.quality import Bench, Settings, bench_quality, frames_file, load_frames
from hetcache_compile.edit.editing import call_arguments, load_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.errors import MaskError, PlanError
from hetcache_compile.pipelines.observe import first_call
from hetcache_compile.plan.crop import Box, crop_advice
from hetcache_compile.plan.schedule import StepKind
from hetcache_compile.reference.demo import save_random_checkpoint

FRAMES, HEIGHT, WIDTH = 5, 64, 96
SETTINGS = Settings("tiny", num_inference_steps=2, max_sequence_length=16, inner="eager", timed=False)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return load_pipeline(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def clip():
    video = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), dtype=bool)
    mask[:2, 20:30, 33:44] = True
    mask[2:, 20:30, 40:52] = True
    return Clip("clip", np.where(mask[..., None], 128, video).astype(np.uint8), mask, "a cat", video)


def nothing(*_):
    pass


@pytest.mark.parametrize(
    ("surroundings", "expected"),
    [(0, Box(16, 32, 32, 64)), (0.5, Box(0, 48, 16, 64)), (1.0, Box(0, 48, 0, 80)), (9, Box(0, HEIGHT, 0, WIDTH))],
)
def test_the_box_holds_the_mask_of_all_frames_and_ends_at_tokens(clip, surroundings, expected):
    assert Box.around(clip.mask, surroundings, (16, 16)) == expected
    with pytest.raises(MaskError, match="empty"):
        Box.around(np.zeros_like(clip.mask), surroundings, (16, 16))


def test_what_is_cut_and_pasted_is_the_video_again(clip):
    box = Box.around(clip.mask, 0.5, (16, 16))
    assert box.cut(clip.video).shape == (FRAMES, 48, 48, 3)
    np.testing.assert_array_equal(box.paste(box.cut(clip.truth), clip.truth), clip.truth)
    changed = box.paste(255 - box.cut(clip.truth), clip.truth) != clip.truth
    assert changed[:, :48, 16:64].all()
    assert changed.sum() == box.cut(clip.truth).size


def test_the_noise_is_that_of_the_whole_video_there(pipe, clip):
    bench = Bench(pipe, SETTINGS, nothing)
    whole, part = (bench.request(clip, parse_method(name)) for name in (FULL, "crop:0.5"))
    assert part.mask.shape == (FRAMES, 48, 48)
    noise = {
        name: first_call(pipe, call_arguments(pipe, request)).arguments["hidden_states"]
        for name, request in (("whole", whole), ("part", part))
    }
    torch.testing.assert_close(noise["part"], noise["whole"][..., 0:6, 2:8], rtol=0, atol=0)
    assert box_of(pipe, whole, 0.5) == Box(0, 48, 16, 64)


@pytest.mark.wide
def test_a_crop_of_everything_is_the_uncached_result_and_other_crops_leave_the_rest_alone(pipe, clip, tmp_path):
    methods = parse_methods("crop:9,crop:0")
    cells = bench_quality(pipe, [clip], methods, replace(SETTINGS, timed=True), tmp_path, nothing)["cells"][clip.name]
    frames = {name: load_frames(frames_file(tmp_path, clip.name, name)) for name in cells}
    np.testing.assert_array_equal(frames["crop:9"], frames[FULL])
    box = Box(16, 32, 32, 64)
    np.testing.assert_array_equal(box.paste(box.cut(clip.video), frames["crop:0"]), clip.video)
    assert (box.cut(frames["crop:0"]) != box.cut(clip.video)).any()
    assert cells["crop:0"]["calls"] == cells[FULL]["calls"]
    assert cells["crop:0"]["speedup"] > 0
    assert cells["crop:0"]["full_over_compiled"] is None, "the plain calls beside are of the whole clip"
    assert cells["crop:0"]["num_tokens"] == 2 * 1 * 2


@pytest.mark.wide
def test_a_crop_may_follow_a_plan(pipe, clip, tmp_path):
    methods = parse_methods("crop:0.5,crop:0.5+F,crop:0.5+FR")
    cells = bench_quality(pipe, [clip], methods, replace(SETTINGS, num_inference_steps=3), tmp_path, nothing)["cells"]
    frames = {name: load_frames(frames_file(tmp_path, clip.name, name)).astype(int) for name in cells[clip.name]}
    assert np.abs(frames["crop:0.5+F"] - frames["crop:0.5"]).max() <= 1
    assert np.abs(frames["crop:0.5+FR"] - frames["crop:0.5"]).max() > 1
    assert cells[clip.name]["crop:0.5+F"]["num_tokens"] == 2 * 3 * 3


@pytest.mark.parametrize("text", ["crop:", "crop:wide", "crop:-1", "crop:0.5+crop:0.5", "crop:0.5+warp"])
def test_a_crop_that_is_none_is_refused(text):
    with pytest.raises(PlanError):
        parse_method(text)


def test_a_crop_may_have_a_schedule_or_fewer_steps():
    planned, fewer = parse_method("crop:0.5+FP+margin=1"), parse_method("crop:1+steps:3")
    assert (planned.surroundings, planned.schedule, planned.options) == (0.5, "FP", {"margin": 1})
    assert (fewer.surroundings, fewer.schedule, fewer.steps) == (1.0, None, 3)


def test_a_crop_is_better_where_it_computes_fewer_tokens(clip):
    """The crop of `clip` is 48 x 48 of 64 x 96 pixels, 0.375 of them: as many as 3 of 8 FULL steps compute."""

    def advice(letters):
        schedule = [next(kind for kind in StepKind if kind.letter == letter) for letter in letters]
        plan = Plan.from_mask(clip.mask, (2, 4, 6), num_inference_steps=8, schedule=schedule, margin=0)
        return crop_advice(plan, clip.mask, (16, 16))

    assert "38% of the picture" in advice("FFFFRRRR")
    assert "all 8 steps of such a crop compute 144 tokens, this plan 192" in advice("FFFFRRRR")
    assert advice("FFFRRRRR") is None
    assert advice("FFFPRRRR") is not None


@pytest.mark.parametrize(("schedule", "advised"), [("F", True), ("FRRRRRRR", False)])
def test_the_command_says_when_a_crop_is_better(clip, schedule, advised, hetcache_command, tmp_path):
    np.save(tmp_path / "mask.npy", clip.mask)
    size = ("--height", HEIGHT, "--width", WIDTH, "--num-frames", FRAMES, "--steps", 8, "--schedule", schedule)
    mask, out = tmp_path / "mask.npy", tmp_path / "a.hetplan"
    status, printed, _ = hetcache_command("plan", "--mask", mask, "-o", out, "--margin", 0, *size)
    assert status == 0
    assert ("to edit the crop and put it back is probably better" in printed) == advised
