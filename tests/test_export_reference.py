"""The trained reference model through the whole exporter: parity of each form and of an edit, engines built."""

from __future__ import annotations

import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile import engine, reference
from hetcache_compile.edit.editing import EditRequest, load_engine_pipeline, make_plan, run_planned

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from hetcache_compile.engine.manifest import Manifest
from hetcache_compile.export.check.verify import verify_with_ort
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.model.sample_call import CallShape
from hetcache_compile.export.trt import build as trt

pytestmark = pytest.mark.wide
STEPS = 20


@pytest.fixture(scope="module")
def request_():
    clip = reference.procedural_clip(0)
    return EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=STEPS, guidance_scale=1.0,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan(request_):
    return make_plan(reference.load(), request_, "FRRPRRPRR", margin=1.0)


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory):
    """`verify_with_ort` raises where a form is not within 1e-5 of torch."""
    out = tmp_path_factory.mktemp("reference") / "export"
    shape = CallShape(plan, text_tokens=reference.MAX_TEXT_LENGTH)
    export_model(str(reference.FOLDER), plan, out, ExportOptions(baseline=False), shape=shape, checks=[verify_with_ort])
    return out


def test_a_twenty_step_edit_on_onnxruntime_equals_torch(request_, plan, folder):
    torch._dynamo.reset()
    pipe = reference.load()
    pipe.transformer = torch.compile(pipe.transformer, backend="hetcache", options={"inner": "eager"})
    expected = latents_of(pipe, request_, plan)
    actual = latents_of(load_engine_pipeline(reference.FOLDER, engine.load(folder)), request_, plan)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


def latents_of(pipe, request, plan):
    """The latents after the last step: frames are rounded to 8 bits, which would hide a difference."""
    seen = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **kwargs: (seen.append(latents), decode(latents, **kwargs))[1]
    run = run_planned(pipe, request, plan, "test", lambda *_: None)
    assert run.stats.steps == {kind.name: plan.steps.count(kind) for kind in hetcache.StepKind}
    return seen[0]


def test_tensorrt_for_rtx_builds_its_engines(folder):
    pytest.importorskip("polygraphy", reason="needs the extra trt-rtx")
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    manifest = trt.build_engines(folder, Manifest.load(folder), trt.RTX, ("8.9",))
    assert set(manifest.engines["rtx"].forms) == {"full", "partial", "reuse"}
