"""The scripts in examples/ run, print what they found, and find what they should."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("fresh")


def run_example(name: str, *arguments: str) -> dict[str, Any]:
    """What the `main` of a script returns."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.main(arguments)
    return result


def test_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_example("pipeline", "--frames", "5", "--steps", "4")
    assert found["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 1}
    assert found["seconds"]["REUSE"] < found["seconds"]["FULL"]
    assert found["fidelity"] > 30
    assert found["cached"] > found["plain"] - 1
    assert "PSNR of the cached result to the plain one" in capsys.readouterr().out


def test_a_loop_with_guidance() -> None:
    found = run_example("loop", "--steps", "8")
    assert found["steps"] == {"FULL": 6, "PARTIAL": 4, "REUSE": 6}  # two calls a step
    assert found["cache_bytes"] > 0
    assert 1e-4 < found["error"] < 0.05


def test_a_batch_with_a_mask_for_each_sample() -> None:
    found = run_example("batch", "--steps", "4")
    assert found["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 1}
    assert max(found["errors"]) < 1e-5
    assert found["moved"] > 1e-3


def test_the_functional_forms() -> None:
    errors = run_example("functional")
    assert max(errors[name] for name in ("full", "partial, same inputs", "reuse, same inputs")) < 1e-5
    assert errors["partial, new inputs"] < 0.05
    assert errors["reuse, new inputs"] > 5 * errors["partial, new inputs"]


@pytest.mark.wide
@pytest.mark.parametrize("guidance", [1, 2])
def test_ranks(guidance: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "ranks.py"), "--guidance", str(guidance)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "{'FULL': 6, 'PARTIAL': 4, 'REUSE': 6}" in done.stdout
    assert float(done.stdout.rsplit(" ", 1)[1]) < 1e-5


@pytest.mark.wide
def test_replicas() -> None:
    command = [sys.executable, str(EXAMPLES / "replicas.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.partition("edits ")[2].partition("]")[0] for line in lines] == ["[0, 1", "[4, 5", "[2, 3"]
    assert len({line.partition(":")[0] for line in lines}) == 2  # both replicas worked
    assert max(float(line.rsplit(" ", 1)[1]) for line in lines) < 1e-5


@pytest.mark.wide
def test_an_engine(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra ort")
    pytest.importorskip("onnxruntime", reason="needs the extra ort")
    found = run_example("engine", "--steps", "4")
    assert found["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 1}
    assert found["error"] < 1e-5
    assert "checked with ort-cpu" in capfd.readouterr().out


def test_each_script_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"pipeline", "loop", "batch", "functional", "engine", "ranks", "replicas"}
