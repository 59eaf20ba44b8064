"""`benchmarks/gpu.py` at a toy size, so that it works when there is a GPU, for a few minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.wide
def test_the_gpu_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable, SCRIPT, "--size", "toy", "--device", "cpu", "--inner", "eager", "--layers", "2",
        "--control-layers", "1", "--error-layers", "2", "--frames", "9", "--active", "0.25", "0.5", "--calls", "2",
        "--out", out, "--error-dtypes", "float32",
        "--sections", "rates", "errors", "forms", "cache on the host", "eager",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    result = json.loads(out.read_text())
    assert not result["left_out"]
    sections = result["sections"]
    assert max(error for name, error in sections["errors"]["float32"].items() if name != "section_seconds") < 1e-5
    rows = sections["9 frames, forms"]
    for share in (0.25, 0.5):
        row = rows[f"M/N {share}"]
        assert row["active"] == share * row["tokens"]
        assert row["edit"]["steps"] == {"FULL": 11, "PARTIAL": 10, "REUSE": 29}
        assert row["reuse"]["seconds"] < row["partial"]["seconds"]
        assert row["cache_bytes"] > 0
    assert sections["9 frames, eager"]["seconds"] > 0


@pytest.mark.wide
def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable, SCRIPT, "--size", "toy", "--device", "cpu", "--layers", "2", "--control-layers", "1",
        "--seconds", "0",
        "--sections", "forms", "eager", "--frames", "9", "--out", out,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    result = json.loads(out.read_text())
    assert set(result["left_out"]) == {"9 frames, forms", "9 frames, eager"}
    assert result["sections"] == {}
