"""TensorRT for RTX builds engines without a GPU; nothing here runs them."""

from __future__ import annotations

import dataclasses
import shutil

import exported
import pytest

import hetcache_compile as hetcache
from hetcache_compile.manifest import Manifest

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("polygraphy", reason="needs the extra trt-rtx")
pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")

from hetcache_compile.export import trt


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


def test_fp32_for_several_gpus(tmp_path):
    engines = build(exported.export("fp32", 20), tmp_path, "8.9", "12.0")
    assert engines.compute_capabilities == ("8.9", "12.0")


def test_fp32_with_fused_operators_and_free_sizes(tmp_path):
    build(exported.export("fp32", 23, True), tmp_path, "8.6")


def test_fp16(tmp_path):
    build(exported.export("fp16", 20), tmp_path, "8.0")


def test_bf16(tmp_path):
    build(exported.export("bf16", 23), tmp_path, "8.9")


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


def test_an_engine_must_have_the_inputs_and_outputs_of_the_manifest():
    folder = exported.export("fp32", 20)
    manifest = Manifest.load(folder)
    form = manifest.forms["partial"]
    wrong = dataclasses.replace(form.inputs[0], shape=(1, 2, 3))
    form = dataclasses.replace(form, inputs=(wrong, *form.inputs[1:]))
    with pytest.raises(hetcache.HetCacheError, match=r"TensorRT reads hidden_states as .*the manifest says"):
        trt.build_engine(folder / form.file, form, manifest, trt.RTX, ["8.9"])


def test_missing_packages_name_the_extra(monkeypatch):
    import hetcache_compile.runners as runners

    with pytest.raises(hetcache.HetCacheError, match=r"pip install 'hetcache-compile\[trt\]'"):
        runners.import_tensorrt("tensorrt_of_another_world", "trt")
    monkeypatch.setattr(trt, "has_driver", lambda: False)
    monkeypatch.setattr(trt, "import_tensorrt", lambda *_: None)
    with pytest.raises(hetcache.HetCacheError, match="no driver"):
        trt.choose_kind("tensorrt")
    assert trt.choose_kind("auto") is trt.RTX
