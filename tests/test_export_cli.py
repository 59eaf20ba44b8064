"""`hetcache-export` as a user meets it."""

from __future__ import annotations

import sys

import exported
import pytest

from hetcache_compile.manifest import Manifest

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from hetcache_compile.export import cli


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hetcache-export", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "edit.hetplan"
    exported.plan_of().save(path)
    return path


def test_export_with_engines_from_the_command_line(command, plan_file, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    out = tmp_path / "engine"
    status, text, err = command(
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
    config = (out / "triton" / "hetcache_partial" / "config.pbtxt").read_text()
    for name in (spec.name for spec in (*manifest.forms["partial"].inputs, *manifest.forms["partial"].outputs)):
        assert config.count(f'"{name}"') == 1
    assert config.count("{") == config.count("}")


def test_help_suffices(command):
    status, text, _ = command("--help")
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
def test_bad_options_are_one_clear_line_and_status_2(command, plan_file, tmp_path, extra, message):
    model = tmp_path / "pipeline"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    status, _, err = command(model, "--plan", plan_file, "--out", tmp_path / "out", *extra)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("hetcache-export: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_is_one_clear_line(command, tmp_path):
    status, _, err = command("nowhere", "--plan", tmp_path / "no.hetplan", "--out", tmp_path / "out")
    assert status == 2
    assert "no plan at" in err
