"""The command line as a user meets it: files out, one clear line and status 2 on bad input."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from videos import SAMPLES, save_video

import hetcache_compile as hetcache
from hetcache_compile import reference
from hetcache_compile.cli.common import check_size, size_factors
from hetcache_compile.edit.media import Clip, read_video, write_video
from hetcache_compile.errors import InputFileError
from hetcache_compile.plan.partition import to_token_grid
from hetcache_compile.reference.demo import demo_clip, moving_mask, save_random_checkpoint

FRAMES, SIZE = 5, 64


@pytest.fixture
def mask_file(tmp_path):
    path = tmp_path / "mask.npy"
    np.save(path, moving_mask(FRAMES, SIZE, SIZE))
    return path


SMALL = ("--height", SIZE, "--width", SIZE, "--num-frames", FRAMES)


def test_every_command_has_help(hetcache_command):
    names = ("demo", "plan", "edit", "compile", "explain", "estimate", "calibrate", "bench")
    for command in ((), *((name,) for name in names), ("bench", "quality"), ("bench", "engine")):
        status, out, _ = hetcache_command(*command, "--help")
        assert status == 0
        assert "Usage" in out


def test_plan_takes_any_option_of_a_plan(hetcache_command, mask_file, tmp_path):
    path = tmp_path / "a.hetplan"
    options = ("--set", "selection=hetcache", "--set", "context_extrapolation=1")
    status, printed, _ = hetcache_command("plan", "--mask", mask_file, "-o", path, *options, *SMALL)
    assert status == 0
    plan = hetcache.Plan.load(path)
    assert (plan.selection, plan.context_extrapolation, plan.extrapolation) == ("hetcache", 1, 1)
    assert "cached K/V predicted, selection hetcache" in printed
    assert plan.context_motion == 0, "a selection of FULL steps leaves no room for it"
    narrow = ("--margin", 1, "--set", "multiple=1")
    for more, moves in (((), 1), (("--set", "context_motion=0"), 0)):
        hetcache_command("plan", "--mask", mask_file, "-o", path, *narrow, *more, *SMALL)
        assert hetcache.Plan.load(path).context_motion == moves, "context moves by default where there is any"
    for wrong, message in (("selektion=x", "no option 'selektion'"), ("margin", "name=value")):
        status, _, error = hetcache_command("plan", "--mask", mask_file, "-o", path, "--set", wrong, *SMALL)
        assert status == 2
        assert message in error


def test_plan_writes_the_plan_and_its_picture(hetcache_command, mask_file, tmp_path):
    plan, preview = tmp_path / "a.hetplan", tmp_path / "plan.png"
    status, out, _ = hetcache_command(
        "plan", "--mask", mask_file, "-o", plan, "--preview", preview, "--steps", 8, "--schedule", "FRP", *SMALL
    )
    assert status == 0
    assert "FRPFRPFF" in out
    loaded = hetcache.Plan.load(plan)
    assert loaded.grid == (2, 4, 4)
    expected = hetcache.Plan.from_mask(np.load(mask_file), (2, 4, 4), num_inference_steps=8, schedule="FRP")
    assert np.array_equal(loaded.active_index, expected.active_index)
    with Image.open(preview) as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_edit_takes_files_and_a_plan_and_writes_the_report(hetcache_command, mask_file, tmp_path):
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    save_video(tmp_path / "in.mp4", frames, rate=25, sound=np.zeros(SAMPLES))
    plan = tmp_path / "a.hetplan"
    status, *_ = hetcache_command(
        "plan", "--model", tmp_path / "model", "--mask", mask_file, "-o", plan, "--steps", 4, "--schedule", "FPR",
        *SMALL,
    )  # fmt: skip
    assert status == 0
    status, out, err = hetcache_command(
        "edit", "--model", tmp_path / "model", "--video", tmp_path / "in.mp4", "--mask", mask_file,
        "--prompt", "a cat", "--plan", plan, "--out", tmp_path / "out", "--inner", "eager", "--dtype", "float32",
        *SMALL,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == {"FULL": 4, "PARTIAL": 2, "REUSE": 2}
    assert report["speedup_vs_compiled"] > 0
    assert report["speedup_vs_eager"] is None
    assert report["psnr_generative_db"] > 10
    assert report["psnr_overall_db"] > 10
    assert report["cache_bytes"] > 0
    assert set(report["seconds"]) == {"FULL", "PARTIAL", "REUSE"}
    with av.open(str(tmp_path / "out" / "side_by_side.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
        assert container.streams.video[0].width == 3 * SIZE
    with av.open(str(tmp_path / "out" / "edit.mp4")) as container:
        assert container.streams.video[0].average_rate == 25
        assert container.streams.audio[0].duration > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{report['speedup_vs_compiled']:.2f}x" in page
    assert "REUSE" in out


def test_a_plan_for_something_else_is_told(hetcache_command, mask_file, tmp_path):
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    save_video(tmp_path / "in.mp4", np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8))
    tokens = to_token_grid(np.load(mask_file), (2, 4, 4))
    number, first = tokens.sum(), np.argwhere(tokens)[0]
    one = np.zeros((2, 4, 4), dtype=bool)
    one[tuple(first)] = True
    exactly = {"margin": 0, "context_ratio": 0, "multiple": 1}
    for plan, message in (
        (
            hetcache.Plan.from_mask(np.ones((3, 4, 4)), (3, 4, 4)),
            "for the token grid (3, 4, 4), and this edit has (2, 4",
        ),
        (
            hetcache.Plan.from_mask(one, (2, 4, 4), **exactly),
            f"{number - 1} of the {number} tokens in this one are not",
        ),
    ):
        plan.save(tmp_path / "a.hetplan")
        status, _, err = hetcache_command(
            "edit", "--model", tmp_path / "model", "--video", tmp_path / "in.mp4", "--mask", mask_file,
            "--prompt", "a cat", "--plan", tmp_path / "a.hetplan", "--out", tmp_path / "out", *SMALL,
        )  # fmt: skip
        assert status == 2
        assert message in err
        assert not (tmp_path / "out").exists()


def test_a_mask_of_the_whole_clip_its_objects_and_its_polarity(hetcache_command, tmp_path):
    """The plan of frames 3 to 7 of a clip of 9, from a label map, is that of the mask itself."""
    whole = moving_mask(9, SIZE, SIZE)
    expected = hetcache.Plan.from_mask(whole[3:8], (2, 4, 4))
    labels = np.where(whole, 3, 0).astype(np.uint8)
    labels[:, :8] = 5
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "black.npy", 255 - whole.astype(np.uint8) * 200)
    save_video(tmp_path / "in.mp4", np.zeros((9, SIZE, SIZE, 3), dtype=np.uint8))
    plan = ("plan", "-o", tmp_path / "a.hetplan", "--video", tmp_path / "in.mp4", "--start-frame", 3, *SMALL)
    for options in (
        ("labels.npy", "--labels", "3,3"),
        ("black.npy", "--invert"),
        ("black.npy", "--invert", "--threshold", 0.3),
    ):
        status, _, err = hetcache_command(*plan, "--mask", tmp_path / options[0], *options[1:])
        assert status == 0, err
        assert np.array_equal(hetcache.Plan.load(tmp_path / "a.hetplan").token_kind, expected.token_kind)


@pytest.mark.parametrize("way", ["a folder in the way", "a name under a file", "no folder for it", "a full disk"])
@pytest.mark.parametrize("command", ["edit", "plan", "demo", "explain", "calibrate", "bench quality", "bench engine"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(way, command, hetcache_command, tmp_path, monkeypatch):
    """No input exists: whatever is read first would be missed first."""
    files = {"edit": "edit.mp4", "demo": "report.html", "bench quality": "quality.json", "bench engine": "bench.json"}
    (tmp_path / "file").write_text("a file")
    out = {"a name under a file": tmp_path / "file" / "out", "no folder for it": Path("/proc/out")}.get(
        way, tmp_path / "out"
    )
    if way == "a folder in the way":
        (out / files.get(command, "")).mkdir(parents=True)
    if way == "a full disk":

        def full(**_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    none = tmp_path / "none"
    arguments = {
        "edit": ("--model", none, "--video", none, "--mask", none, "--prompt", "a cat", "--out", out),
        "plan": ("--mask", none, "-o", out),
        "demo": ("--edit", "none", "--out", out),
        "explain": (none, "--picture", out),
        "calibrate": ("--model", none, "--video", none, "--mask", none, "-o", out),
        "bench quality": ("--methods", "none", "--out", out),
        "bench engine": (none, "--out", out),
    }[command]
    before = sorted(tmp_path.rglob("*"))
    status, _, err = hetcache_command(*command.split(), *arguments)
    assert status == 2
    assert err.startswith(f"hetcache: {out}")
    assert "cannot be written: " in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.wide
def test_demo_takes_an_object_away_with_the_reference_model(hetcache_command, tmp_path):
    status, _, err = hetcache_command(
        "demo", "--out", tmp_path, "--steps", 3, "--schedule", "FPR", "--inner", "eager", "--dtype", "bfloat16"
    )
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    contract = {
        "speedup_vs_compiled", "speedup_vs_eager", "psnr_generative_db", "psnr_overall_db", "steps", "seconds",
        "cache_bytes",
    }  # fmt: skip
    assert contract <= set(report)
    assert report["steps"] == {"FULL": 4, "PARTIAL": 2, "REUSE": 0}
    assert report["psnr_overall_db"] > 25
    assert {"report.html", "side_by_side.mp4", "edit.mp4", "plan.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("command", ["bench quality", "calibrate"])
def test_the_mask_of_ones_own_clip_is_read_as_its_options_say(
    command, hetcache_command, mask_file, tmp_path, monkeypatch
):
    taken = []

    def stop(pipe, clips, *_, **__):
        taken.extend(clips)
        raise InputFileError("far enough")

    monkeypatch.setattr("hetcache_compile.bench.quality.bench_quality", stop)
    monkeypatch.setattr("hetcache_compile.bench.calibrate.calibrate", stop)
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    write_video(tmp_path / "in.mp4", read_video(demo_clip(), FRAMES, SIZE, SIZE))
    of_both = ("--model", tmp_path / "model", "--video", tmp_path / "in.mp4", "--mask", mask_file, *SMALL)
    out = ("--out", tmp_path / "out")
    for more in ((), ("--invert",)):
        status, _, err = hetcache_command(*command.split(), *of_both, *out, *more)
        assert status == 2
        assert "far enough" in err
    assert np.array_equal(taken[0].mask, np.load(mask_file) > 0)
    assert np.array_equal(taken[1].mask, ~taken[0].mask)


@pytest.mark.wide
@pytest.mark.parametrize("source", ["files", "reference"])
def test_bench_quality_measures_a_clip_of_ones_own_or_the_held_out_ones(
    source, hetcache_command, mask_file, tmp_path, monkeypatch
):
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    video = read_video(demo_clip(), FRAMES, SIZE, SIZE)
    if source == "files":
        write_video(tmp_path / "in.mp4", video)
        arguments = (
            "--model", tmp_path / "model", "--dtype", "float32", "--video", tmp_path / "in.mp4", "--mask", mask_file,
            "--truth", tmp_path / "in.mp4", "--prompt", "a cat", *SMALL,
        )  # fmt: skip
    else:
        clips = [Clip("in", video, np.load(mask_file), "a cat", video), Clip("b", video, np.load(mask_file), "a dog")]
        monkeypatch.setattr(reference, "held_out", lambda count: clips[:count])
        monkeypatch.setattr(reference, "FOLDER", tmp_path / "model")
        arguments = ("--clips", 1)
    status, out, err = hetcache_command(
        "bench", "quality", *arguments, "--methods", "FR,steps:1", "--steps", 3, "--inner", "eager",
        "--max-sequence-length", 16, "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert list(result["cells"]) == ["in"]
    assert list(result["cells"]["in"]) == list(result["summary"]) == ["full", "FR", "steps:1"]
    assert result["cells"]["in"]["FR"]["calls"] == {"FULL": 4, "PARTIAL": 0, "REUSE": 2}
    assert result["cells"]["in"]["FR"]["quality"]["generative"]["psnr_db"] > 0
    assert result["command"].startswith("hetcache bench quality")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "quality.json", "quality.md", "quality.png", "in.mp4", "frames",
    }  # fmt: skip
    assert "steps:1" in out
    assert "…" not in out


def test_sizes_are_checked_by_the_factors_of_the_pipeline_itself():
    """Tokens of 32 x 16 pixels, latent frames of 8: what Wan refuses goes, and the other way round."""
    model = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 1)))
    pipe = SimpleNamespace(
        transformer=None, transformer_2=model, vae_scale_factor_spatial=16, vae_scale_factor_temporal=8
    )
    assert size_factors(pipe) == (8, 32, 16)
    check_size(64, 48, 17, pipe)
    for size, message in (
        ((48, 48, 17), "height must be a multiple of 32, got 48"),
        ((64, 40, 17), "width must be a multiple of 16, got 40"),
        ((64, 48, 13), "one more than a multiple of 8, got 13"),
    ):
        with pytest.raises(hetcache.PlanError, match=message):
            check_size(*size, pipe)
    check_size(48, 48, 13)
    pipe.vae_scale_factor_temporal = 1
    check_size(64, 48, 13, pipe)
    del pipe.vae_scale_factor_spatial
    with pytest.raises(hetcache.PlanError, match="does not say how many pixels a latent has"):
        check_size(64, 48, 13, pipe)


@pytest.mark.parametrize("command", ["plan", "edit", "explain", "calibrate"])
def test_a_size_that_the_model_cannot_cut_up(command, hetcache_command, mask_file, tmp_path):
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    odd = tmp_path / "odd.npy"
    np.save(odd, moving_mask(FRAMES, SIZE + 8, SIZE))
    video = tmp_path / "in.mp4"
    write_video(video, np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8))
    inputs = {
        "plan": ("--model", tmp_path / "model", "--mask", odd, "-o", tmp_path / "x.hetplan"),
        "edit": ("--model", tmp_path / "model", "--video", video, "--mask", odd, "--prompt", "a cat"),
        "explain": (tmp_path / "model",),
        "calibrate": ("--model", tmp_path / "model", "-o", tmp_path / "x.hetcal"),
    }
    size = ("--height", SIZE + 8, *(() if command == "calibrate" else ("--width", SIZE)), "--num-frames", FRAMES)
    status, _, err = hetcache_command(command, *inputs[command], *size)
    assert status == 2
    assert "height must be a multiple of 16, got 72" in " ".join(err.replace("│", " ").split())
    assert not list(tmp_path.glob("x.*"))


def bad_inputs(tmp_path, mask_file):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wide.npy", moving_mask(FRAMES, SIZE, 2 * SIZE))
    np.save(tmp_path / "none.npy", np.zeros((FRAMES, SIZE, SIZE), dtype=bool))
    np.save(tmp_path / "flat.npy", np.zeros(7))
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "broken.hetplan").write_bytes(b"not a plan")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanVACEPipeline"}')
    plan = ("plan", "-o", tmp_path / "x.hetplan", *SMALL)
    edit = ("edit", "--prompt", "a cat", "--out", tmp_path / "out", *SMALL)
    clip, here = ("--video", demo_clip()), ("--mask", mask_file)
    return {
        "no mask file": ((*plan, "--mask", tmp_path / "no.mp4"), "no file or folder at"),
        "mask of another size": ((*plan, "--mask", tmp_path / "wide.npy"), "64x128"),
        "empty mask": ((*plan, "--mask", tmp_path / "none.npy"), "the mask is empty"),
        "mask with one dim": ((*plan, "--mask", tmp_path / "flat.npy"), "[frames, height, width]"),
        "broken video": ((*plan, "--mask", tmp_path / "broken.mp4"), "cannot be read as video"),
        "empty folder": ((*plan, "--mask", tmp_path / "empty"), "holds 0 frames"),
        "unknown schedule": ((*plan, *here, "--schedule", "warp"), "unknown schedule 'warp'"),
        "teacache without a model": ((*plan, *here, "--schedule", "teacache:0.1"), "time embedding"),
        "odd height": ((*plan, *here, "--height", 65), "height must be a multiple of 16"),
        "broken plan": ((*edit, *clip, *here, "--model", tmp_path, "--plan", tmp_path / "broken.hetplan"), "plan"),
        "no checkpoint": ((*edit, *clip, *here, "--model", tmp_path / "empty"), "no model_index.json"),
        "unknown method": (("bench", "quality", "--methods", "warp"), "unknown schedule 'warp'"),
        "unknown compiler": (("calibrate", "--inner", "warp"), "inner must be a backend of torch.compile"),
        "no later time": (("bench", "quality", "--methods", "ahead:1.5+FFP*"), "must lie between 0 and 1"),
        "video without mask": (("bench", "quality", "--video", "a.mp4"), "--video and --mask go together"),
        "how to read no mask": (("bench", "quality", "--labels", "1"), "say how a mask is read: give --mask"),
        "nothing to invert": (("calibrate", "--invert"), "say how a mask is read: give --mask"),
        "short video": ((*edit, *clip, *here, "--model", tmp_path, "--num-frames", 401), "holds"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no mask file", "mask of another size", "empty mask", "mask with one dim", "broken video", "empty folder",
        "unknown schedule", "teacache without a model", "odd height", "broken plan", "no checkpoint", "short video",
        "unknown method", "video without mask", "how to read no mask", "nothing to invert", "unknown compiler",
        "no later time",
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_status_2(case, hetcache_command, mask_file, tmp_path):
    arguments, expected = bad_inputs(tmp_path, mask_file)[case]
    status, _, err = hetcache_command(*arguments)
    assert status == 2
    assert expected in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not (tmp_path / "x.hetplan").exists()
    assert not (tmp_path / "out").exists()


def test_a_preset_brings_its_own_options_unless_they_are_given(hetcache_command, mask_file, tmp_path):
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    path = tmp_path / "a.hetplan"
    plan = ("plan", "--model", tmp_path / "model", "--mask", mask_file, "-o", path, "--schedule", "paper-fast", *SMALL)
    extrapolation = []
    for given in ((), ("--extrapolation", 2)):
        status, *_ = hetcache_command(*plan, *given)
        assert status == 0
        extrapolation.append(hetcache.Plan.load(path).extrapolation)
    assert extrapolation == [0, 2]
