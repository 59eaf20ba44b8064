"""`python tests/pipelines_on_device.py --device cuda [NAME ...]` checks pipelines on a GPU, against the table.

The check is that of `pipelines_check`, on pipelines and arguments that were moved. A machine without a GPU runs it with
`--device cpu`, which has to differ in nothing. The package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pipelines import ROWS
from pipelines.row import Row
from pipelines_check import check
from pipelines_table import JSON
from torch.utils._pytree import tree_map_only

from hetcache_compile import hetcache_backend


def verdict_on(name: str, device: str) -> dict[str, Any]:
    """What is found of a row whose pipeline was moved; why it ended, where it did."""
    row = next(row for row in ROWS if row.name == name)
    try:
        return check(moved(row, device)).as_json()
    except Exception as error:
        return {"name": name, "result": "raised", "reason": f"{type(error).__name__}: {error}", "at": places(error)}


def moved(row: Row, device: str) -> Row:
    """The row on a device: its pipeline, and the tensors that it is called with."""

    def here(arguments: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)

    return replace(
        row, build=lambda: row.build().to(device), call=lambda: here(dict(row.call())), guided=here(dict(row.guided))
    )


def places(error: Exception) -> list[str]:
    """The last lines that an error came through."""
    return [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-5:]]


def verdicts(names: list[str], device: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Of several rows, in processes."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), quiet) as pool:
        for future in as_completed([pool.submit(verdict_on, name, device) for name in names]):
            yield future.result()


def quiet() -> None:
    """Of each process. TF32 would round convolutions."""
    if "hetcache" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(hetcache_backend, name="hetcache")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    """Print what differs from the table, and write all verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="of names; all rows without any")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to write the verdicts")
    options = parser.parse_args()
    expected = {row["name"]: row for row in json.loads(JSON.read_text())}
    names = [row.name for row in ROWS if not row.reason]
    words = [word.lower() for word in options.words]
    found, differing = [], 0
    for verdict in verdicts(
        [name for name in names if not words or any(word in name.lower() for word in words)],
        options.device, options.jobs,
    ):  # fmt: skip
        found.append(verdict)
        if verdict != expected[verdict["name"]]:
            differing += 1
            print(json.dumps(verdict), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{differing} of {len(found)} pipelines differ from {JSON.name}")


if __name__ == "__main__":
    main()
