"""`hetcache-export` as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import exported
import numpy as np
import pytest
import torch

from hetcache_compile.engine.manifest import Manifest
from hetcache_compile.errors import is_out_of_memory

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from hetcache_compile.export import cli
from hetcache_compile.export.exporter import ExportOptions, export_model


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "edit.hetplan"
    exported.plan_of().save(path)
    return path


@pytest.mark.wide
def test_export_with_engines_from_the_command_line(export_command, plan_file, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    out = tmp_path / "engine"
    status, text, err = export_command(
        "exported:tiny_dit", "--plan", plan_file, "--out", out, "--no-baseline",
        "--trt=rtx", "--compute-capability", "8.9", "12.0",
    )  # fmt: skip
    assert status == 0, err
    assert "built, not executed" in text
    assert "checked with ort-cpu" in text
    manifest = Manifest.load(out)
    assert set(manifest.forms) == {"full", "partial", "reuse"}
    assert manifest.engines["rtx"].compute_capabilities == ("8.9", "12.0")
    state = (out / "triton" / "hetcache" / "config.pbtxt").read_text()
    for entry in manifest.cache:
        assert f'state [ {{ input_name: "{entry.input}" output_name: "{entry.output}" data_type: TYPE_FP32' in state
    check_initial_states(out / "triton" / "hetcache", manifest, state)
    config = (out / "triton" / "hetcache_partial" / "config.pbtxt").read_text()
    for name in (spec.name for spec in (*manifest.forms["partial"].inputs, *manifest.forms["partial"].outputs)):
        assert config.count(f'"{name}"') == 1
    assert config.count("{") == config.count("}")


def check_initial_states(folder, manifest, config):
    begun = {entry.input: entry for entry in manifest.cache if entry.initial is not None}
    files = {path.name: path for path in (folder / "initial_state").glob("*")}
    assert files.keys() == begun.keys()
    assert config.count("data_file") == len(begun)
    for name, path in files.items():
        assert f'data_file: "{name}"' in config
        values = np.fromfile(path, dtype=begun[name].dtype)
        assert values.size == np.prod(begun[name].shape)
        assert (values == np.float32(begun[name].initial)).all()


@pytest.mark.wide
def test_initial_states_of_an_extrapolating_model_are_files(tmp_path):
    folder = tmp_path / "free"
    plan = exported.plan_of(extrapolation=1)
    export_model(str(exported.checkpoint()), plan, folder, ExportOptions(baseline=False), shape=exported.shape())
    manifest = Manifest.load(folder)
    state = (folder / "triton" / "hetcache" / "config.pbtxt").read_text()
    assert "past_output.0.times" in {entry.input for entry in manifest.cache if entry.initial is not None}
    check_initial_states(folder / "triton" / "hetcache", manifest, state)


def test_help_suffices(export_command):
    status, text, _ = export_command("--help")
    assert status == 0
    for option in ("--plan", "--trt", "--compute-capability", "--dynamic-active", "--verify", "--opset"):
        assert option in text


def test_bare_options_are_spread_for_the_parser():
    assert cli.spread_options(["--trt", "--out", "x"]) == ["--trt=auto", "--out", "x"]
    assert cli.spread_options(["--trt", "rtx"]) == ["--trt", "rtx"]
    assert cli.spread_options(["--compute-capability", "8.9", "12.0", "12.1", "m"]) == [
        "--compute-capability", "8.9", "--compute-capability", "12.0", "--compute-capability", "12.1", "m",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--opset", "eleven"), "--opset takes"),
        (("--opset", "17"), "opset must be from 20"),
        (("--dtype", "int8"), "dtype must be"),
        (("--dynamic-active", "1:2"), "MIN:OPT:MAX"),
        (("--verify", "hope"), "--verify takes"),
        (("--verify", "ort", "--dtype", "bf16"), "no bf16"),
        (("--compute-capability", "8.9"), "needs --trt"),
        (("--trt=cuda",), "--trt takes auto"),
        (("--component", "vae"), "has no config.json"),
    ],
)
def test_bad_options_are_one_clear_line_and_status_2(export_command, plan_file, tmp_path, extra, message):
    model = tmp_path / "pipeline"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    status, _, err = export_command(model, "--plan", plan_file, "--out", tmp_path / "out", *extra)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("hetcache-export: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def too_large_for_torch(plan):
    """torch's own words, from its own allocator."""
    return torch.nn.Linear(2**30, 2**30), {}


def too_large_for_python(plan):
    return bytearray(2**62)


@pytest.mark.parametrize("factory", ["too_large_for_torch", "too_large_for_python"])
def test_a_model_too_large_for_memory_is_one_clear_line_and_leaves_nothing(
    export_command, plan_file, tmp_path, factory
):
    before = set(tmp_path.iterdir())
    status, _, err = export_command(f"test_export_cli:{factory}", "--plan", plan_file, "--out", tmp_path / "out")
    check_memory_line(status, err, "loading the model")
    assert set(tmp_path.iterdir()) == before


def check_memory_line(status, err, stage):
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("hetcache-export: ")]
    assert line.startswith(f"hetcache-export: not enough memory for {stage}: less is needed with --dtype fp16")
    assert "Traceback" not in err


class OrtStatusError(Exception):
    """onnxruntime's errors derive from Exception only."""


@pytest.mark.parametrize(
    ("place", "error", "stage"),
    [
        ("capture.capture.export", MemoryError(), "rewriting"),
        pytest.param("export.lowering.fold_constants._evaluate", MemoryError(), "rewriting", marks=pytest.mark.wide),
        ("export.onnx.to_onnx.optimizer.optimize", MemoryError("std::bad_alloc"), "writing ONNX"),
        pytest.param(
            "export.onnx.files.onnx.checker.check_model", MemoryError(), "writing ONNX", marks=pytest.mark.wide
        ),
        pytest.param(
            "engine.runners.OrtRunner.prepare",
            OrtStatusError("[ONNXRuntimeError] : 6 : bad allocation"),
            "checking with onnxruntime",
            marks=pytest.mark.wide,
        ),
    ],
)
def test_memory_that_runs_out_in_a_library_is_one_clear_line_and_keeps_the_old_export(
    export_command, plan_file, tmp_path, monkeypatch, place, error, stage
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"hetcache_compile.{place}", fail)
    before = set(tmp_path.iterdir())
    status, _, err = export_command("exported:tiny_dit", "--plan", plan_file, "--out", out, "--no-baseline")
    check_memory_line(status, err, stage)
    assert set(tmp_path.iterdir()) == before
    assert (out / "manifest.json").read_text() == "old"


def test_other_errors_do_not_blame_the_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


@pytest.mark.wide
def test_a_terminated_export_leaves_nothing(plan_file, tmp_path):
    before = set(tmp_path.iterdir())
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hetcache_compile.export.cli import main; main()"
    arguments = ["test_export_cli:terminate_me", "--plan", plan_file, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, Path(__file__).parent, *arguments], check=False)
    assert done.returncode == 143
    assert set(tmp_path.iterdir()) == before


def terminate_me(plan):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_missing_plan_is_one_clear_line(export_command, tmp_path):
    status, _, err = export_command("nowhere", "--plan", tmp_path / "no.hetplan", "--out", tmp_path / "out")
    assert status == 2
    assert "no plan at" in err
