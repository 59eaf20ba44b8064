"""The front: rivals on a tiny WanVACE, and how cells become points, fronts and the README's table."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import front
import front_report
import numpy as np
import peers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure

from hetcache_compile import Plan, reference
from hetcache_compile.bench.methods import FULL, Method
from hetcache_compile.bench.quality import RESULT, Bench, Settings, bench_quality, frames_file, load_frames
from hetcache_compile.edit.editing import load_pipeline, run_pipeline
from hetcache_compile.edit.media import Clip, read_video
from hetcache_compile.errors import InputFileError
from hetcache_compile.plan.schedule import PRESETS, make_schedule
from hetcache_compile.reference.demo import demo_clip, save_random_checkpoint

FRAMES, SIZE = 5, 64
SETTINGS = Settings("tiny", num_inference_steps=6, max_sequence_length=16, inner="eager", timed=False)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=2)
    return load_pipeline(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def clip():
    video = read_video(demo_clip(), FRAMES, SIZE, SIZE, start=142)
    mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    mask[:, 16:32, :16] = True
    return Clip("00-box-5", np.where(mask[..., None], 127, video).astype(np.uint8), mask, "a cat")


def nothing(*_):
    pass


def test_rivals_run_on_a_copy_and_failures_are_kept_as_their_reason(pipe, clip, tmp_path):
    plain = pipe.transformer
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    names = ["taylorseer:2", "firstblock:0.4", "fastercache:2"]
    methods = [Method(FULL), *peers.rivals(names, timed=False, best={})]
    result = bench_quality(pipe, [clip], methods, SETTINGS, tmp_path, nothing)
    assert pipe.transformer is plain
    assert peers.forwards(plain) == peers.forwards(load_copy(plain))
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    cells = result["cells"][clip.name]
    right, wrong, failed = (cells[name] for name in names)
    assert right["frozen_input_error"] < 1e-5 < 1e-2 < wrong["frozen_input_error"]
    assert right["way"] == "eager"
    assert right["seconds"] is None
    assert 10 < right["fidelity"]["generative"]["psnr_db"] < 100
    assert "IndexError" in failed["failed"]
    again = bench_quality(pipe, [clip], methods, SETTINGS, tmp_path, pytest.fail)
    assert again["cells"] == result["cells"]


def load_copy(model):
    """The same architecture, never touched."""
    return type(model).from_config(model.config)


def test_a_timed_rival_takes_its_fastest_way_and_keeps_to_it(pipe, clip, tmp_path, monkeypatch):
    seconds = {"compiled blocks": 1.0, "eager": 2.0}
    tried = []

    def run(self, pipe, plain, request, way, progress):
        tried.append(way)
        if way not in seconds:
            raise ValueError("broken\nin detail")
        return peers.Run(None, [seconds[way]])

    monkeypatch.setattr(peers.Rival, "run", run)
    monkeypatch.setattr(peers.Rival, "frozen_input_error", lambda *_: 0.0)
    best = {}
    rivals = peers.rivals(["taylorseer:2", "taylorseer:3"], timed=True, best=best)
    found = [method.runner(pipe, None, nothing) for method in rivals]
    assert [(more["way"], run_of.seconds) for run_of, more in found] == [("compiled blocks", [1.0])] * 2
    assert [more.get("broken") for _, more in found] == [{"compiled": "ValueError: broken"}, None]
    assert tried == [*peers.WAYS, "compiled blocks"]
    assert best == {"diffusers TaylorSeer": "compiled blocks"}


def test_a_package_that_is_missing_is_a_reason(pipe, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    methods = [Method(FULL), *peers.rivals(["dbcache-f1b0:0.08"], timed=False, best={})]
    result = bench_quality(pipe, [clip], methods, SETTINGS, tmp_path, nothing)
    assert result["cells"][clip.name]["dbcache-f1b0:0.08"] == {"failed": "cache_dit is not installed"}


def test_fewer_steps_with_the_solver_of_wan(pipe, clip, tmp_path, monkeypatch):
    """The tiny checkpoint has it already; beside Euler's method it gives the same as there."""
    bench = Bench(pipe, SETTINGS, nothing)
    (*_, unipc) = methods = front.our_methods(["steps:3", "unipc:3"])
    expected = run_pipeline(pipe, bench.request(clip, unipc), "denoising", nothing).frames
    euler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    monkeypatch.setattr(pipe, "scheduler", euler)
    cells = bench_quality(pipe, [clip], methods, SETTINGS, tmp_path, nothing)["cells"][clip.name]
    assert pipe.scheduler is euler
    frames = {name: load_frames(frames_file(tmp_path, clip.name, name)) for name in cells}
    assert (frames["unipc:3"] == expected).all()
    assert (frames["unipc:3"] != frames["steps:3"]).any()
    assert cells["unipc:3"]["calls"] == cells["steps:3"]["calls"]


def test_methods_are_split_and_step_reduction_must_reduce():
    ours, others = front.chosen_methods(["balanced", "steps:20", "unipc:20", "unipc:10", "pab:3"], 20)
    assert (ours, others) == (["balanced", "unipc:10"], ["pab:3"])
    everything, rivals = front.chosen_methods([*front.MAIN, *front.ADDITIONS, *peers.NAMES], 50)
    assert rivals == peers.NAMES
    assert len({method.name for method in front.our_methods(everything)}) == 1 + len(everything)
    assert {front.family(name) for name in everything} == set(front_report.JOINED)
    assert front.family("pab:3") == "diffusers PyramidAttentionBroadcast"


@pytest.mark.parametrize("fidelity_only", [False, True])
def test_times_are_taken_on_the_first_clip_of_each_size(clip, monkeypatch, fidelity_only):
    """Those of other libraries on the one of `RIVALS_TIMED_ON`. Every cell is measured once."""
    clips = [replace(clip, name=name) for name in ("00-box-5", "01-box-20", "03-ellipse-5", "04-ellipse-20")]
    timed, cells = set(), []

    def run_cells(pipe, clips, methods, steps, is_timed, options):
        found = [(item.name, method.name) for item in clips for method in methods[1:]]
        cells.extend(found)
        timed.update(found if is_timed else ())

    monkeypatch.setattr(front, "run_cells", run_cells)
    names = ["balanced", "steps:20", "steps:10", "pab:3"]
    front.measure(None, clips, names, 20, argparse.Namespace(fidelity_only=fidelity_only, ways="eager"))
    assert sorted(cells) == sorted((item.name, name) for item in clips for name in names if name != "steps:20")
    everywhere = {(item.name, name) for item in clips[:2] for name in ("balanced", "steps:10")}
    assert timed == (set() if fidelity_only else everywhere | {("01-box-20", "pab:3")})


def test_the_papers_presets_cost_what_its_table_says():
    """Shares of the uncached FLOPs, mean over masks of 5 to 50 %: 30.68 and 23.60 of 72.60; see `schedule.PAPER`."""
    distances = np.array(json.loads((front.RESULTS / "drift.json").read_text())["distances"])
    masks = [clip.mask for clip in reference.held_out(3)]
    for name, paper in (("paper-slow", 30.68 / 72.60), ("paper-fast", 23.60 / 72.60)):
        options = PRESETS[name].options
        plans = [Plan.from_mask(mask, (9, 16, 16), schedule="F", temporal_factor=2, **options) for mask in masks]
        active = np.mean([plan.num_active / plan.num_tokens for plan in plans])
        letters = [kind.letter for kind in make_schedule(name, 50, distances)]
        share = (letters.count("F") + active * letters.count("P")) / 50
        assert share == pytest.approx(paper, abs=0.015)
        assert options["extrapolation"] == 0


def cell(psnr_db, speedup=None):
    figures = {"generative": {"psnr_db": psnr_db}, "context": {"psnr_db": 60.0}, "overall": {"psnr_db": psnr_db + 1}}
    return {"fidelity": figures, "speedup": speedup, "calls": {"FULL": 4}, "num_active": None, "seconds": None}


def test_cells_of_both_parts_are_merged_and_timed_ones_win(tmp_path):
    parts = {
        "timed": {"00-box-5": {FULL: {}, "fast": cell(40.0, 4.0)}},
        "fidelity": {"00-box-5": {FULL: {}, "fast": cell(1.0)}, "03-box-5": {FULL: {}, "fast": cell(44.0)}},
    }
    for part, cells in parts.items():
        path = tmp_path / "50" / part / RESULT
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"clips": {name: {"masked": 0.05} for name in cells}, "cells": cells}))
    result = {"steps": {"50": front.collect(tmp_path, 50, {})}}
    assert result["steps"]["50"]["masked"] == {"00-box-5": 0.05, "03-box-5": 0.05}
    assert list(front_report.points(result, "50", "5")) == [
        {"method": "fast", "family": front_report.OURS, "speedup": 4.0, "psnr_db": 42.0}
    ]


def test_speed_ups_are_ratios_within_a_run(tmp_path):
    """The plain calls beside the second cell were timed while the machine was twice as slow; both are 4x."""

    def timed(speedup, ratio, active=9):
        return {**cell(40.0, speedup), "full_over_compiled": ratio, "num_active": active}

    methods = {
        FULL: {}, "fast": timed(4.0, 1.0), "balanced": timed(8.0, 0.5), "quality": timed(2.0, 1.0),
        "paper-slow": timed(2.0, 1.2), "fast+merging=kmeans": timed(4.0, 1.25),
        "steps:5": timed(6.0, 2 / 3, None), "pab:3": {**cell(30.0, 2.0), "full_over_compiled": None},
    }  # fmt: skip
    path = tmp_path / "20" / "timed" / RESULT
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"clips": {"00-box-5": {"masked": 0.05}}, "cells": {"00-box-5": methods}}))
    ratios = front.full_over_plain([front.read(path), {}], {})
    assert ratios == {"writing the cache": 1, "choosing tokens": 1.2, "clustering the context of 5 % masks": 1.25}
    again = front.full_over_plain([front.read(path)], {"choosing tokens": 1.3})
    assert again == {**ratios, "choosing tokens": 1.3}
    collected = front.collect(tmp_path, 20, ratios)
    found = {name: method["cells"]["00-box-5"]["speedup"] for name, method in collected["methods"].items()}
    ours = {"fast": 4, "balanced": 4, "quality": 2, "paper-slow": 2, "fast+merging=kmeans": 4}
    assert found == pytest.approx({**ours, "steps:5": 4, "pab:3": 2})


def test_a_result_is_extended_by_another_of_the_same_machine():
    def result(clip, psnr_db, name="fast", processor="P"):
        methods = {name: {"family": front_report.OURS, "cells": {clip: {"psnr_db": {"generative": psnr_db}}}}}
        return {
            "versions": {}, "processor": processor, "threads": 2, "guidance_scale": 2.0, "calibration": "c",
            "full_over_plain": {}, "steps": {"50": {"masked": {clip: 0.05}, "methods": methods}},
        }  # fmt: skip

    both = front.extended(result("03-box-5", 44.0), result("00-box-5", 40.0))
    assert set(both["steps"]["50"]["masked"]) == {"00-box-5", "03-box-5"}
    assert both["command"] == "front.py", "which measures all of it"
    assert set(both["steps"]["50"]["methods"]["fast"]["cells"]) == {"00-box-5", "03-box-5"}
    again = front.extended(result("03-box-5", 45.0), front.extended(result("03-box-5", 1.0, "other"), both))
    assert again["steps"]["50"]["methods"]["fast"]["cells"]["03-box-5"]["psnr_db"]["generative"] == 45
    assert set(again["steps"]["50"]["methods"]) == {"fast", "other"}
    assert front.extended(result("03-box-5", 44.0), {}) == result("03-box-5", 44.0)
    with pytest.raises(InputFileError, match="other processor"):
        front.extended(result("03-box-5", 44.0), result("00-box-5", 40.0, processor="Q"))


def test_a_front_holds_what_nothing_beats():
    places = [(1.0, 50.0), (2.0, 55.0), (3.0, 40.0), (2.5, 39.0), (3.0, 41.0)]
    found = [{"speedup": speedup, "psnr_db": psnr_db} for speedup, psnr_db in places]
    assert front_report.upper_front(found) == [found[1], found[4]]


@pytest.fixture
def result():
    def method(family, psnr_db, speedup, **more):
        return {
            "family": family,
            "cells": {"00-box-5": {"psnr_db": {"generative": psnr_db}, "speedup": speedup, **more}},
        }

    methods = {
        "balanced": method(front_report.OURS, 50.0, 3.7),
        "balanced+margin=4": method(front_report.OURS, 49.0, 3.4),
        "fast": method(front_report.OURS, 46.0, 4.6),
        "steps:20": method(front_report.FEWER_STEPS, 47.0, 2.6),
        "pab:3": method("diffusers PAB", 30.0, 2.7, frozen_input_error=0.2),
        "fastercache:2": {"family": "diffusers FasterCache", "cells": {"00-box-5": {"failed": "IndexError: out"}}},
    }
    return {
        "command": "python benchmarks/front.py", "versions": {"torch": "2"}, "processor": "P", "threads": 2,
        "guidance_scale": 2.0, "steps": {"50": {"masked": {"00-box-5": 0.05}, "methods": methods}},
    }  # fmt: skip


def test_the_table_shows_the_best_of_each_family_that_is_fast_enough(result):
    table = front_report.front_table(result)
    assert "| hetcache_compile | 50.0 dB, 3.7x: `balanced` |" in table
    assert "| hetcache_compile | 46.0 dB, 4.6x: `fast` |" in table
    assert "| fewer steps | 47.0 dB, 2.6x: `steps:20` |" in table
    assert table.count("| fewer steps | none is as fast |") == 2, "at 4x and at 6x"
    assert "| the paper's method | not measured |" not in table
    assert "| `balanced+margin=4` | 49.0 dB, 3.40x |\n| `balanced` | 50.0 dB, 3.70x |" in table
    assert table.count("| `balanced` | 50.0 dB, 3.70x |") == 2, "among all methods, and beside its options"
    assert table.count("`fast` | 46.0 dB, 4.60x") == 1
    assert "| diffusers | 30.0 dB, 2.7x: `pab:3` |" in table
    assert "diffusers FasterCache (`fastercache:2`) cannot run: IndexError: out." in table
    assert "diffusers PAB (0.20)" in table
    assert "20 steps" not in table


def test_additions_are_compared_on_the_clips_that_all_of_them_have(result):
    cells = result["steps"]["50"]["methods"]["balanced"]["cells"]
    cells |= {f"{n}-box-5": {"psnr_db": {"generative": 70.0}} for n in ("03", "06")}
    table = "\n".join(front_report.additions_table(result, "50", ["5"]))
    assert "| `balanced` | 50.0 dB, 3.70x |" in table
    assert "`fast`" not in table
    assert "| `balanced` | 70.0 dB, 3.70x |" in "\n".join(front_report.methods_table(result, "50", ["5"]))


def test_other_libraries_need_no_time_of_each_mask_size(result):
    for method in result["steps"]["50"]["methods"].values():
        method["cells"]["02-box-50"] = {"psnr_db": {"generative": 31.0}}
    found = list(front_report.points(result, "50", "50"))
    assert [(p["method"], p["speedup"], p["psnr_db"]) for p in found] == [("pab:3", 2.7, 31.0)]


def test_the_plot_shows_every_point_and_joins_the_fronts(result, tmp_path):
    front_report.save_plot(tmp_path / "front.png", result)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    found, axis = list(front_report.points(result, "50", "5")), Figure().subplots()
    front_report.draw_panel(axis, found, front_report.families(result))
    drawn = sorted(tuple(place) for dots in axis.collections for place in dots.get_offsets())
    assert drawn == sorted((point["speedup"], point["psnr_db"]) for point in found)
    lengths = {dots.get_label(): len(line.get_xdata()) for dots, line in zip(axis.collections, axis.lines, strict=True)}
    assert lengths[front_report.OURS] == len(
        front_report.upper_front([point for point in found if point["family"] == front_report.OURS])
    )
    assert lengths["diffusers PAB"] == 0
