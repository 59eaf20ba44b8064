"""Engines as the transformer of a real pipeline, on onnxruntime; and that what runs is what was asked for."""

from __future__ import annotations

import dataclasses
import json
import sys

import exported
import models
import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile import engine
from hetcache_compile.cli import main as cli
from hetcache_compile.edit.editing import load_engine_pipeline, load_pipeline
from hetcache_compile.edit.media import to_pictures, write_video
from hetcache_compile.engine import runners
from hetcache_compile.engine.manifest import Manifest
from hetcache_compile.errors import ExportError, SessionError
from hetcache_compile.reference.demo import save_random_checkpoint

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from hetcache_compile.export.check import latency, verify
from hetcache_compile.export.check.verify import verify_with_ort
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.lowering import sum_by_products

FRAMES, SIZE, STEPS = 5, 64, 20


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    mask[:, 20:30, 18:40] = True
    return mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, width=64, layers=1)
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint, mask):
    pipe = load_pipeline(checkpoint, torch.float32, "cpu")
    return hetcache.plan_for(
        pipe, mask=mask, height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=STEPS, multiple=1
    )


@pytest.fixture(scope="module")
def folder(checkpoint, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("engine") / "export"
    export_model(str(checkpoint), plan, out)
    return out


def call(pipe, mask, **kwargs):
    video = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    arguments = {
        "prompt": "a cat", "negative_prompt": "a dog", "video": to_pictures(video), "mask": to_pictures(mask),
        "height": SIZE, "width": SIZE, "num_frames": FRAMES, "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0), "output_type": "latent",
    }  # fmt: skip
    return pipe(**{**arguments, **kwargs}).frames


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_a_whole_edit_with_guidance_equals_the_compiled_model(checkpoint, folder, plan, mask):
    torch._dynamo.reset()
    pipe = load_pipeline(checkpoint, torch.float32, "cpu")
    plain = call(pipe, mask)
    pipe.transformer = torch.compile(pipe.transformer, backend="hetcache", options={"inner": "eager"})
    with hetcache.session(plan):
        expected = call(pipe, mask)
    pipe = load_engine_pipeline(checkpoint, engine.load(folder))
    with hetcache.session(plan) as session:
        actual = call(pipe, mask)
    assert relative(actual, expected) < 1e-5
    assert relative(expected, plain) > 1e-4, "the plan reuses steps, so an engine that computed all would show"
    assert session.stats.steps == {kind.name: 2 * plan.steps.count(kind) for kind in hetcache.StepKind}
    assert session.stats.cache_bytes > 0
    assert relative(call(pipe, mask), plain) < 1e-5, "outside a session an engine is the plain model"


def test_the_cache_is_passed_on_without_a_copy(folder, plan, monkeypatch):
    loaded = engine.load(folder)
    addresses = []

    def spy(kind):
        run = prepare(kind)

        def recorded(inputs, outputs):
            addresses.append((kind, {n: t.data_ptr() for n, t in inputs.items()},
                              {n: t.data_ptr() for n, t in outputs.items()}))  # fmt: skip
            run(inputs, outputs)

        return recorded

    prepare = loaded.runner.prepare
    monkeypatch.setattr(loaded.runner, "prepare", spy)
    kwargs = sample_kwargs(loaded.manifest)
    with hetcache.session(plan.with_schedule([*"FPPRF", *"F" * (STEPS - 5)])):
        for time in plan.timesteps[:5]:
            loaded(**{**kwargs, "timestep": torch.full_like(kwargs["timestep"], float(time))})
    (_, _, full), (_, first, first_out), (_, second, second_out), (_, reuse, _), (_, _, again) = addresses
    for entry in loaded.manifest.cache:
        assert full[entry.output] == first[entry.input]
        if entry.output in first_out:
            assert first_out[entry.output] == second[entry.input] != first[entry.input]
            assert second_out[entry.output] == reuse[entry.input] == first[entry.input], "two buffers take turns"
        else:
            assert second[entry.input] == first[entry.input] == again[entry.output]


def sample_kwargs(manifest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    specs = [spec for spec in manifest.forms["full"].inputs if spec.role == "model"]
    return {spec.name: torch.rand(spec.shape, generator=generator) for spec in specs}


def test_wrong_calls_and_plans_are_refused(folder, plan):
    loaded = engine.load(folder)
    kwargs = sample_kwargs(loaded.manifest)
    with pytest.raises(hetcache.HetCacheError, match=r"exported for the inputs .*timestep"):
        loaded(hidden_states=kwargs["hidden_states"])
    short = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][:, :5]}
    with pytest.raises(hetcache.HetCacheError, match=r"encoder_hidden_states \[1, 512, 64\].*\[1, 5, 64\]"):
        loaded(**short)
    active = np.zeros(plan.num_tokens, dtype=bool)
    active[: plan.num_active + 1] = True
    other = hetcache.Plan.from_token_mask(active, plan.grid, num_inference_steps=STEPS)
    with pytest.raises(hetcache.SessionError, match="export it with this plan"), hetcache.session(other):
        loaded(**kwargs)
    hosted = dataclasses.replace(plan, cache_device="cpu")
    with pytest.raises(hetcache.SessionError, match="make the plan without cache_device"), hetcache.session(hosted):
        loaded(**kwargs)
    with pytest.raises(hetcache.SessionError, match="one mask for all samples"), hetcache.session([plan, plan]):
        loaded(**kwargs)
    indices = {"active_index": torch.arange(plan.num_active), "context_index": torch.arange(plan.num_context)}
    with pytest.raises(hetcache.HetCacheError, match="with a full step"):
        loaded.run_form("partial", kwargs, indices, {})


def test_what_a_full_step_reads_begins_with_its_initial_value_at_the_plans_sizes(folder, plan):
    loaded = engine.load(folder)
    entries = {entry.input: entry for entry in loaded.manifest.cache}
    indices = {"active_index": torch.arange(4), "context_index": torch.arange(9)}
    state = loaded.begin(indices)
    assert set(state) == {"past_output.0", "past_output.0.1", "past_output.0.times"}
    assert (state["past_output.0.times"] == entries["past_output.0.times"].initial).all()
    assert not state["past_output.0.1"].any()
    free = dataclasses.replace(entries["past_output.0.1"], shape=(1, "num_context", 7))
    loaded.manifest = dataclasses.replace(loaded.manifest, cache=(free,))
    assert loaded.begin(indices)["past_output.0.1"].shape == (1, 9, 7)


def test_values_that_are_no_numbers_stop_a_session(folder, plan):
    loaded = engine.load(folder)
    kwargs = sample_kwargs(loaded.manifest)
    kwargs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    kwargs["timestep"].fill_(float(plan.timesteps[0]))
    with pytest.raises(hetcache.NonFiniteError), hetcache.session(plan):
        loaded(**kwargs)


def test_another_provider_than_asked_for_is_an_error(folder, monkeypatch, tmp_path):
    with pytest.raises(hetcache.HetCacheError, match="unknown provider 'cuda'"):
        engine.load(folder, provider="cuda")
    with pytest.raises(hetcache.HetCacheError, match="no export folder"):
        engine.load(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(hetcache.HetCacheError, match="CUDAExecutionProvider"):
            engine.load(folder, provider="ort-cuda")
    import onnxruntime

    # What onnxruntime-gpu does on a machine without CUDA: it lists the provider, then runs on the CPU.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    runner = runners.OrtRunner(folder, Manifest.load(folder), "ort-cuda")
    with pytest.raises(hetcache.HetCacheError, match=r"would run on CPUExecutionProvider|cannot load"):
        runner.prepare("full")


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_without_engines_says_how_to_get_them(folder, provider):
    with pytest.raises(hetcache.HetCacheError, match="hetcache-export --trt="):
        engine.load(folder, provider=provider)


def test_a_damaged_manifest_is_one_clear_line(folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"schema_version": 99}, "schema 99"),
        ({"format": "other"}, "another program"),
        ({"forms": None}, "cannot be read"),
        ({"opset": "20"}, "cannot be read"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(data | change))
        with pytest.raises(hetcache.HetCacheError, match=message):
            engine.load(tmp_path)
    manifest = Manifest.load(folder)
    assert dataclasses.replace(manifest) == manifest


def test_edit_runs_from_an_engine(checkpoint, folder, plan, mask, tmp_path, monkeypatch, capsys):
    video = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    write_video(tmp_path / "in.mp4", video, fps=8)
    np.save(tmp_path / "mask.npy", mask)
    short = plan.with_steps(plan.steps[:4])
    short.save(tmp_path / "short.hetplan")
    arguments = (
        "edit", "--model", checkpoint, "--engine", folder, "--plan", tmp_path / "short.hetplan",
        "--video", tmp_path / "in.mp4", "--mask", tmp_path / "mask.npy", "--prompt", "a cat",
        "--out", tmp_path / "out", "--height", SIZE, "--width", SIZE, "--num-frames", FRAMES,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["hetcache", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == {"FULL": 2, "PARTIAL": 2, "REUSE": 4}
    assert report["psnr_generative_db"] > 10


def test_bench_engine_times_every_form(folder, tmp_path, monkeypatch, capsys):
    arguments = ["hetcache", "bench", "engine", str(folder), "--rounds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["forms"]) == ["plain", "full", "partial", "reuse"]
    for form in result["forms"].values():
        assert 0 < form["median_seconds"] <= form["p90_seconds"]
        assert form["first_seconds"] > 0
    steps, forms = result["steps"], result["forms"]
    total = sum(count * forms[kind]["median_seconds"] for kind, count in steps.items())
    assert result["plan_seconds"] == pytest.approx(total)
    assert result["predicted_speedup"] == pytest.approx(sum(steps.values()) * forms["plain"]["median_seconds"] / total)
    assert result["runs_on"].endswith("CPUExecutionProvider")
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert f"polygraphy run {folder / 'partial.onnx'} --onnxrt --data-loader-script" in out
    assert f"trtexec --onnx={folder / 'partial.onnx'} --stronglyTyped --loadInputs='active_index':" in out


@pytest.mark.wide
def test_bench_engine_times_other_budgets_of_an_export_with_free_sizes():
    result = latency.bench_engine(exported.export("fp32", 23, True), "ort-cpu", 2, lambda *_: None)
    assert list(result["by_active_share"]) == [f"{active / models.NUM_TOKENS:.3f}" for active in (20, 27, 40)]
    ratios = [at["flop_ratio"] for at in result["by_active_share"].values()]
    assert ratios == sorted(ratios)
    assert ratios[1] == result["forms"]["partial"]["flop_ratio"]
    assert all(at["time_ratio"] > 0 for at in result["by_active_share"].values())
    assert "partial / full by M/N" in latency.conclusions(result)[0]


def test_the_exported_package_has_no_hidden_state(folder):
    """Two engines of one folder do not share caches, and an export is read-only."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    first, second = engine.load(folder), engine.load(folder)
    kwargs = sample_kwargs(first.manifest)
    kwargs["timestep"].fill_(float(first.plan.timesteps[0]))
    with hetcache.session(first.plan):
        a = first(**kwargs).sample
        b = second(**kwargs).sample
    assert torch.equal(a, b), "the second engine's first step is FULL, whatever the first has done"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.wide
@pytest.mark.parametrize("how", ["merged", "moving"])
def test_engines_read_predicted_context_that_is_merged_or_moves(tmp_path, how):
    """Parity of every form is checked by `verify_with_ort`; then the engine in a session against the forms."""
    whole = exported.plan_of(schedule=list("FFPRFP" + "R" * 14), extrapolation=1, context_extrapolation=1)
    merged = dataclasses.replace(whole, context_cluster=np.arange(whole.num_context) // 3)
    plan = merged if how == "merged" else dataclasses.replace(whole, context_motion=1)
    out = tmp_path / how
    options = ExportOptions(baseline=False)
    export_model(str(exported.checkpoint()), plan, out, options, shape=exported.shape(), checks=[verify_with_ort])
    made = exported.source()
    forms = hetcache.rewrite(made.model, plan, (), made.kwargs)
    loaded, cache = engine.load(out), {}
    times = [900.0, 400.0, 800.0, 700.0, 600.0, 500.0, *np.linspace(390, 10, 14)]  # the second one looks ahead
    with hetcache.session(dataclasses.replace(plan, timesteps=np.array(times)), strict=True), torch.no_grad():
        for time, kind in zip(times, plan.steps[:6], strict=False):
            kwargs = {**made.kwargs, "timestep": torch.full_like(made.kwargs["timestep"], time)}
            expected, cache = forms.run(kind.form, cache, (), kwargs)
            actual = loaded(**kwargs, return_dict=False)
            torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    with hetcache.session(whole), pytest.raises(SessionError, match="export it with this plan"):
        loaded(**made.kwargs)


@pytest.mark.wide
def test_engines_cluster_context(tmp_path, monkeypatch):
    """Sums of clusters in blocks that do not divide them; a session goes through another mask's seeds."""
    monkeypatch.setattr(sum_by_products, "LARGEST_MEMBERSHIP", 1000)
    out = tmp_path / "clustered"
    plans = [
        dataclasses.replace(whole, context_cluster=np.arange(whole.num_context) // 3, merging="kmeans")
        for whole in (exported.plan_of(seed=seed, schedule=list("FPPR" * 5)) for seed in range(2))
    ]
    manifest = export_model("exported:tiny_dit", plans[0], out, ExportOptions(baseline=False), checks=[verify_with_ort])
    assert "past_key_values.0.log_size" in {entry.input for entry in manifest.cache}
    assert "context_log_size" not in {spec.name for form in manifest.forms.values() for spec in form.inputs}
    model, kwargs = exported.tiny_dit(plans[1])
    forms, loaded, cache = hetcache.rewrite(model, plans[1], (), kwargs), engine.load(out), {}
    with hetcache.session(plans[1]), torch.no_grad():
        for seed, kind in enumerate(plans[1].steps[:4]):
            kwargs = models.tiny_call(seed)
            expected, cache = forms.run(kind.form, cache, (), kwargs)
            torch.testing.assert_close(loaded(**kwargs).sample, expected, atol=1e-5, rtol=1e-5)
    boxes = dataclasses.replace(plans[0], merging="boxes")
    with hetcache.session(boxes), pytest.raises(SessionError, match=r"merging \(kmeans, boxes\)"):
        loaded(**kwargs)


def test_centroids_may_differ_in_a_few_keys_that_lie_between_two():
    """In half precision only, and only those of attentions that draw their own clusters."""
    generator = torch.Generator().manual_seed(0)
    right = {name: torch.randn(1, 2, 40, 3, generator=generator) for name in ("0.key", "1.key")}
    right["0.log_size"] = torch.zeros(1, 40)

    def error(agreeing, **differing):
        wrong = {name: tensor.clone() for name, tensor in right.items()}
        for name, number in differing.items():
            wrong[f"{name[1:]}.key"][:, :, :number] = 0
        return max(verify.relative_errors(wrong, right, agreeing).values())

    assert error(0.95, _0=2) == 0
    assert error(0.95, _0=3) > 0.1
    assert error(1.0, _0=1) > 0.1
    assert error(0.95, _1=1) > 0.1


def test_plans_that_engines_cannot_follow_are_refused(tmp_path):
    mask = np.zeros(models.GRID, dtype=bool)
    mask[0, 0, 0] = True
    chosen = hetcache.Plan.from_mask(mask, models.GRID, selection="hetcache")
    with pytest.raises(ExportError, match="selection=uniform"):
        export_model(str(exported.checkpoint()), chosen, tmp_path / "out", shape=exported.shape())
    merged = hetcache.Plan.from_mask(mask, models.GRID, merged_ratio=0.5)
    with pytest.raises(ExportError, match="merged_ratio=1"):
        export_model(
            str(exported.checkpoint()),
            merged,
            tmp_path / "out",
            ExportOptions(dynamic_active=(8, 32, 40)),
            shape=exported.shape(),
        )
    assert not (tmp_path / "out").exists()
