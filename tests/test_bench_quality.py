"""`hetcache bench quality` on a tiny checkpoint: what it measures, what it writes, and how it goes on after a kill."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hetcache_compile.bench.methods import parse_method, parse_methods
from hetcache_compile.bench.quality import (
    RESULT,
    Bench,
    Settings,
    bench_quality,
    frames_file,
    load_frames,
    open_result,
    save_result,
)
from hetcache_compile.bench.quality_report import HEADER, busiest, summarise, write_report
from hetcache_compile.edit.editing import EditRequest, load_pipeline, run_compiled
from hetcache_compile.edit.media import Clip, read_video
from hetcache_compile.edit.metrics import METRICS, REGIONS, compare
from hetcache_compile.errors import HetCacheError, InputFileError, MissingExtraError, PlanError
from hetcache_compile.reference.demo import demo_clip, save_random_checkpoint

FRAMES, SIZE = 5, 64
METHODS = parse_methods("FPRR,F,steps:2")
SETTINGS = Settings("tiny", num_inference_steps=4, max_sequence_length=16, inner="eager", context_ratio=0.0, margin=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    torch._dynamo.reset()
    return load_pipeline(checkpoint, torch.float32, "cpu")


def clip(name, left, truth=True):
    video = read_video(demo_clip(), FRAMES, SIZE, SIZE, start=142)
    mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    mask[:, 16:32, left : left + 16] = True
    return Clip(name, np.where(mask[..., None], 127, video).astype(np.uint8), mask, "a cat", video if truth else None)


CLIPS = (clip("one: left", 0), clip("two", 32, truth=False))


class Watch:
    """A progress function that remembers what was begun, and stops at the start of a cell."""

    def __init__(self, stop_at=None):
        self.stop_at, self.begun = stop_at, []

    def __call__(self, stage, step, steps):
        if (stage, step) == ("cells", self.stop_at):
            raise KeyboardInterrupt
        if step == 0 and stage != "cells":
            self.begun.append(stage)


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """A bench that was killed before its seventh cell and went on: its folder, its result, what the two runs began."""
    out = tmp_path_factory.mktemp("bench")
    first, second = Watch(stop_at=6), Watch()
    with pytest.raises(KeyboardInterrupt):
        bench_quality(pipe, CLIPS, METHODS, SETTINGS, out, first)
    return out, bench_quality(pipe, CLIPS, METHODS, SETTINGS, out, second), (first.begun, second.begun)


def test_methods_are_schedules_or_fewer_steps_and_full_comes_first():
    methods = parse_methods("balanced, teacache:0.1,steps:20,full,balanced")
    assert [method.name for method in methods] == ["full", "balanced", "teacache:0.1", "steps:20"]
    assert [method.schedule for method in methods] == [None, "balanced", "teacache:0.1", None]
    assert [method.steps for method in methods] == [None, None, None, 20]


def test_a_schedule_may_have_options_of_the_plan():
    method = parse_method("teacache:0.1+o0+margin=1.5+cached_ratio=1")
    assert method.schedule == "teacache:0.1"
    assert method.options == {"extrapolation": 0, "margin": 1.5, "cached_ratio": 1}
    assert isinstance(method.options["cached_ratio"], int)
    assert parse_method("optimal:3x").needs_calibration
    for text, message in (
        ("F+warp=1", "no option 'warp': give one of margin, margin_ratio"),
        ("F+margin=wide", "margin must be a number, got 'wide'"),
        ("F+extrapolation=0.5", "extrapolation must be a whole number"),
        ("F+margin", "written as in"),
        ("F+schedule=F", "no option 'schedule'"),
        ("optimal:fast", "budget"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_method(text)


def test_what_cannot_be_planned_is_told_before_anything_runs(pipe, tmp_path):
    watch = Watch()
    for text, message in (("F+margin=-1", "margin must be at least 0"), ("optimal:2x", "needs a calibration")):
        with pytest.raises(PlanError, match=message):
            bench_quality(pipe, CLIPS, parse_methods(text), SETTINGS, tmp_path, watch)
    assert watch.begun == []


def test_a_preset_brings_options_that_a_method_may_change(pipe):
    request = EditRequest(CLIPS[0].video, CLIPS[0].mask, "", num_inference_steps=4)
    bench = Bench(pipe, replace(SETTINGS, levels=32), Watch())
    slow, fast, other = (
        bench.plan(request, parse_method(text)) for text in ("paper-slow", "paper-fast", "paper-fast+margin=0+o2")
    )
    assert [plan.extrapolation for plan in (slow, fast, other)] == [0, 0, 2]
    assert slow.steps == fast.steps
    assert slow.num_active > fast.num_active > other.num_active


@pytest.mark.parametrize("text", ["warp", "steps:", "steps:0", "steps:two", "teacache:", "teacache:-1", "PRF"])
def test_a_method_that_is_none_is_refused(text):
    with pytest.raises(PlanError, match=text[:5]):
        parse_methods(text)


def test_a_killed_run_goes_on_with_the_missing_cells_and_compiles_once_for_all_clips(finished):
    out, result, (first, second) = finished
    plain, forms, run = "compiling the plain model", "compiling the forms", "denoising"
    beside = ["timing the plain model", run]
    assert first == [plain, run, forms, *beside, *beside, *beside, run, *beside]
    assert second == [plain, forms, *beside, *beside]
    cells = [result["cells"][c.name][m.name] for c in CLIPS for m in METHODS]
    assert len(cells) == 8
    assert all(cell["seconds"] > 0 for cell in cells)
    assert json.loads((out / RESULT).read_text())["cells"] == result["cells"]


def test_masks_of_about_one_size_get_the_same_budgets(pipe):
    def budgets(right, bottom):
        mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
        mask[:, :bottom, :right] = True
        request = EditRequest(CLIPS[0].video, mask, "a cat", num_inference_steps=4)
        return Bench(pipe, replace(SETTINGS, levels=4), Watch()).plan(request, parse_methods("FPRR")[1]).budgets

    assert budgets(16, 16) == budgets(32, 32) != budgets(48, 48)
    assert budgets(64, 64).num_active == 32, "a full picture has all tokens active"


def test_calls_are_those_of_the_method(finished):
    _, result, _ = finished
    calls = {name: cell["calls"] for name, cell in result["cells"]["two"].items()}
    assert calls == {
        "full": {"FULL": 8},
        "F": {"FULL": 8, "PARTIAL": 0, "REUSE": 0},
        "FPRR": {"FULL": 4, "PARTIAL": 2, "REUSE": 2},
        "steps:2": {"FULL": 4},
    }
    of_full, of_cell = (result["cells"]["two"][name] for name in ("full", "FPRR"))
    assert of_full["speedup"] == of_full["full_over_compiled"] == 1
    assert of_cell["speedup"] == pytest.approx(8 * of_cell["plain_call_seconds"] / of_cell["seconds"])
    assert of_cell["num_active"] < of_cell["num_tokens"] == 32


def test_full_is_the_uncached_pipeline_and_what_all_others_are_compared_with(finished, pipe):
    out, result, _ = finished
    one = CLIPS[0]
    request = EditRequest(one.video, one.mask, one.prompt, num_inference_steps=4, max_sequence_length=16)
    uncached = run_compiled(pipe, request, "eager", lambda *_: None).frames
    assert np.array_equal(load_frames(frames_file(out, one.name, "full")), uncached)
    cells = result["cells"][one.name]
    assert cells["full"]["fidelity"] is None
    assert all(figures["psnr_db"] is None for figures in cells["F"]["fidelity"].values()), "all FULL is identical"
    partial = load_frames(frames_file(out, one.name, "FPRR"))
    assert cells["FPRR"]["fidelity"] == compare(partial, uncached, one.mask)
    assert cells["FPRR"]["quality"] == compare(partial, one.truth, one.mask)
    assert cells["FPRR"]["fidelity"]["generative"]["psnr_db"] > 10
    assert all(cell["quality"] is None for cell in result["cells"]["two"].values())


def test_the_report_holds_a_table_a_plot_and_videos(finished):
    out, result, _ = finished
    rows = write_report(out, result, CLIPS, METHODS)
    assert [row[0] for row in rows] == ["full", "FPRR", "F", "steps:2"]
    assert all(len(row) == len(HEADER) for row in rows)
    assert rows[2][2] == rows[2][3] == "identical"
    assert rows[1][2] == f"{result['summary']['FPRR']['fidelity']['generative']['psnr_db']:.1f}"
    page = (out / "quality.md").read_text()
    assert all("| " + " | ".join(row) + " |" in page for row in rows)
    summary = json.loads((out / RESULT).read_text())["summary"]
    assert summary["full"]["speedup"] == 1
    with Image.open(out / "quality.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10
    for name, panels in (("one__left", 6), ("two", 5)):
        with av.open(str(out / f"{name}.mp4")) as container:
            assert container.streams.video[0].width == panels * SIZE
            assert sum(1 for _ in container.decode(video=0)) == FRAMES
    worst = busiest(result, CLIPS, METHODS)["full_over_compiled"]
    cells = [cell["full_over_compiled"] for by_method in result["cells"].values() for cell in by_method.values()]
    assert all(abs(math.log(worst)) >= abs(math.log(ratio)) for ratio in cells)


def test_the_summary_takes_medians_and_counts_identical_clips_as_infinite():
    def cell(speedup, psnr_db):
        figures = {"psnr_db": psnr_db, "ssim": 1.0, "flip": 0.0, "warp_error": 0.0, "flicker": None}
        return {"speedup": speedup, "fidelity": dict.fromkeys(REGIONS, figures), "quality": None}

    summary = summarise([cell(1.0, 30.0), cell(2.0, 20.0), cell(4.0, None)])
    assert summary["speedup"] == 2
    assert summary["worst_psnr_db"] == 20
    assert summary["fidelity"]["band"] == dict(zip(METRICS, (30.0, 1.0, 0.0, 0.0, None), strict=True))
    assert summarise([cell(1.0, 30.0), cell(2.0, None), cell(4.0, None)])["fidelity"]["band"]["psnr_db"] is None


def test_results_of_another_setting_model_or_clip_are_not_mixed(finished, pipe):
    out, _, _ = finished
    nothing = Watch()
    with pytest.raises(InputFileError, match=r"other settings.*another --out"):
        bench_quality(pipe, CLIPS, METHODS, replace(SETTINGS, seed=1), out, nothing)
    with pytest.raises(InputFileError, match="other clip two"):
        bench_quality(pipe, [CLIPS[0], clip("two", 16)], METHODS, SETTINGS, out, nothing)
    bias = pipe.transformer.proj_out.bias
    with torch.no_grad():
        bias += 1
    try:
        with pytest.raises(InputFileError, match="other settings"):
            bench_quality(pipe, CLIPS, METHODS, SETTINGS, out, nothing)
    finally:
        with torch.no_grad():
            bias -= 1
    assert nothing.begun == []


def test_threads_matter_to_times_only(pipe, tmp_path, monkeypatch):
    for timed in (True, False):
        out, settings = tmp_path / str(timed), replace(SETTINGS, timed=timed)
        save_result(out, open_result(out, pipe, CLIPS, settings))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 61)
            if timed:
                with pytest.raises(InputFileError, match="other threads"):
                    open_result(out, pipe, CLIPS, settings)
            else:
                assert open_result(out, pipe, CLIPS, settings)["threads"] == 61


def test_clips_that_do_not_belong_together_are_refused(pipe, tmp_path):
    one = CLIPS[0]
    small = replace(one, name="small", video=one.video[:, :32], mask=one.mask[:, :32], truth=None)
    for clips, message in (([], "no clips"), ([one, one], "names of their own"), ([one, small], "size of the first")):
        with pytest.raises(InputFileError, match=message):
            bench_quality(pipe, clips, METHODS, SETTINGS, tmp_path, Watch())
    (tmp_path / RESULT).write_text("{}")
    with pytest.raises(HetCacheError, match="no results of"):
        bench_quality(pipe, CLIPS, METHODS, SETTINGS, tmp_path, Watch())


def test_a_missing_extra_is_told_before_anything_runs(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    watch = Watch()
    with pytest.raises(MissingExtraError, match=r"hetcache-compile\[quality\]"):
        bench_quality(pipe, CLIPS, METHODS, SETTINGS, tmp_path, watch)
    assert watch.begun == []


def test_full_has_to_be_among_the_methods(pipe, tmp_path):
    with pytest.raises(PlanError, match="must be full"):
        bench_quality(pipe, CLIPS, METHODS[1:], SETTINGS, tmp_path, Watch())
