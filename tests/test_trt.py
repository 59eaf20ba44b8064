"""TensorRT for RTX builds engines without a GPU; nothing here runs them."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import exported
import numpy as np
import pytest

import hetcache_compile as hetcache
from hetcache_compile.engine.manifest import Manifest

onnx = pytest.importorskip("onnx", reason="needs the extra ort")
pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("polygraphy", reason="needs the extra trt-rtx")
pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")

from hetcache_compile.export.check.verify import verify_with_ort  # noqa: E402
from hetcache_compile.export.exporter import ExportOptions, export_model  # noqa: E402
from hetcache_compile.export.trt import build as trt  # noqa: E402


def build(source, tmp_path, *capabilities):
    folder = tmp_path / "export"
    shutil.copytree(source, folder)
    manifest = trt.build_engines(folder, Manifest.load(folder), trt.RTX, capabilities)
    engines = manifest.engines["rtx"]
    assert set(engines.forms) == set(manifest.forms)
    assert not engines.executed
    for file in engines.forms.values():
        assert (folder / file.file).stat().st_size == file.num_bytes > 10_000
    return engines


@pytest.mark.wide
def test_fp32_for_several_gpus(tmp_path):
    engines = build(exported.export("fp32", 20), tmp_path, "8.9", "12.0")
    assert engines.compute_capabilities == ("8.9", "12.0")


@pytest.mark.wide
def test_fp32_with_fused_operators_and_free_sizes(tmp_path):
    build(exported.export("fp32", 23, True), tmp_path, "8.6")


@pytest.mark.wide
@pytest.mark.parametrize("merging", ["boxes", "kmeans"])
def test_merged_context(tmp_path, merging):
    """Sums over clusters, and which cluster is nearest."""
    folder, whole = tmp_path / "merged", exported.plan_of()
    plan = dataclasses.replace(whole, context_cluster=np.arange(whole.num_context) // 3, merging=merging)
    export_model("exported:tiny_dit", plan, folder, ExportOptions(baseline=False))
    build(folder, tmp_path, "8.9")


@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.wide), 21])
def test_a_cache_in_int8(tmp_path, opset):
    """Spelled out, and in the operators of later opsets."""
    plan = dataclasses.replace(exported.plan_of(), cache_dtype="int8")
    folder = tmp_path / "int8"
    export_model("exported:tiny_dit", plan, folder, ExportOptions("fp32", opset, baseline=False))
    build(folder, tmp_path, "8.9")


@pytest.mark.wide
def test_free_sizes_and_extrapolation_together(tmp_path):
    """Times and history of every row: their number does not depend on M."""
    folder = tmp_path / "free"
    plan = exported.plan_of(extrapolation=2)
    options = ExportOptions("fp32", 20, baseline=False, dynamic_active=(20, exported.ACTIVE, 40))
    export_model(str(exported.checkpoint()), plan, folder, options, shape=exported.shape(), checks=[verify_with_ort])
    manifest = Manifest.load(folder)
    reads = {spec.name: spec.shape for spec in manifest.forms["partial"].inputs}
    assert {"past_output.0.1", "past_output.0.2", "past_output.0.times"} <= reads.keys()
    assert any("num_active" in shape for shape in reads.values())
    build(folder, tmp_path, "8.9")


@pytest.mark.wide
def test_fp16(tmp_path):
    build(exported.export("fp16", 20), tmp_path, "8.0")


@pytest.mark.wide
def test_bf16(tmp_path):
    build(exported.export("bf16", 23), tmp_path, "8.9")


@pytest.mark.wide
def test_what_cannot_be_built_is_one_clear_line(tmp_path):
    manifest = Manifest.load(exported.export("fp32", 20))
    for dtype, capability, message in (
        ("fp32", "9.0", r"no compute capability 9\.0: it has 7\.5, 8\.0"),
        ("fp32", "banana", "no compute capability banana"),
        ("bf16", "7.5", "no bf16"),
    ):
        with pytest.raises(hetcache.HetCacheError, match=message):
            trt.check_capabilities(trt.RTX, [capability], dtype)
    with pytest.raises(hetcache.HetCacheError, match="--trt takes"):
        trt.choose_kind("cuda")
    folder = tmp_path / "export"
    shutil.copytree(exported.export("fp32", 20), folder)
    with pytest.raises(hetcache.HetCacheError, match=r"full\.onnx cannot be built.*Turing") as caught:
        trt.build_engines(folder, manifest, trt.RTX, ["7.5"])
    assert "\n" not in str(caught.value)


@pytest.mark.wide
def test_an_engine_must_have_the_inputs_and_outputs_of_the_manifest():
    folder = exported.export("fp32", 20)
    manifest = Manifest.load(folder)
    form = manifest.forms["partial"]
    wrong = dataclasses.replace(form.inputs[0], shape=(1, 2, 3))
    form = dataclasses.replace(form, inputs=(wrong, *form.inputs[1:]))
    with pytest.raises(hetcache.HetCacheError, match=r"TensorRT reads hidden_states as .*the manifest says"):
        trt.build_engine(folder / form.file, form, manifest, trt.RTX, ["8.9"])


STARVED = """
import resource, sys
from pathlib import Path
import tensorrt_rtx
from hetcache_compile.errors import is_out_of_memory
from hetcache_compile.export.trt import build as trt
from hetcache_compile.engine.manifest import FormSpec, Manifest, TensorSpec

folder = Path(sys.argv[1])
trt.polygraphy_for(trt.RTX)
builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger())
form = FormSpec("large.onnx", "", 0, *((TensorSpec(name, "float32", (64, 4096), "model"),) for name in "xy"))
limit = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    trt.build_engine(folder / form.file, form, Manifest.load(folder), trt.RTX, ["8.9"])
except trt.ExportError as error:
    print(is_out_of_memory(error), error)
"""


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_runs_out_in_tensorrt_is_known_as_that(tmp_path):
    """In a process with room for less than two copies of the weights."""
    helper, (rows, width) = onnx.helper, (64, 4096)
    weight = onnx.numpy_helper.from_array(np.ones((width, width), dtype=np.float32), "w")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, width]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "large.onnx")
    shutil.copy(exported.export("fp32", 20) / "manifest.json", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", STARVED, tmp_path], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.startswith("True large.onnx cannot be built"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


def test_missing_packages_name_the_extra(monkeypatch):
    import hetcache_compile.engine.runners as runners

    with pytest.raises(hetcache.HetCacheError, match=r"pip install 'hetcache-compile\[trt\]'"):
        runners.import_tensorrt("tensorrt_of_another_world", "trt")
    monkeypatch.setattr(trt, "has_driver", lambda: False)
    monkeypatch.setattr(trt, "import_tensorrt", lambda *_: None)
    with pytest.raises(hetcache.HetCacheError, match="no driver"):
        trt.choose_kind("tensorrt")
    assert trt.choose_kind("auto") is trt.RTX
