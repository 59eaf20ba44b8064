"""Few steps: work by FLOPs, figures and tables of cells, and a distillation that goes on where it was stopped."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import few_steps
import few_steps_report
import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile import Plan, reference
from hetcache_compile.bench.methods import FULL, Method
from hetcache_compile.bench.quality import Bench, Settings, weights_digest
from hetcache_compile.edit.editing import call_arguments, load_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.passes.analysis.flops import graph_flops
from hetcache_compile.pipelines.observe import first_call
from hetcache_compile.reference.demo import save_random_checkpoint
from hetcache_compile.reference.few_steps import add_difference

REGIONS = {
    region: {"psnr_db": 30.0, "ssim": 0.9, "flip": 0.1, "warp_error": 3.0}
    for region in ("generative", "band", "context", "overall")
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return load_pipeline(folder, torch.float32, "cpu")


@pytest.mark.wide
def test_the_work_of_a_call_is_what_its_graph_counts(pipe):
    """Of 2 x 8 x 8 tokens 32 are active, while the count that it rests on is of half of them."""
    mask = np.zeros((5, 128, 128), dtype=bool)
    mask[:, :32, :64] = True
    clip = Clip("clip", np.zeros((5, 128, 128, 3), np.uint8), mask, "")
    work = few_steps.Work.of(pipe, clip)
    request = Bench(pipe, Settings("tiny", max_sequence_length=16), lambda *_: None).request(clip, Method(FULL))
    call = first_call(pipe, call_arguments(pipe, request))
    active = np.arange(128) < 32
    forms = hetcache.rewrite(call.model, Plan.from_token_mask(active, (2, 8, 8)), call.args, call.kwargs)
    counted = {kind: graph_flops(form.module) for kind, form in forms.by_kind.items()}
    assert work.of_call(128, 128) == pytest.approx(counted["full"], rel=0.01)
    assert work.of_call(32, 128) == pytest.approx(counted["partial"], rel=0.01)
    assert counted["reuse"] < 0.01 * counted["partial"]


def cell(calls, **more):
    return {"calls": calls, "num_active": None, "num_tokens": None, "fidelity": REGIONS, "quality": REGIONS, **more}


@pytest.fixture
def collected():
    cells = {
        FULL: {**cell({"FULL": 8}), "fidelity": None},
        "optimal:2x": cell({"FULL": 3, "PARTIAL": 2, "REUSE": 3}, num_active=50, num_tokens=100),
        "steps:4": cell({"FULL": 4}),
        "crop:0.5": cell({"FULL": 8}, num_tokens=50, speedup=1.9),
        "taylorseer:2": cell({"ALL": 8}, flops=400_000.0, way="eager"),
        "fastercache:2": {"failed": "IndexError: out"},
    }
    result = {"clips": {"01-box-20": {"masked": 0.2}}, "cells": {"01-box-20": cells}}
    return few_steps.collect(
        [result], few_steps.Work(call=0.0, token=900.0, pair=1.0, embedding=0.0, num_tokens=100), "P, torch 2"
    )


def test_work_is_counted_by_calls_and_tokens_or_was_counted(collected):
    """A FULL call takes 100 000, a PARTIAL one 50 000, one of the crop 47 500."""
    found = {
        name: method["cells"]["01-box-20"]["fewer_flops"]
        for name, method in collected["methods"].items()
        if name != "fastercache:2"
    }
    expected = {FULL: 1, "optimal:2x": 2, "steps:4": 2, "crop:0.5": 800 / 380, "taylorseer:2": 2}
    assert found == pytest.approx(expected, rel=1e-4)
    assert collected["methods"][FULL]["cells"]["01-box-20"].get("fidelity") is None
    assert collected["methods"]["fastercache:2"]["cells"]["01-box-20"] == {"failed": "IndexError: out"}


def test_the_table_has_a_line_for_each_method_that_ran(collected, tmp_path):
    result = {"models": {"distilled:8": collected}}
    table = few_steps_report.few_steps_table(result)
    assert "| distilled, 8 steps | masks of 20 % |" in table
    assert "| `full` | 1.00x; -; 30.0 | 30.0 | 0.900 | 0.100 | 3.0 |" in table
    assert "| `crop:0.5` | 2.11x (1.90x); 30.0; 30.0 |" in table
    assert "| `fastercache" not in table
    assert "distilled in 8 steps: P, torch 2: `python" in table
    few_steps_report.save_plot(tmp_path / "few_steps.png", result)
    assert (tmp_path / "few_steps.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_shown_where_they_were_taken(collected):
    table = few_steps_report.times_table({"models": {"distilled:8": collected}, "command": "few_steps.py --timed"})
    assert "| `crop:0.5`, distilled in 8 steps | 1.90x of 2.11x |" in table
    assert "steps:4" not in table


def test_context_that_moves_is_shown_beside_context_that_stays():
    def method(decibels):
        return {"machine": "P", "cells": {
            clip: {"fidelity": {"generative": {"psnr_db": value}}} for clip, value in decibels.items()
        }}  # fmt: skip

    methods = {
        "full": method({"00-box-5": None}),
        "balanced": method({"00-box-5": 58.0, "03-box-5": 51.0, "01-box-20": 50.0}),
        "balanced+context_motion=0": method({"00-box-5": 52.5, "03-box-5": 51.5, "02-box-50": 40.0}),
    }
    part = {"masked": {"00-box-5": 0.05, "01-box-20": 0.2}, "methods": methods}
    table = few_steps_report.moving_table({"models": {"original:50": part}, "command": "few_steps.py"})
    assert "| `balanced`, 50 steps | 54.5 dB (52.0 dB) | - |" in table
    assert "-0.5 to +5.5 dB" in table


def test_shared_context_is_shown_beside_one_of_its_own():
    def method(cells):
        return {"machine": "P", "cells": {
            clip: {"fidelity": {"generative": {"psnr_db": psnr_db}}, "fewer_flops": fewer}
            for clip, (psnr_db, fewer) in cells.items()
        }}  # fmt: skip

    methods = {
        "balanced": method({"00-box-5": (58.0, 4.0), "03-box-5": (51.0, 4.0)}),
        "balanced+shared_context=1": method({"00-box-5": (57.0, 5.0), "03-box-5": (51.5, 5.2)}),
    }
    parts = {name: {"masked": {"00-box-5": 0.05}, "methods": methods} for name in ("original:20", "original@5:20")}
    table = few_steps_report.shared_table({"models": parts, "command": "few_steps.py"})
    assert "| `balanced`, 20 steps, guidance 2 | 54.2 dB, 5.10x (54.5 dB, 4.00x) |" in table
    assert "| `balanced`, 20 steps, guidance 5 | 54.2 dB, 5.10x (54.5 dB, 4.00x) |" in table
    assert "-1.0 to +0.5 dB" in table


def test_a_model_is_named_with_its_guidance_and_steps():
    assert few_steps.parsed("original:20") == ("original", 2.0, 20)
    assert few_steps.parsed("original@5:20") == ("original", 5.0, 20)
    assert few_steps.parsed("unguided:8") == ("unguided", 1.0, 8)


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("optimal:2x", ("original:4", "original:8", "original:20", "distilled:8")),
        ("steps:6", ("original:8", "original:20", "distilled:8")),
        ("optimal:2x+shared_context=1", ("original:4", "original:8", "original:20")),
        ("ahead:0.45+FFP*+margin=1", ("original:8", "distilled:8")),
        ("ahead:0.45+FFP*+shared_context=1", ("original:8",)),
    ],
)
def test_methods_that_say_nothing_of_a_model_are_left_out(name, models):
    known = ("original:4", "original:8", "original:20", "distilled:8")
    assert tuple(model for model in known if few_steps.applies(name, model)) == models


def test_what_was_measured_before_stays_until_as_many_clips_are_there(collected):
    """And a model that was measured on two machines names both."""

    def before(clip):
        return {"masked": {clip: 0.05}, "methods": {
            name: {"family": "", "machine": "Q, torch 2", "cells": {clip: {}}} for name in ("steps:4", "steps:2")
        }}  # fmt: skip

    known = before("01-box-20")
    both = few_steps.extended(known, collected)
    assert both["methods"]["steps:4"] == collected["methods"]["steps:4"]
    assert both["methods"]["steps:2"] == known["methods"]["steps:2"]
    assert few_steps_report.machines({"models": {"distilled:8": both}}) == (
        "distilled in 8 steps: P, torch 2 and Q, torch 2"
    )
    known = before("00-box-5")
    both = few_steps.extended(known, collected)
    assert list(both["masked"]) == ["00-box-5", "01-box-20"]
    assert both["methods"]["steps:4"] == known["methods"]["steps:4"], "another clip is not that clip"
    failed = {
        "masked": {},
        "methods": {"steps:2": {"family": "", "machine": "P", "cells": {"00-box-5": {"failed": ""}}}},
    }
    assert few_steps.extended(known, failed)["methods"]["steps:2"] == known["methods"]["steps:2"]


def test_where_another_method_is_ahead_and_what_failed():
    def method(family, speed, psnr_db, clip="00-box-5"):
        cell = {"fewer_flops": speed, "fidelity": {"generative": {"psnr_db": psnr_db}}}
        return {"family": family, "machine": "P", "cells": {clip: cell}}

    methods = {
        "optimal:2x": method(few_steps_report.OURS, 2.0, 50.0),
        "crop:0.5+balanced": method("crop and stitch", 3.0, 45.0),
        "steps:6": method("fewer steps", 1.5, 50.2),
        "steps:4": method("fewer steps", 2.02, 51.0),
        "slower": method("other", 1.8, 50.9),
        "steps:3": method("fewer steps", 2.9, 44.0),
        "steps:2": method("fewer steps", 4.0, 30.0),
        "broken": {"family": "other", "machine": "P", "cells": {"00-box-5": {"failed": "Error: no"}}},
    }
    result = {"models": {"original:8": {"masked": {"00-box-5": 0.05}, "methods": methods}}}
    _, _, *rows = few_steps_report.ahead_table(result).splitlines()
    assert rows[:2] == [
        "| original, 8 steps | 5 % | `steps:4`, 2.02x, 51.0 dB | `optimal:2x`, 2.00x, 50.0 dB |",
        "| original, 8 steps | 5 % | `steps:2`, 4.00x, 30.0 dB | none measured |",
    ]
    assert rows[2] == ""
    assert few_steps_report.failures(result) == " Failed: `broken` (Error: no), original in 8 steps."


def test_a_scheduler_has_one_digest_in_every_process():
    """diffusers lists the defaults that it took in the order of a set."""
    names = ["beta_end", "solver_type", "trained_betas"]
    pipes = [
        SimpleNamespace(
            scheduler=SimpleNamespace(config={"shift": shift, "_use_default_values": listed}), components={}
        )
        for shift, listed in ((3.0, names), (3.0, names[::-1]), (1.0, names))
    ]
    first, again, other = map(weights_digest, pipes)
    assert first == again != other


@pytest.fixture
def distil(monkeypatch, tmp_path):
    """The script, on clips of 16 x 16 pixels."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "reference")
    module = importlib.import_module("distil")
    stage = module.Stage(size=16, batch=2, steps=1, learning_rate=0.0, decay=False)
    for name, value in {"PATHS": stage, "VALIDATION": stage, "STEPS_IN_WINDOW": 1, "WARM_UP": 1}.items():
        monkeypatch.setattr(module, name, value)
    np.savez(tmp_path / "real.npz", clip=np.random.default_rng(0).integers(0, 256, (40, 3, 48, 64), np.uint8))
    return module


def started(distil, folder, tmp_path):
    folder.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "real.npz", folder)
    return distil.Distillation(folder, 3, 0, torch.device("cpu"), distil.PATHS, batch=2)


def trained(distillation):
    return torch.cat([weight.detach().flatten() for weight in distillation.trained.values()])


@pytest.mark.wide
def test_a_distillation_goes_on_where_it_was_stopped_and_its_difference_gives_the_student(distil, tmp_path):
    whole = started(distil, tmp_path / "whole", tmp_path)
    whole.run(60, 60)
    stopped = started(distil, tmp_path / "stopped", tmp_path)
    stopped.advance(stopped.paths(), 0.0)
    stopped.save()
    resumed = started(distil, tmp_path / "stopped", tmp_path)
    assert resumed.step == 1
    resumed.run(60, 60)
    assert whole.step == resumed.step == 3
    torch.testing.assert_close(trained(resumed), trained(whole), atol=1e-6, rtol=0)
    losses = [entry for entry in whole.log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3]

    whole.export(tmp_path / "difference.safetensors", tmp_path / "log.json")
    model = reference.load().transformer
    paths = whole.paths()
    inputs = {"timestep": torch.full((2,), 500.0), "encoder_hidden_states": paths.text, "return_dict": False,
              "control_hidden_states": paths.control}  # fmt: skip
    with torch.no_grad():
        before = model(paths.points[0], **inputs)[0]
        add_difference(model, tmp_path / "difference.safetensors")
        expected, actual = whole.student(paths.points[0], **inputs)[0], model(paths.points[0], **inputs)[0]
    moved, missed = (expected - before).norm(), (expected - actual).norm()
    assert missed < 0.02 * moved
