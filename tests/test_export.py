"""ONNX files: the values of torch, clean names, shared weights, and a manifest that other programs can read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import exported
import models
import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile import engine
from hetcache_compile.engine.manifest import SCHEMA_FILE, Manifest, sha256_of
from hetcache_compile.export.lowering import pipeline
from hetcache_compile.export.lowering.interleave import interleave_writes
from hetcache_compile.export.lowering.subject import Lowering
from hetcache_compile.passes.ir.editor import PassError
from hetcache_compile.plan.plan import Plan

onnx = pytest.importorskip("onnx", reason="needs the extra ort")
pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from hetcache_compile.errors import ExportError  # noqa: E402
from hetcache_compile.export.check.verify import relative_errors, verify_with_ort  # noqa: E402
from hetcache_compile.export.exporter import ExportOptions, export_model  # noqa: E402
from hetcache_compile.export.model.sample_call import CallShape  # noqa: E402
from hetcache_compile.export.model.source import load_source  # noqa: E402
from hetcache_compile.export.onnx.folder import new_folder  # noqa: E402

FORMS = [
    pytest.param(("fp32", 20, False), id="opset 20"),
    pytest.param(("fp32", 23, True), id="opset 23, free sizes", marks=pytest.mark.wide),
]
CHAIN = ("full", "partial", "partial", "reuse")
OF_OPSET = [
    (20, "spell_out_attention", "fuse_rotary_embedding"),
    (23, "fuse_rotary_embedding", "spell_out_attention"),
]


@pytest.fixture(params=FORMS)
def folder(request):
    return exported.export(*request.param)


def test_every_form_gives_the_values_of_torch(folder):
    """On other inputs than those that the export was checked with."""
    check_chain(folder, exported.plan_of(), 1e-5)


@pytest.mark.wide
def test_half_precision_is_close_to_torch():
    check_chain(exported.export("fp16", 20), exported.plan_of(), 5e-3, dtype="fp16")


@pytest.mark.wide
@pytest.mark.parametrize("active", [20, 33, 40])
def test_one_export_with_free_sizes_serves_other_budgets(active):
    check_chain(exported.export("fp32", 23, True), exported.plan_of(active, seed=active), 1e-5)


def check_chain(folder: Path, plan: Plan, tolerance: float, dtype: str = "fp32") -> None:
    source = exported.source(dtype, seed=5)
    forms = hetcache.rewrite(source.model, plan, kwargs=source.kwargs)
    loaded = engine.load(folder)
    inputs = loaded.model_inputs(source.kwargs)
    indices = {name: torch.as_tensor(getattr(plan, name)) for name in ("active_index", "context_index")}
    expected, cache = {}, loaded.begin(indices)
    for kind in CHAIN:
        with torch.no_grad():
            output, expected = forms.run(kind, expected, (), source.kwargs)
        outputs, written = loaded.run_form(kind, inputs, indices, cache)
        cache.update(written)
        errors = relative_errors({**outputs, **written}, {"sample": output[0], **expected})
        assert max(errors.values()) < tolerance, kind
        assert set(written) == {entry.input_name for entry in forms.by_kind[kind].writes}


def test_the_baseline_is_the_unmodified_model(folder):
    """Where there is no baseline form, a full step whose cache is dropped."""
    source = exported.source(seed=5)
    with torch.no_grad():
        expected = source.model(**source.kwargs).sample
    loaded = engine.load(folder)
    assert relative_errors({"sample": loaded(**source.kwargs).sample}, {"sample": expected})["sample"] < 1e-5
    (again,) = loaded(**source.kwargs, return_dict=False)
    assert torch.equal(again, loaded(**source.kwargs).sample)


def test_names_are_module_paths_and_nothing_tells_of_this_machine(folder):
    parameters = dict(exported.source().model.named_parameters())
    for kind in sorted(Manifest.load(folder).forms.keys() - {"reuse"}):
        graph = onnx.load(folder / f"{kind}.onnx", load_external_data=False)
        text = graph.SerializeToString()
        for private in (str(Path.cwd()), "site-packages", "/home", "stack_trace", ".py"):
            assert private.encode() not in text
        weights = {tensor.name.removesuffix(".T") for tensor in graph.graph.initializer}
        assert weights >= set(parameters)
        named = [name for name in weights if not name.startswith("constants.") and name not in parameters]
        assert all(name.startswith(("blocks.", "vace_blocks.", "condition_embedder.", "norm_out")) for name in named)
        modules = {name for name, _ in exported.source().model.named_modules()}
        for node in graph.graph.node:
            scope, _, operator = node.name.rpartition("/")
            assert scope in modules
            assert operator.split("_")[0] == node.op_type
        assert graph.producer_name == "hetcache_compile"
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert metadata["hetcache.form"] == kind
        assert json.loads(metadata["hetcache.cache"])["present.0.key"] == "past_key_values.0.key"


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_rotary_embedding_needs_no_scatter_and_later_opsets_fuse_it():
    early, late = exported.export("fp32", 20), exported.export("fp32", 23, True)
    assert "ScatterND" not in operators(early / "full.onnx")
    assert "Softmax" in operators(early / "full.onnx")
    for kind in ("full", "partial"):
        found = operators(late / f"{kind}.onnx")
        assert found >= {"Attention", "RMSNormalization", "RotaryEmbedding"}
        assert not found & {"Softmax", "Pow"}
    assert operators(early / "reuse.onnx") == {"Reshape", "Transpose"}


def test_interleaved_writes_are_exact():
    forms = hetcache.rewrite(exported.source().model, exported.plan_of(), kwargs=exported.source().kwargs)
    values = exported.source().kwargs
    expected, _ = forms.full(**values)
    form = forms.by_kind["full"]
    assert any("scatter" in node.name for node in form.module.graph.nodes)
    interleave_writes(Lowering(form.module, {}, {}))
    form.module.recompile()
    assert not any("scatter" in node.name for node in form.module.graph.nodes)
    assert torch.equal(forms.full(**values)[0][0], expected[0])


def test_lowering_is_a_list_of_passes_that_shows_itself(tmp_path, monkeypatch):
    """Each graph is written where asked, the form stays what it was, and an error names the pass that failed."""
    model, kwargs = exported.tiny_dit(exported.plan_of())
    forms = hetcache.rewrite(model, exported.plan_of(), kwargs=kwargs)
    form, program = forms.by_kind["partial"], forms.program
    before = str(form.module.graph)
    monkeypatch.setenv("HETCACHE_DUMP", str(tmp_path))
    for opset, mine, other in OF_OPSET:
        pipeline.lower(form, program, opset)
        names = [passed.__name__ for passed in pipeline.passes_for(opset)]
        assert mine in names
        assert other not in names
        dumped = sorted(path.stem.partition(f"opset {opset}-")[2] for path in tmp_path.glob(f"*opset {opset}-*.py"))
        assert dumped == ["0-given", *(f"{number}-{name}" for number, name in enumerate(names, start=1))]
    assert str(form.module.graph) == before

    def stumble(lowering):
        raise ValueError("a stone")

    monkeypatch.setattr(pipeline, "passes_for", lambda opset: [interleave_writes, stumble])
    with pytest.raises(PassError, match="pass stumble of partial form for opset 20 failed: a stone"):
        pipeline.lower(form, program, 20)


def test_weights_are_stored_once_and_read_back():
    folder = exported.export("fp32", 20)
    manifest = Manifest.load(folder)
    parameters = dict(exported.source().model.named_parameters())
    size = sum(parameter.numel() * 4 for parameter in parameters.values())
    assert manifest.weights.num_bytes < 1.5 * size, "four forms share one file"
    stored = {tensor.name: tensor for tensor in onnx.load(folder / "full.onnx").graph.initializer}
    for name, parameter in parameters.items():
        if f"{name}.T" in stored:
            value = onnx.numpy_helper.to_array(stored[f"{name}.T"]).T
        else:
            value = onnx.numpy_helper.to_array(stored[name])
        np.testing.assert_array_equal(value, parameter.numpy())
    data = (folder / manifest.weights.file).read_bytes()
    for tensor in manifest.weights.tensors.values():
        assert hashlib.sha256(data[tensor.offset : tensor.offset + tensor.length]).hexdigest() == tensor.sha256


def test_the_manifest_follows_its_schema_and_the_files(folder):
    jsonschema = pytest.importorskip("jsonschema")
    text = (folder / "manifest.json").read_text()
    jsonschema.validate(json.loads(text), json.loads(SCHEMA_FILE.read_text()))
    manifest = Manifest.load(folder)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert sha256_of(folder / manifest.weights.file) == manifest.weights.sha256
    for form in manifest.forms.values():
        assert sha256_of(folder / form.file) == form.sha256
        onnx.checker.check_model(folder / form.file, full_check=True)
    plan = Plan.load(folder / manifest.plan.file)
    assert (plan.num_active, plan.grid) == (manifest.plan.num_active, manifest.plan.grid)
    full, partial = manifest.forms["full"], manifest.forms["partial"]
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in full.outputs}
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in partial.inputs}
    for entry in manifest.cache:
        assert outputs[entry.output] == inputs[entry.input] == (entry.dtype, entry.shape)
    assert manifest.layers["0"] == "vace_blocks.0.attn1"
    assert manifest.latents == ("hidden_states", "control_hidden_states")
    assert 0 == manifest.forms["reuse"].flops < partial.flops < full.flops
    assert "plain" not in manifest.forms or manifest.forms["plain"].flops == full.flops
    assert max(manifest.verified["ort-cpu"].values()) < 1e-5


def test_the_schema_refuses_what_is_no_manifest():
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads((exported.export("fp32", 20) / "manifest.json").read_text())
    del data["forms"]["partial"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json.loads(SCHEMA_FILE.read_text()))


def test_shipped_samples_run_in_polygraphy():
    pytest.importorskip("polygraphy", reason="needs the extra trt-rtx")
    folder = exported.export("fp32", 20)
    for kind in ("full", "partial"):
        command = ["run", f"{kind}.onnx", "--onnxrt", "--data-loader-script", f"sample_inputs/load.py:{kind}"]
        done = subprocess.run(
            [Path(sys.prefix) / "bin" / "polygraphy", *command], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sample" in done.stdout


def test_polygraphy_compares_torch_with_onnxruntime(tmp_path):
    pytest.importorskip("polygraphy", reason="needs the extra trt-rtx")
    from hetcache_compile.export.check.compare import compare

    folder = tmp_path / "export"
    shutil.copytree(exported.export("fp32", 20), folder)
    model = str(exported.checkpoint())
    assert compare(folder, model) == {"full": True, "partial": True, "reuse": True}
    stored = Manifest.load(folder).weights.tensors["proj_out.bias"]
    with (folder / "weights.bin").open("r+b") as weights:
        weights.seek(stored.offset)
        weights.write(np.full(3, 9.0, dtype=np.float32).tobytes())
    assert compare(folder, model) == {"full": False, "partial": False, "reuse": True}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("cache_dtype", "opset", "operators"),
    [
        ("bf16", 20, set()),
        ("int8", 20, set()),
        ("int8", 23, {"QuantizeLinear", "DequantizeLinear"}),
    ],
)
def test_a_smaller_cache_type(tmp_path, cache_dtype, opset, operators):
    """The cache is rounded in the engine as in torch; from opset 21 on in the operators that stand for it."""
    plan = dataclasses.replace(exported.plan_of(), cache_dtype=cache_dtype)
    out = tmp_path / "out"
    options = ExportOptions("fp32", opset, baseline=False)
    manifest = export_model(
        str(exported.checkpoint()), plan, out, options, shape=exported.shape(), checks=[verify_with_ort]
    )
    assert max(manifest.verified["ort-cpu"].values()) < 1e-5
    kept = {entry.dtype for entry in manifest.cache if entry.input.endswith((".key", ".value"))}
    assert kept == {"int8" if cache_dtype == "int8" else "bfloat16"}
    found = {kind: onnx.load(out / f"{kind}.onnx", load_external_data=False).graph.node for kind in ("full", "partial")}
    names = {node.op_type for nodes in found.values() for node in nodes}
    assert {name for name in names if "quantize" in name.lower()} == operators
    # and as an engine in a session, which hands its buffers over
    model = engine.load(out, provider="ort-cpu")
    torch_model, kwargs = exported.tiny_vace(plan)
    forms = hetcache.rewrite(torch_model, plan, kwargs=kwargs)
    with torch.no_grad(), hetcache.session(plan.with_schedule("FPR" + "R" * 17)) as session:
        outputs = [model(**{**kwargs, "timestep": kwargs["timestep"] - step})[0] for step in range(3)]
    assert [kind.letter for kind in session.stats.kinds] == ["F", "P", "R"]
    with torch.no_grad():
        (full,), cache = forms.full(**kwargs)
        (partial,), _ = forms.partial(cache, **{**kwargs, "timestep": kwargs["timestep"] - 1})
    torch.testing.assert_close(outputs[0], full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[1], partial, atol=1e-3, rtol=0)  # rounding may fall to the other side


def test_a_cache_in_fp8_is_refused_before_the_long_work(tmp_path):
    plan = dataclasses.replace(exported.plan_of(), cache_dtype="fp8")
    with pytest.raises(ExportError, match="make the plan with cache_dtype=int8"):
        export_model("no/such/model", plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_factory_is_a_model_too(tmp_path):
    source = load_source("exported:tiny_vace", exported.shape(), "fp32")
    assert set(source.kwargs) >= {"hidden_states", "timestep"}
    with pytest.raises(hetcache.HetCacheError, match="cannot be imported"):
        load_source("exported:nothing", exported.shape(), "fp32")


class TinyUnknown(torch.nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture


def unknown(plan: Plan) -> torch.nn.Module:
    return TinyUnknown()


def test_bad_requests_are_one_clear_line_and_leave_nothing(tmp_path):
    plan, out = exported.plan_of(), tmp_path / "out"
    checkpoint = str(exported.checkpoint())

    def attempt(model=checkpoint, options=None, **kwargs):
        with pytest.raises(hetcache.HetCacheError) as caught:
            export_model(model, plan, out, options or ExportOptions(), shape=exported.shape(), **kwargs)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "is no folder" in attempt("nowhere")
    assert "has no config.json" in attempt(str(tmp_path))
    assert "picture" in attempt("test_export:unknown")
    assert "opset must be" in attempt(options=ExportOptions(opset=17))
    assert "bf16 needs opset 23" in attempt(options=ExportOptions(dtype="bf16", opset=20))
    assert "dtype must be" in attempt(options=ExportOptions(dtype="int8"))
    assert "MIN:OPT:MAX" in attempt(options=ExportOptions(dynamic_active=(40, 27, 20)))


def test_an_error_at_the_end_leaves_the_old_export(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "manifest.json").write_text("old")

    def fail():
        with new_folder(out) as folder:
            (folder / "manifest.json").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "manifest.json").read_text() == "old"
    with new_folder(out) as folder:
        (folder / "manifest.json").write_text("new")
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(hetcache.HetCacheError, match="no earlier export"), new_folder(tmp_path / "work"):
        pass


def test_shapes_follow_the_plan():
    shape = CallShape(exported.plan_of(), batch=2, text_tokens=7)
    kwargs = load_source(str(exported.checkpoint()), shape, "fp32").kwargs
    assert kwargs["hidden_states"].shape == (2, 5, *models.latent_shape(exported.source().model))
    assert kwargs["encoder_hidden_states"].shape == (2, 7, 13)
