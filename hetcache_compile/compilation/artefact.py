"""What was compiled, in a folder that another process can use: Inductor's cache, and what it is right for.

    hetcache compile MODEL --plan edit.hetplan -o compiled
    hetcache edit --compiled compiled ...        # or hetcache.load_compiled("compiled", pipe.transformer)

The cache is torch's own, keyed by what is compiled: whatever it does not hold is compiled as always, so that a folder
can save time and can never give wrong results. Torch's portable cache (`torch.compiler.save_cache_artifacts`) holds no
C++ kernels, so the files of the cache are kept themselves.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import CompiledError, OutputFileError
from ..files import PathLike, atomically
from ..provenance import __version__, processor_name

HEAD, FILES = "compiled.json", "inductor_cache.zip"
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable by which Inductor finds its cache."""


def identity(model: torch.nn.Module) -> dict[str, str]:
    """What compiled code is right for: the versions, the device, and the model but for its weights."""
    first = next(model.parameters())
    processor = processor_name(str(first.device))
    if first.device.type == "cpu":
        processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    config = getattr(model, "config", None)
    described = json.dumps(dict(config) if config is not None else repr(model), sort_keys=True, default=str)
    return {
        "hetcache-compile": __version__,
        "torch": torch.__version__,
        "device": processor,
        "model": type(model).__name__,
        "config": hashlib.sha256(described.encode()).hexdigest(),
        "dtype": ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})),
    }


def check_writable(folder: Path) -> None:
    """Raise `CompiledError` if a folder cannot be written: before the long work."""
    try:
        files.check_writable(folder / HEAD, folder / FILES)
    except OutputFileError as error:
        raise CompiledError(str(error)) from error


@contextmanager
def saving_compiled(folder: PathLike, model: torch.nn.Module) -> Iterator[None]:
    """Keep in a folder what Inductor compiles meanwhile; it finds nothing that was compiled before.

    Args:
        folder: to write, when all went well; an older artefact in it is replaced.
        model: the model that is compiled.

    Raises:
        CompiledError: the folder cannot be written, which is known at once, or nothing was compiled that can be kept.
    """
    folder = Path(folder)
    check_writable(folder)
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get(CACHE_DIR)
        os.environ[CACHE_DIR] = cache
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_DIR]
            else:
                os.environ[CACHE_DIR] = before
        if not any(Path(cache, name).is_dir() for name in ("aotautograd", "fxgraph")):
            raise CompiledError("nothing was compiled that torch can keep: the inner compiler has to be Inductor")
        atomically(folder / FILES, lambda temporary: _pack(Path(cache), Path(temporary)))
    digest = hashlib.sha256((folder / FILES).read_bytes()).hexdigest()
    head = json.dumps({**identity(_plain(model)), "sha256": digest}, indent=1) + "\n"
    atomically(folder / HEAD, lambda temporary: Path(temporary).write_text(head))


def _pack(cache: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for path in sorted(cache.rglob("*")):
            if path.is_file() and path.suffix not in (".lock", ".tmp"):
                packed.write(path, path.relative_to(cache))


def load_compiled(folder: PathLike, model: torch.nn.Module) -> None:
    """Let this process find what another one compiled, in place of compiling it.

    The files go into Inductor's cache, so that later processes find them too.

    Args:
        folder: of `hetcache compile`, or of `saving_compiled`. It holds code that is run: take it from those you trust.
        model: the model that will be compiled, on its device and in its type.

    Raises:
        CompiledError: the folder holds no such thing, is damaged, or was made for another torch, device or model.
    """
    folder = Path(folder)
    head = _head(folder)
    for name, value in identity(_plain(model)).items():
        if head.get(name) != value:
            raise CompiledError(
                f"{folder} was compiled for another {name}: {head.get(name)}, here it is {value}; run hetcache compile "
                "here"
            )
    try:
        content = (folder / FILES).read_bytes()
    except OSError as error:
        raise CompiledError(f"{folder} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != head.get("sha256"):
        raise CompiledError(f"{folder / FILES} is damaged: run hetcache compile again")
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # Inductor is slow to import

    _unpack(content, Path(cache_dir()))


def _unpack(content: bytes, cache: Path) -> None:
    """Write what is missing, each file at once: other processes may be reading."""
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        for name in packed.namelist():
            path = cache / name
            if not path.resolve().is_relative_to(cache.resolve()):
                raise CompiledError(f"the artefact holds {name}, which lies outside the cache: it is none of ours")
            if not path.exists():
                atomically(path, functools.partial(_write, packed.read(name)))


def _write(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)


def _head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / HEAD).read_text())
    except FileNotFoundError as error:
        raise CompiledError(f"{folder} is no folder of hetcache compile: it has no {HEAD}") from error
    except (OSError, ValueError) as error:
        raise CompiledError(f"{folder / HEAD} cannot be read: {error}") from error
    if not isinstance(head, dict):
        raise CompiledError(f"{folder / HEAD} cannot be read: it holds no object")
    return head


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    """The model behind `torch.compile`."""
    plain = getattr(model, "_orig_mod", model)
    assert isinstance(plain, torch.nn.Module)
    return plain
