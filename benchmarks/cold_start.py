"""What it takes from import to the first step of each form, against plain torch.compile: CPU seconds, by depth.

    python benchmarks/cold_start.py            # writes benchmarks/results/cold_start.json; half an hour

Each cell is a process of its own with empty caches of torch, and its children; the second process of a pair finds what
the first one left. The model is a WanVACE of tiny width, so that depth is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import GRID, build

import hetcache_compile as hetcache
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "cold_start.json"
DEPTHS = ("8+4", "30+15")
WAYS = ("hetcache", "hetcache again", "compiled blocks", "compiled")


def cpu_seconds() -> float:
    """Of this process and of the children that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@torch.no_grad()
def run(way: str, depth: str) -> dict[str, Any]:
    """One step of everything that a way compiles, in this process: CPU seconds, after imports and building."""
    torch.set_num_threads(1)
    model, call = build(*map(int, depth.split("+")))
    begin = cpu_seconds()
    steps = []
    if way.startswith("hetcache"):
        active = np.arange(int(np.prod(GRID))) % 3 == 0
        plan = hetcache.Plan.from_token_mask(active, GRID, num_inference_steps=3, schedule="FPR", extrapolation=1)
        compiled = torch.compile(model, backend=hetcache.hetcache_backend)
        with hetcache.session(plan, strict=True):
            for time in (1000.0, 900.0, 800.0):
                compiled(**call, timestep=torch.tensor([time]))
                steps.append(cpu_seconds() - begin)
    else:
        if way == "compiled blocks":
            model.compile_repeated_blocks()
        compiled = torch.compile(model) if way == "compiled" else model
        compiled(**call, timestep=torch.tensor([1000.0]))
        steps.append(cpu_seconds() - begin)
    return {"seconds": steps[-1], "after_each_step": steps}


def measure(way: str, depth: str, cache: Path) -> dict[str, Any]:
    """The same in a process of its own. Compilers run in it or in children that it waits for."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, __file__, "--cell", way, depth]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(depth, way, round(found["seconds"], 1), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", default=DEPTHS, help="blocks and control blocks, such as 8+4")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--cell", nargs=2, metavar=("WAY", "DEPTH"), help="measure one here, and print it")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run(*options.cell)))
        return
    cells: dict[str, dict[str, Any]] = {}
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as folder:
            cells[depth] = {
                way: measure(way, depth, Path(folder, way.removesuffix(" again").replace(" ", "_")))
                for way in options.ways
            }
        options.out.write_text(json.dumps({**provenance("cpu"), "depths": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
