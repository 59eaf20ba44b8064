"""Calibration end to end on a tiny checkpoint: what it records against what sessions do; files, resuming, commands."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import hetcache_compile as hetcache
from hetcache_compile import Calibration, CalibrationError, Plan, PlanError, TokenKind, reference
from hetcache_compile.bench.calibrate import (
    VARIANTS,
    calibrate,
    computed_by,
    inner_products,
    kind_masks,
    measure_clip,
    plans_of,
    recorded,
)
from hetcache_compile.bench.quality import weights_digest
from hetcache_compile.calibration.best_schedule import expect, optimal_schedule
from hetcache_compile.calibration.record import Costs, Measured
from hetcache_compile.cli import main as cli
from hetcache_compile.cli.calibrate import calibrated_in_more, measured_elsewhere
from hetcache_compile.edit.editing import EditRequest, compiled, load_pipeline, make_plan, run_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.plan.prediction import Prediction
from hetcache_compile.provenance import processor_name
from hetcache_compile.reference.clips import HELD_OUT_TEXTURES, TRAINING_TEXTURES
from hetcache_compile.reference.demo import demo_clip, moving_mask, save_random_checkpoint
from hetcache_compile.runtime.backend import hetcache_backend

FRAMES, SIZE, STEPS = 5, 64, 5
SETTINGS = {
    "num_inference_steps": STEPS, "guidance_scale": 3.0, "max_sequence_length": 16, "inner": "eager", "shares": (0.5,),
    "margin": 1.0, "multiple": 1,
}  # fmt: skip


def clip(seed):
    video = np.random.default_rng(seed).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    mask = moving_mask(FRAMES, SIZE, SIZE)
    return Clip(f"clip {seed}", video, mask if seed % 2 else mask[:, ::-1], "a cat")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return load_pipeline(checkpoint, torch.float32, "cpu")


@pytest.fixture(scope="module")
def calibrated(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "model.hetcal"
    stages = []
    measured = calibrate(pipe, [clip(1), clip(2)], out, lambda *state: stages.append(state), **SETTINGS)
    return measured, out, stages


def emptied(measured):
    """The layout of a calibration, without its clips."""
    return replace(
        measured, gram=0 * measured.gram, partial=0 * measured.partial, counts=0 * measured.counts, clips=(), costs=None
    )


def velocities(pipe, request, plan, steps):
    """Velocities `[step][branch]` of a session that follows `steps`."""
    with (
        compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}),
        recorded(pipe, lambda *_: None) as (recorder, observe),
        hetcache.session(plan.with_schedule(steps)),
    ):
        run_pipeline(pipe, request, "session", observe, decode=False)
    return [[call.velocity for call in calls] for calls in recorder.steps]


@pytest.mark.wide
def test_recorded_errors_are_what_sessions_make(pipe, calibrated):
    """Up to step 1 a session has the latents of the uncached run, so its second velocity shows the error itself."""
    empty, c = emptied(calibrated[0]), clip(1)
    request = EditRequest(
        c.video, c.mask, c.prompt, num_inference_steps=STEPS, guidance_scale=3.0, max_sequence_length=16
    )
    plan = make_plan(pipe, request, "full", margin=1.0, multiple=1)
    one = empty.add("clip 1", measure_clip(pipe, request, [plan], empty, lambda *_: None))
    true = velocities(pipe, request, plan, "full")
    masks = kind_masks(plan, true[0][0])
    assert [int(mask.sum()) for mask in masks] == [4 * int(plan.tokens_of(kind).sum()) for kind in TokenKind]
    for steps, errors in (("FRFFF", one.reuse_errors()), ("FPFFF", one.partial_errors())):
        cached = velocities(pipe, request, plan, list(steps))
        for kind, mask in zip(TokenKind, masks, strict=True):
            off = sum((a - b)[..., mask].square().sum() for a, b in zip(cached[1], true[1], strict=True))
            energy = sum(velocity[..., mask].square().sum() for velocity in true[1])
            assert errors[kind, 0, 1] == pytest.approx(float((off / energy).sqrt()), rel=1e-3)
            assert errors[kind, 0, 1] > 0


def test_it_reports_and_leaves_the_pipeline_alone(pipe, calibrated):
    measured, _, stages = calibrated
    assert measured.clips == ("clip 1", "clip 2")
    assert measured.counts.tolist() == [2, 2, 2]
    assert (measured.partial > 0).all()
    assert measured.costs.full > measured.costs.reuse > 0
    assert measured.costs.partial.shape == (1,)
    assert {"clips", "uncached", "partial steps"} <= {stage for stage, *_ in stages}
    assert not pipe.transformer._forward_hooks
    assert not hasattr(pipe.transformer, "_orig_mod")
    assert "2 clips, 5 steps" in measured.describe()
    assert all(pipe.transformer.get_submodule(name) for name in measured.attentions)
    assert measured.attentions
    assert measured.attention_mass.sum(axis=1) == pytest.approx(1)
    assert "generative tokens look at the context for" in measured.describe()


@pytest.mark.wide
def test_a_run_cut_short_goes_on_where_it_was(pipe, calibrated, tmp_path, monkeypatch):
    expected, *_ = calibrated
    known = {**SETTINGS, "costs": expected.costs}  # so that nothing is timed
    out = tmp_path / "model.hetcal"

    def stop(stage, step, steps):
        if (stage, step) == ("clips", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, [clip(1), clip(2)], out, stop, **known)
    half = Calibration.load(out)
    assert half.clips == ("clip 1",)
    assert half.costs.full == expected.costs.full
    assert "not measured yet" in replace(half, costs=None).describe()
    stages = []
    measured = calibrate(pipe, [clip(1), clip(2)], out, lambda *state: stages.append(state), **known)
    assert [state[:2] for state in stages].count(("uncached", 0)) == 1
    assert not any(stage.startswith("timing") for stage, *_ in stages)
    assert measured.gram == pytest.approx(expected.gram, rel=1e-6)
    assert measured.partial == pytest.approx(expected.partial, rel=1e-4)
    changed = replace(clip(1), video=clip(3).video)
    smaller = replace(clip(1), video=clip(1).video[:1], mask=clip(1).mask[:1])
    for these, settings, message in (
        (clip(1), {"guidance_scale": 1.0}, "other guidance_scale"),
        (changed, {}, "other clip clip 1"),
        (smaller, {}, "other size, clip clip 1"),
    ):
        with pytest.raises(CalibrationError, match=message):
            calibrate(pipe, [these], out, stop, **{**known, **settings})
    older = tmp_path / "older.hetcal"
    replace(half, sensitivity=np.zeros((3, 0))).save(older)
    with pytest.raises(CalibrationError, match="averaged otherwise"):
        calibrate(pipe, [clip(1)], older, stop, **known)
    monkeypatch.setattr("hetcache_compile.bench.calibrate.OFFSETS", (1, 2))
    with pytest.raises(CalibrationError, match="other offsets"):
        calibrate(pipe, [clip(1)], out, stop, **known)


def test_inner_products_keep_small_differences():
    base = torch.randn(1, 2, 1, 3, 50000, generator=torch.Generator().manual_seed(0))
    step = 1e-4 * torch.randn_like(base)
    mask = torch.zeros(1, 3, 50000, dtype=torch.bool)
    mask[:, 1] = True
    gram = inner_products([base, base + step], [mask])[0]
    moved = (base + step).double() - base.double()
    assert gram[0, 0] + gram[1, 1] - 2 * gram[0, 1] == pytest.approx(float(moved[..., mask].square().sum()), rel=1e-5)


def test_means_over_clips_count_only_clips_that_have_the_kind(calibrated):
    measured, *_ = calibrated
    empty = emptied(measured)
    rng = np.random.default_rng(0)
    grams, partials = rng.random((3, *measured.gram.shape)), rng.random((3, *measured.partial.shape))
    present = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1]], dtype=bool)
    for number in range(3):
        empty = empty.add(str(number), Measured(grams[number], partials[number], present[number]))
    assert empty.counts.tolist() == [3, 1, 3]
    assert empty.gram[0] == pytest.approx(grams[:, 0].mean(axis=0))
    assert empty.gram[1] == pytest.approx(grams[0, 1])
    assert empty.partial[:, 2] == pytest.approx(partials[:, :, 2].mean(axis=0))


def test_the_most_sensitive_clips_count_most(calibrated):
    measured, *_ = calibrated
    empty, every = emptied(measured), np.ones(3, dtype=bool)
    grown = np.random.default_rng(0).random((4, *measured.log_amplification.shape))
    for number, one in enumerate(grown):
        clip = Measured(measured.gram, measured.partial, every, log_amplification=np.log(one), sensitivity=one)
        empty = empty.add(str(number), clip)
    root_mean_square = np.sqrt((grown**2).mean(axis=0))
    assert np.exp(empty.log_amplification) == pytest.approx(root_mean_square)
    assert empty.sensitivity == pytest.approx(root_mean_square)


def test_variants_that_the_options_leave_no_plan_are_left_out(monkeypatch):
    """Before anything is timed; and a clip that has no plan is named."""
    mask = np.zeros((2, 8, 8), dtype=bool)
    mask[:, 2:4, 2:4] = True

    def made(pipe, request, schedule, **options):
        if request is None:
            raise PlanError("nothing is masked")
        return Plan.from_mask(mask, mask.shape, schedule=schedule, **options)

    monkeypatch.setattr("hetcache_compile.bench.calibrate.make_plan", made)
    clips = {"one": 1, "two": 2}
    assert [chosen for chosen, _ in plans_of(None, clips, VARIANTS, {})] == list(VARIANTS)
    left = plans_of(None, clips, VARIANTS, {"merged_ratio": 0.5})
    assert [chosen for chosen, _ in left] == [chosen for chosen in VARIANTS if "context_motion" not in chosen]
    assert all(set(plans) == set(clips) for _, plans in left)
    with pytest.raises(PlanError, match="clip empty: nothing is masked"):
        plans_of(None, {**clips, "empty": None}, VARIANTS, {})
    with pytest.raises(PlanError, match="cached_ratio must"):
        plans_of(None, clips, VARIANTS, {"cached_ratio": 2.0})


def test_the_variant_nearest_to_a_plan_counts(calibrated):
    measured, *_ = calibrated
    assert len(measured.variants) == len(measured.partial) > 1
    for number, variant in enumerate(measured.variants):
        near = measured.like({**variant, "margin": variant["margin"] + 0.1})
        assert near.variants == (variant,)
        assert np.array_equal(near.partial[0], measured.partial[number])
    assert (
        measured.like({"margin": 9.0, "context_extrapolation": 1, "context_motion": 1}).variants[0][
            "context_extrapolation"
        ]
        == 1
    )


def test_a_calibration_survives_saving_and_loading(calibrated, tmp_path):
    measured, out = replace(calibrated[0], sensitivity=np.random.default_rng(0).random((3, 3))), tmp_path / "a.hetcal"
    measured.save(out)
    loaded = Calibration.load(out)
    for name in (
        "timesteps",
        "gram",
        "sources",
        "offsets",
        "partial",
        "probes",
        "log_amplification",
        "sensitivity",
        "counts",
        "attention_mass",
    ):
        assert np.array_equal(getattr(loaded, name), getattr(measured, name))
    assert (loaded.clips, loaded.settings["margin"]) == (measured.clips, 1.0)
    assert loaded.attentions == measured.attentions
    assert (loaded.costs.full, loaded.costs.reuse) == (measured.costs.full, measured.costs.reuse)
    assert np.array_equal(loaded.costs.partial, measured.costs.partial)
    assert np.array_equal(loaded.partial_errors(), measured.partial_errors())


def test_files_that_are_no_calibrations(calibrated, tmp_path):
    _, out, _ = calibrated
    whole = out.read_bytes()
    header = json.dumps({"clips": [], "settings": {}, "costs": None})

    def damaged(change):
        arrays = load_file(out)
        metadata = {"format": "hetcal", "schema_version": "1", "calibration": header}
        change(arrays, metadata)
        save_file(arrays, tmp_path / "b.hetcal", metadata=metadata)
        return (tmp_path / "b.hetcal").read_bytes()

    cases = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "other format": damaged(lambda a, m: m.update(format="hetplan")),
        "other schema": damaged(lambda a, m: m.update(schema_version="9")),
        "no header": damaged(lambda a, m: m.pop("calibration")),
        "no array": damaged(lambda a, m: a.pop("gram")),
        "other shape": damaged(lambda a, m: a.update(gram=a["gram"][:, :2].clone())),
        "not finite": damaged(lambda a, m: a.update(partial=a["partial"] / 0)),
        "rising timesteps": damaged(lambda a, m: a.update(timesteps=a["timesteps"].flip(0))),
        "sources too late": damaged(lambda a, m: a.update(sources=a["sources"] + STEPS)),
        "offset 0": damaged(lambda a, m: a.update(offsets=a["offsets"] - 1)),
    }
    bad = tmp_path / "bad.hetcal"
    for name, content in cases.items():
        bad.write_bytes(content)
        with pytest.raises(CalibrationError, match=r"bad\.hetcal"):
            raise AssertionError(f"{name} was read: {Calibration.load(bad)}")
    with pytest.raises(CalibrationError, match="no calibration at"):
        Calibration.load(tmp_path / "missing.hetcal")


def test_what_cannot_be_calibrated(pipe, checkpoint, tmp_path):
    arguments = ([clip(1)], tmp_path / "a.hetcal", lambda *_: None)
    with pytest.raises(CalibrationError, match="at least 3 steps"):
        calibrate(pipe, *arguments, num_inference_steps=2)
    two = load_pipeline(checkpoint, torch.float32, "cpu")
    two.register_modules(transformer_2=two.transformer)
    with pytest.raises(CalibrationError, match="two transformers"):
        calibrate(two, *arguments)
    plan = hetcache.Plan.from_token_mask(np.ones(30, dtype=bool), (2, 3, 5))
    for shape in ((1, 4, 2, 3, 7), (1, 30, 4)):
        with pytest.raises(CalibrationError, match="no video on token grid"):
            kind_masks(plan, torch.zeros(shape))


def test_calibration_clips_are_not_those_that_judge():
    clips = reference.calibration_clips(3, frames=5, size=32)
    assert [c.video.shape for c in clips] == [(5, 32, 32, 3)] * 3
    assert set(TRAINING_TEXTURES).isdisjoint(HELD_OUT_TEXTURES)
    whole, held_out = reference.calibration_clips(3), reference.held_out(3)
    assert whole[0].truth.shape == held_out[0].truth.shape
    assert len({c.truth.tobytes() for c in (*whole, *held_out)}) == 6
    again = reference.calibration_clips(3, frames=5, size=32)
    assert all(np.array_equal(a.video, b.video) for a, b in zip(clips, again, strict=True))


def test_calibrate_and_plan_on_the_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hetcache", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    calibration, mask = tmp_path / "model.hetcal", tmp_path / "mask.npy"
    np.save(mask, moving_mask(FRAMES, SIZE, SIZE))
    status, out, err = run(
        "calibrate", "--model", checkpoint, "--clips", 1, "--steps", STEPS, "--num-frames", FRAMES, "--height", SIZE,
        "--width", SIZE, "--max-sequence-length", 16, "--guidance-scale", 1, "--dtype", "float32", "--inner", "eager",
        "-o", calibration,
    )  # fmt: skip
    assert status == 0, err
    assert "1 clips, 5 steps" in out
    # Times as small as these are noise: fixed ones make the budget one that can be kept.
    known = replace(Calibration.load(calibration), costs=Costs(1.0, 0.01, np.array([0.5]), np.array([0.5])))
    known.save(calibration)
    plan = ("plan", "--mask", mask, "--num-frames", FRAMES, "--height", SIZE, "--width", SIZE, "--steps", 8)
    path = tmp_path / "a.hetplan"
    for model in ((), ("--model", checkpoint)):
        status, out, err = run(*plan, *model, "--budget", "2x", "--calibration", calibration, "-o", path)
        assert status == 0, err
        made = hetcache.Plan.load(path)
        assert made.schedule == "optimal:2x"
        assert "less time in the model than 8 FULL steps" in out
        assert "balanced" in out
        assert "chosen, the first of:" in out
        assert out.count("margin 1") == 4, "all variants of that margin were considered"
        assert "not measured" not in out
    status, out, _ = run(*plan, "--budget", "2x", "--calibration", calibration, "-o", path, "--set", "cached_ratio=0")
    assert "not measured, so what is expected leaves it out: cached_ratio 0" in out
    status, out, _ = run(*plan, "--budget", "2x", "--calibration", calibration, "-o", path, "--set", "shared_context=1")
    assert "shared_context: the time is that of two calls a step; what it misses was not measured\n" in out
    assert "shared by the calls of a step" in out
    status, out, _ = run(*plan, "--margin", 5, "--budget", "2x", "--calibration", calibration, "-o", path)
    assert "leaves it out: margin 5.0\n" in out, "1 and 2 were measured"
    status, out, _ = run(*plan, "--budget", "2x", "--calibration", "reference", "-o", path)
    assert "the calibration is of 50 steps" in out
    old = known.like({"margin": 1.0})
    old.save(tmp_path / "old.hetcal")
    narrow = ("--margin", 1, "--set", "multiple=1", "--budget", "2x", "--calibration", tmp_path / "old.hetcal")
    status, out, _ = run(*plan, *narrow, "-o", path)
    assert "leaves it out: context_motion 1\n" in out, "context moves by default, and this one did not measure it"
    assert hetcache.Plan.load(path).context_motion == 1
    paper = ("--model", checkpoint, "--schedule", "paper-fast", "--calibration", calibration)
    status, out, err = run(*plan, *paper, "-o", path)
    assert status == 0, err
    for option in ("margin 5.0", "margin_ratio 0.7", "selection hetcache"):
        assert option in out.partition("leaves it out: ")[2], "a preset's own options"
    assert "another model" not in err
    other = tmp_path / "other.hetcal"
    replace(known, settings={**known.settings, "weights": "0" * 16, "processor": "Z80"}).save(other)
    status, out, err = run(*plan, "--model", checkpoint, "--budget", "2x", "--calibration", other, "-o", path)
    assert status == 0, err
    assert "another model" in " ".join(err.split())
    status, out, err = run(*plan, "--calibration", calibration, "-o", path)
    assert status == 0, err
    assert hetcache.Plan.load(path).schedule == "optimal:1%", "the default of a calibration"
    beside = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, beside)
    known.save(beside / "model.hetcal")
    status, out, err = run(*plan, "--model", beside, "--budget", "2x", "-o", path)
    assert status == 0, err
    assert hetcache.Plan.load(path).schedule == "optimal:2x", "found in the model's folder"
    for arguments in (("--video", mask), ("--video", mask, "--mask", mask, "--clips", 1)):
        status, _, err = run("calibrate", *arguments, "-o", path)
        assert status == 2
        assert "give each --video a --mask" in " ".join(err.split())
    for arguments, message in (
        (("--budget", "2x"), "needs a calibration"),
        (("--budget", "2x", "--schedule", "FRRP"), "leave --schedule FRRP out"),
        (("--budget", "fast", "--calibration", calibration), "time factor such as 3x"),
        (("--budget", "2x", "--calibration", mask), "cannot be read as a calibration"),
        (("--budget", "90x", "--calibration", calibration), "90x faster"),
    ):
        status, _, err = run(*plan, *arguments)
        assert status == 2
        assert message in " ".join(err.split())
        assert "Traceback" not in err


def test_a_calibration_of_another_machine_is_told(pipe, calibrated):
    known, here = (
        calibrated[0],
        {"weights": weights_digest(pipe), "dtype": "float32", "processor": processor_name("cpu")},
    )
    assert measured_elsewhere(replace(known, settings=here), pipe, "cpu") == []
    elsewhere = replace(known, settings={**here, "processor": "Z80"})
    (warning,) = measured_elsewhere(elsewhere, pipe, "cpu")
    assert "of Z80, not of" in warning
    assert measured_elsewhere(elsewhere, pipe) == [], "a plan may be made on another machine than it runs on"


@pytest.mark.parametrize(
    ("steps", "of_them", "said"),
    [
        (1, 1, False),
        (2, 2, False),
        (3, 3, True),
        (8, 8, True),
        (8, 4, True),
        (9, 9, False),
        (9, 4, False),
        (50, 8, False),
    ],
)
def test_few_steps_want_a_calibration_of_their_own(steps, of_them, said):
    """Of as many as an edit of the whole path takes, also where this one begins in the middle."""
    shipped = Calibration.load(reference.CALIBRATION)
    plan = replace(
        hetcache.Plan.from_token_mask(np.arange(8) < 2, (2, 2, 2), num_inference_steps=of_them),
        timesteps=shipped.timesteps_for(steps)[-of_them:],
    )
    line = calibrated_in_more(shipped, plan)
    assert (f"calibrate --steps {steps})" in line) == bool(line) == said
    if steps == of_them:
        assert calibrated_in_more(shipped, replace(plan, timesteps=np.zeros(0))) == line


def test_own_clips_are_calibrated_on_each(checkpoint, tmp_path, monkeypatch, capsys):
    taken = []

    def calibrate(pipe, edits, *_, **__):
        taken.extend(edits)
        raise CalibrationError("enough")

    monkeypatch.setattr("hetcache_compile.bench.calibrate.calibrate", calibrate)
    mask, videos = tmp_path / "mask.npy", [tmp_path / f"{name}{demo_clip().suffix}" for name in "ab"]
    np.save(mask, moving_mask(FRAMES, SIZE, SIZE))
    for video in videos:
        shutil.copy(demo_clip(), video)
    each = [("--video", video, "--mask", mask, "--prompt", f"prompt of {video.stem}") for video in videos]
    size = ("--height", SIZE, "--width", SIZE, "--num-frames", FRAMES)
    arguments = ("calibrate", "--model", checkpoint, *size, *each[0], *each[1], "-o", tmp_path / "x.hetcal")
    monkeypatch.setattr(sys, "argv", ["hetcache", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "enough" in capsys.readouterr().err
    assert [(edit.name, edit.prompt) for edit in taken] == [("a", "prompt of a"), ("b", "prompt of b")]


def test_clips_of_one_name_are_refused(pipe, tmp_path):
    with pytest.raises(CalibrationError, match="names of their own"):
        calibrate(pipe, [clip(1), clip(1)], tmp_path / "x.hetcal", lambda *_: None, **SETTINGS)


def test_a_plan_with_a_calibration_is_searched_by_default(pipe, calibrated):
    known = replace(calibrated[0], costs=Costs(1.0, 0.01, np.array([0.5]), np.array([0.5])))
    c = clip(1)
    request = EditRequest(c.video, c.mask, c.prompt, num_inference_steps=8, guidance_scale=1.0, max_sequence_length=16)
    assert make_plan(pipe, request, None).schedule == "balanced"
    assert make_plan(pipe, request, None, calibration=known).schedule == "optimal:1%"
    assert make_plan(pipe, request, "FRRP", calibration=known, margin=2.0).schedule == "FRRP"


def test_the_calibration_that_is_shipped_can_be_used():
    assert reference.CALIBRATION.stat().st_size < 200_000
    shipped = Calibration.load(reference.CALIBRATION)
    assert shipped.clips
    assert set(shipped.clips).isdisjoint(c.name for c in reference.held_out(3))
    steps = optimal_schedule(shipped, "3x", shipped.timesteps_for(20), share=0.3)
    assert expect(shipped, steps, shipped.timesteps_for(20), share=0.3).time_factor >= 3


@pytest.mark.wide
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_amplification_is_what_becomes_of_a_repeated_step(pipe, calibrated, guidance, monkeypatch):
    """Another way to put the same error in: a session that repeats one step."""
    monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))  # whose steps have lengths
    empty, c = emptied(calibrated[0]), clip(1)
    request = EditRequest(
        c.video, c.mask, c.prompt, num_inference_steps=STEPS, guidance_scale=guidance, max_sequence_length=16
    )
    plan = make_plan(pipe, request, "full", margin=1.0, multiple=1, extrapolation=0)
    one = empty.add("clip 1", measure_clip(pipe, request, [plan], empty, lambda *_: None))
    assert one.probes.tolist() == [1, 2, 3]
    true, cached = [], []
    run_pipeline(pipe, request, "uncached", lambda *_: None, decode=False, latents=true)
    with (
        compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}),
        hetcache.session(plan.with_schedule(list("FFRFF"))),
    ):
        run_pipeline(pipe, request, "session", lambda *_: None, decode=False, latents=cached)
    amplification, sways = one.amplification_at(one.timesteps), one.sways_at(one.timesteps)
    wrong = [cached[step] - true[step] for step in (2, 3, -1)]
    for kind, mask in zip(TokenKind, kind_masks(plan, true[0]), strict=True):
        before, added, after = (
            float(error[..., mask].square().sum().sqrt()) for error in (wrong[0], wrong[1] - wrong[0], wrong[-1])
        )
        assert amplification[kind, 2] == pytest.approx(after / before, rel=1e-2)
        if guidance == 1:  # else the outputs of two branches are weighed against each other
            assert sways[kind, 3] == pytest.approx(added / before, rel=1e-2)
    assert amplification[:, -1] == pytest.approx(1)


def test_what_older_calibrations_do_not_know_counts_as_nothing(calibrated):
    older = replace(calibrated[0], sensitivity=np.zeros((3, 0)))
    measured = replace(older, sensitivity=np.ones((3, older.probes.size)))
    assert not older.sways_at(older.timesteps).any()
    gone_on_with = older.add("another", Measured(measured.gram, measured.partial, np.ones(3, bool)))
    assert gone_on_with.sensitivity.shape == (3, 0)
    steps = tuple(hetcache.StepKind[name] for name in ("FULL", "REUSE", "FULL", "REUSE", "FULL"))
    corrects = Prediction(1, fitted=True, corrects=True)
    errors = [expect(known, steps, known.timesteps, 0.5, corrects).error for known in (older, measured)]
    assert errors[1] > 1.01 * errors[0]


def test_errors_count_as_they_are_amplified(calibrated):
    measured, *_ = calibrated
    louder = replace(measured, log_amplification=measured.log_amplification + np.log(2))
    steps = hetcache.Plan.from_token_mask(
        np.arange(8) < 2, (2, 2, 2), num_inference_steps=STEPS, schedule=list("FRFFF")
    ).steps
    errors = [expect(known, steps, known.timesteps, 0.5).error for known in (measured, louder)]
    assert errors[1] == pytest.approx(2 * errors[0])


@pytest.mark.parametrize("patched", [False, True], ids=["its own forward", "a forward of another library"])
def test_a_model_computes_otherwise_only_for_a_while(patched: bool) -> None:
    model = torch.nn.Identity()
    if patched:
        model.forward = torch.negative

    def fail() -> None:
        with computed_by(model, lambda x: 3 * x):
            assert model(2) == 6
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model(torch.tensor(2)) == (-2 if patched else 2)
    assert ("forward" in vars(model)) == patched
