"""An export folder appears when it is whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...engine.manifest import MANIFEST_FILE
from ...errors import ExportError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at the end, if nothing went wrong.

    Raises:
        ExportError: `out` holds something that is no export.
    """
    if out.exists() and not ((out / MANIFEST_FILE).is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise ExportError(f"{out} exists and is no earlier export: choose another --out, or remove it")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.exists():
            # A folder with files in it cannot be renamed over: move the old one away first.
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
            os.replace(out, old / out.name)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
