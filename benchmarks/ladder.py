"""What it costs that M comes from a ladder of 16 values: tokens computed for nothing, and forms saved.

    python benchmarks/ladder.py            # writes benchmarks/results/ladder.json

Boxes of random place and size, still over the clip, on the token grids of Wan at 480 x 832: 33 and 81 frames. A PARTIAL
step takes about as long as its M is large (`benchmarks/steps.py`), so the ratio of M is the ratio of its time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np

from hetcache_compile import Plan
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "ladder.json"
GRIDS = {"33 frames": (9, 30, 52), "81 frames": (21, 30, 52)}


def boxes(grid: tuple[int, int, int], count: int):
    generator = np.random.default_rng(0)
    for _ in range(count):
        mask = np.zeros(grid, dtype=bool)
        height, width = generator.integers(2, grid[1] + 1), generator.integers(2, grid[2] + 1)
        top, left = generator.integers(0, grid[1] - height + 1), generator.integers(0, grid[2] - width + 1)
        mask[:, top : top + height, left : left + width] = True
        yield mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=300)
    options = parser.parse_args()
    grids = {}
    for name, grid in GRIDS.items():
        sizes = {multiple: [] for multiple in (0, 32)}
        for mask in boxes(grid, options.masks):
            for multiple, found in sizes.items():
                found.append(Plan.from_mask(mask, grid, multiple=multiple).num_active)
        ratios = [ladder / tiles for ladder, tiles in zip(sizes[0], sizes[32], strict=True)]
        grids[name] = {
            "grid": grid,
            "values_of_m": {"ladder": len(set(sizes[0])), "multiples of 32": len(set(sizes[32]))},
            "m_ratio": {
                "median": median(ratios),
                "mean": float(np.mean(ratios)),
                "p90": float(np.quantile(ratios, 0.9)),
            },
        }
        print(name, grids[name])
    RESULT.write_text(json.dumps({**provenance("cpu"), "masks": options.masks, "grids": grids}, indent=1) + "\n")


if __name__ == "__main__":
    main()
