"""What is compiled ahead of time is found by another process, and refused where it is not right for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile.compilation.artefact import FILES, HEAD, identity
from hetcache_compile.edit.media import write_video
from hetcache_compile.reference.demo import moving_mask, save_random_checkpoint

FRAMES, SIZE = 5, 32
SMALL = ("--height", SIZE, "--width", SIZE, "--num-frames", FRAMES)


def folder_for(module: torch.nn.Module, path: Path, content: bytes = b"", **changed: Any) -> Path:
    """A folder as `saving_compiled` writes it."""
    path.mkdir()
    head = {**identity(module), "sha256": hashlib.sha256(content).hexdigest(), **changed}
    (path / HEAD).write_text(json.dumps(head))
    (path / FILES).write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["torch", "device", "model", "config", "dtype", "hetcache-compile"])
def test_another_machine_or_model_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    model = torch.nn.Linear(2, 2)
    folder = folder_for(model, tmp_path / "a", **{name: "another"})
    with pytest.raises(hetcache.CompiledError, match=f"for another {name}: another, here it is"):
        hetcache.load_compiled(folder, model)


def test_another_shape_of_the_model_is_refused(tmp_path: Path) -> None:
    folder = folder_for(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(hetcache.CompiledError, match="config"):
        hetcache.load_compiled(folder, torch.nn.Linear(2, 3))


def test_damage_is_found(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(hetcache.CompiledError, match="no folder of hetcache compile"):
        hetcache.load_compiled(tmp_path, model)
    folder = folder_for(model, tmp_path / "a", b"something")
    (folder / FILES).write_bytes(b"something else")
    with pytest.raises(hetcache.CompiledError, match="damaged"):
        hetcache.load_compiled(folder, model)
    (folder / HEAD).write_text("[1]")
    with pytest.raises(hetcache.CompiledError, match="cannot be read"):
        hetcache.load_compiled(folder, model)


def test_a_file_in_the_way_is_told_before_the_model_is_loaded(hetcache_command: Any, tmp_path: Path) -> None:
    plan = tmp_path / "a.hetplan"
    np.save(tmp_path / "mask.npy", moving_mask(FRAMES, SIZE, SIZE))
    hetcache_command("plan", "--mask", tmp_path / "mask.npy", "-o", plan, *SMALL)
    status, _, err = hetcache_command("compile", tmp_path / "no model", "--plan", plan, "-o", plan, *SMALL)
    assert status == 2
    assert f"cannot be written: {plan} is no folder" in err


def run_command(cache: Path, *arguments: Any) -> None:
    """`hetcache` in a process of its own, with a cache of torch's of its own; kernels depend on the threads."""
    command = [sys.executable, "-m", "hetcache_compile.cli.main", *map(str, arguments), *map(str, SMALL)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.wide
def test_compile_then_edit(hetcache_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that edits compiles no kernel that is not in the folder."""
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    write_video(tmp_path / "in.mp4", frames)
    np.save(tmp_path / "mask.npy", moving_mask(FRAMES, SIZE, SIZE))
    model, plan, out = tmp_path / "model", tmp_path / "a.hetplan", tmp_path / "compiled"
    status, *_ = hetcache_command(
        "plan", "--model", model, "--mask", tmp_path / "mask.npy", "-o", plan, "--steps", 2, "--schedule", "full",
        *SMALL,
    )  # fmt: skip
    assert status == 0
    run_command(tmp_path / "first", "compile", model, "--plan", plan, "-o", out, "--dtype", "float32")
    assert not (tmp_path / "first").exists() or not list((tmp_path / "first").rglob("*.so"))
    edit = (
        "edit", "--model", model, "--video", tmp_path / "in.mp4", "--mask", tmp_path / "mask.npy", "--prompt", "a cat",
        "--plan", plan, "--out", tmp_path / "out", "--no-baseline", "--compiled", out,
    )  # fmt: skip
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    status, *_ = hetcache_command(*edit, "--dtype", "float32", *SMALL)
    assert status == 0
    with zipfile.ZipFile(out / FILES) as packed:
        known = {Path(name).name for name in packed.namelist() if name.endswith(".so")}
    assert known
    assert {path.name for path in (tmp_path / "second").rglob("*.so")} == known
    status, _, err = hetcache_command(*edit, "--dtype", "bfloat16", *SMALL)
    assert status == 2
    assert "compiled for another dtype: float32, here it is bfloat16" in err
