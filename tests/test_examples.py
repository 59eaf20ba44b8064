"""The scripts in examples/ run, print what they found, and find what they should."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("fresh")


def load_example(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *arguments: str) -> dict[str, Any]:
    """What the `main` of a script returns."""
    result: dict[str, Any] = load_example(name).main(arguments)
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


@pytest.mark.wide
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
def test_ray_serve() -> None:
    pytest.importorskip("ray", reason="needs the extra serve")
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, errors_said = process.communicate(timeout=240)
        finally:
            process.terminate()  # not killed: so it ends the processes of Ray too
    assert process.returncode == 0, errors_said[-3000:]
    edits = [line for line in said.splitlines() if line.startswith("edit ")]
    active, replicas, batches, errors = zip(*(EDIT.fullmatch(line).groups() for line in edits), strict=True)
    assert len(edits) == 9
    assert len(set(active)) == len(set(replicas)) == 2
    assert max(map(float, errors)) < 1e-5
    batches = [json.loads(batch) for batch in batches]
    assert max(map(len, batches)) > 1
    for seed, batch in enumerate(batches):
        assert seed in batch
        assert {(active[one], replicas[one]) for one in batch} == {(active[seed], replicas[seed])}
    refused = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert [line.split()[1] for line in refused] == ["400", "400", "400"]
    assert refused[0].startswith("refused: 400 the body cannot be read as a plan")
    assert refused[1].endswith("the plan is for the grid (1, 4, 4), and this model has (3, 10, 10)")
    assert refused[2].endswith("give a seed, such as /?seed=1, not 'x'")


def test_a_replica_batches_what_waits_and_drops_whose_client_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="needs the extra serve")
    example = load_example("ray_serve")
    made: list[list[int]] = []

    def fake_latents(model: Any, edits: Any, device: str) -> torch.Tensor:
        made.append([edit.seed for edit in edits])
        time.sleep(0.1)
        if 666 in made[-1]:
            raise RuntimeError("no luck")
        return torch.tensor([float(edit.seed) for edit in edits])

    monkeypatch.setattr(example, "latents_of", fake_latents)
    monkeypatch.setattr(example.serve, "get_replica_context", mock.MagicMock())
    small, large = example.plan_of(0, 0, 4), example.plan_of(0, 0, 7)

    async def clients() -> list[Any]:
        editor = example.Editor("cpu")
        first = asyncio.create_task(editor.edit(example.Edit(small, 0)))
        await asyncio.sleep(0.05)  # it is being made
        asked = [(large, 1), (small, 2), (large, 3), (small, 4), (large, 5), (large, 6), (large, 7), (small, 666)]
        tasks = [asyncio.create_task(editor.edit(example.Edit(plan, seed))) for plan, seed in asked]
        await asyncio.sleep(0)
        tasks[2].cancel()
        first.cancel()  # its batch goes on, and those that wait are not lost
        found = await asyncio.gather(*tasks, return_exceptions=True)
        again = await editor.edit(example.Edit(small, 8))
        return [*found, again]

    found = asyncio.run(clients())
    assert made == [[0], [1, 5, 6, 7], [2, 4, 666], [8]]
    assert [float(one.latents) for one in found if isinstance(one, example.Edited)] == [1, 5, 6, 7, 8]
    assert [type(one) for one in found if isinstance(one, BaseException)] == [
        RuntimeError, asyncio.CancelledError, RuntimeError, RuntimeError,
    ]  # fmt: skip


EDIT = re.compile(r"edit \d+, M = (\d+): (replica \S+), with (\[.+\]); to alone: (\S+)")


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
    assert scripts == {"pipeline", "loop", "batch", "functional", "engine", "ranks", "replicas", "ray_serve"}
