"""How far `hetcache estimate` is from published and from measured times, and what it says of every model that it knows.

    python benchmarks/estimate.py          # writes benchmarks/results/estimate.json; needs no GPU

The rates are those of `hetcache_compile/estimate/gpus.json`: one set for each GPU, and none is fitted to a time here.
Published runs that are not compiled count each light operator as a kernel of its own; compiled ones fuse them.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetcache_compile import Plan
from hetcache_compile.estimate.estimate import estimate
from hetcache_compile.estimate.gpus import Attention, find_gpu, known_gpus
from hetcache_compile.estimate.inventory import PLAIN, Inventory, take_inventory
from hetcache_compile.estimate.models import find_model, known_models
from hetcache_compile.provenance import provenance

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "estimate.json"
MEASURED = ("gpu", "gpu_caches", "gpu_14b")
"""Our own runs of `gpu.py`."""
FASTVIDEO = "hao-ai-lab.github.io/blogs/fastvideo_post_training, table 1: denoising alone"
LIGHTX2V = (
    "README of ModelTC/LightX2V: a step of its baseline, diffusers; PyTorch's flash attention is FlashAttention-2"
)
ACTIVE, SCHEDULE, GPU = 0.25, "balanced", "h100"
"""The edit in the table of all models, and the GPU."""
FEW = {"num_layers": 5, "num_single_layers": 5, "vace_layers": [0, 1, 3, 4], "dual_attention_layers": [0, 1, 2]}
"""How many blocks a model has that is captured whole, for comparison."""


@dataclass(frozen=True)
class Published:
    """A time that others have published, of `calls` uncached model calls."""

    what: str
    model: str
    size: tuple[int, int, int]
    gpu: str
    attention: Attention
    eager: bool
    calls: int
    seconds: float
    source: str


PUBLISHED = (
    Published("50 steps", "wan2.1-t2v-1.3b", (480, 832, 81), "h200", "fa2", True, 100, 95.21, FASTVIDEO),
    Published("50 steps", "wan2.1-t2v-14b", (720, 1280, 81), "h200", "fa2", True, 100, 1746.5, FASTVIDEO),
    Published("50 steps", "wan2.2-ti2v-5b", (704, 1280, 121), "h200", "fa2", True, 100, 157.21, FASTVIDEO),
    Published("a step", "wan2.1-i2v-14b", (480, 832, 81), "h100", "fa2", True, 2, 9.77, LIGHTX2V),
    Published("3 distilled steps", "wan2.1-t2v-1.3b", (480, 832, 81), "h200", "fa3", False, 3, 1.49, FASTVIDEO),
    Published("3 distilled steps", "wan2.1-t2v-14b", (720, 1280, 81), "h200", "fa3", False, 3, 29.5, FASTVIDEO),
    Published("3 distilled steps", "wan2.2-ti2v-5b", (704, 1280, 121), "h200", "fa3", False, 3, 2.64, FASTVIDEO),
)


@functools.cache
def inventory_of(name: str, size: tuple[int, int, int], share: float) -> Inventory:
    model = find_model(name)
    return take_inventory(model, plan_of(model.with_references(model.grid_of(*size)), share), torch.bfloat16)


def plan_of(grid: tuple[int, int, int], share: float, schedule: str = SCHEDULE, steps: int = 50) -> Plan:
    number = int(np.prod(grid))
    active = np.arange(number) < max(1, round(share * number))
    return Plan.from_token_mask(active, grid, num_inference_steps=steps, schedule=schedule, extrapolation=1)


def row(predicted: float, known: float, **more: Any) -> dict[str, Any]:
    """A predicted time beside a known one."""
    return {**more, "seconds": known, "predicted_seconds": predicted, "error": predicted / known - 1}


def compare_published() -> list[dict[str, Any]]:
    rows = []
    for run in PUBLISHED:
        found = inventory_of(run.model, run.size, ACTIVE)
        seconds = run.calls * find_gpu(run.gpu).seconds(found.work[PLAIN], run.attention, eager=run.eager)
        facts = {
            "what": run.what, "model": run.model, "size": run.size, "gpu": run.gpu, "attention": run.attention,
            "eager": run.eager, "calls": run.calls, "source": run.source,
        }  # fmt: skip
        rows.append(row(seconds, run.seconds, **facts))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def compare_measured() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Calls of WanVACE on an H200, compiled; and the size of one branch's cache there."""
    rows, caches = [], []
    card = find_gpu("h200")
    for result in (json.loads((RESULTS / f"{name}.json").read_text()) for name in MEASURED):
        model = f"wan2.1-vace-{result['model']['size'].lower()}"
        for name, section in result["sections"].items():
            if not name.endswith(", forms"):
                continue
            frames = int(name.split()[0])
            masks = {mask: figures for mask, figures in section.items() if mask.startswith("M/N")}
            for number, (mask, figures) in enumerate(masks.items()):
                found = inventory_of(model, (480, 832, frames), float(mask.split()[1]))
                for kind in ("full", "partial")[number > 0 :]:  # FULL knows nothing of M
                    facts = {"model": model, "frames": frames, "form": kind, "mask": mask}
                    rows.append(row(card.seconds(found.work[kind]), figures[kind]["seconds"], **facts))
                    print(json.dumps(rows[-1]), flush=True)
                predicted = sum(count * entry.num_bytes for entry, count in found.entries.items())
                caches.append(
                    {"model": model, "frames": frames, "bytes": figures["cache_bytes"], "predicted_bytes": predicted}
                )
    return rows, caches


def check_extension() -> dict[str, bool]:
    """Whether what a few blocks tell is what a capture of all blocks tells: FLOPs, bytes, caches; by class."""
    equal = {}
    for model in known_models().values():
        if model.class_name in equal:
            continue
        config = {**model.config, **{name: FEW[name] for name in model.depths}}
        shallow, picture = replace(model, config=config), model.token[0] == 1
        # CogVideoX has a table of positions for its usual size.
        usual = model.grid_of(*model.size) if "sample_frames" in config else None
        plan = plan_of(usual or ((1, 6, 8) if picture else (3, 4, 6)), ACTIVE)
        found = take_inventory(shallow, plan, torch.bfloat16)
        equal[model.class_name] = found == take_inventory(shallow, plan, torch.bfloat16, whole=True)
        print(model.class_name, equal[model.class_name], flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    published, (measured, caches) = compare_published(), compare_measured()
    models = {}
    for name, model in known_models().items():
        plan = plan_of(model.with_references(model.grid_of(*model.size)), ACTIVE, steps=model.steps)
        found = estimate(model, plan, find_gpu(GPU)).to_dict()
        models[name] = {**found, "size": model.size, "grid": plan.grid}
        print(name, found["speedup"], flush=True)
    gpus = {
        card.name: {
            "matmul": card.matmul_flops, **card.attention_flops, "memory": card.memory_bytes_per_second,
            "source": card.source,
        }
        for card in known_gpus().values()
    }  # fmt: skip
    result = {
        **provenance("cpu"), "active": ACTIVE, "schedule": SCHEDULE, "gpus": gpus, "published": published,
        "measured": measured, "caches": caches, "models": models, "extension_is_exact": check_extension(),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
