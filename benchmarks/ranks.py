"""A model of how edits scale over GPUs: counted work, counted bytes, published rates. No GPU, nothing measured in time.

    python benchmarks/ranks.py          # writes benchmarks/results/ranks.json

A call takes what `hetcache estimate` says of one rank's form, and then its bytes over the link: nothing is overlapped.
The bytes are counted in the rank's graphs (`sent_bytes`), which a test compares with what collectives really sent.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetcache_compile import Plan
from hetcache_compile.capture.rewrite import Forms, write_form
from hetcache_compile.estimate.gpus import Gpu, find_gpu
from hetcache_compile.estimate.inventory import forms_of, missing_blocks
from hetcache_compile.estimate.models import find_model
from hetcache_compile.estimate.work import work_of
from hetcache_compile.passes.forms.collectives import Ranks, sent_bytes
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "ranks.json"
GPU, ACTIVE, STEPS, SCHEDULE = "h100", 0.25, 50, "balanced"
SIZES = (1, 2, 4, 8)
LINKS = {
    "NVLink 4": {"bytes_per_second": 450e9, "source": "NVIDIA's H100 data sheet: 900 GB/s, both directions together"},
    "PCIe 5 x16": {"bytes_per_second": 64e9, "source": "NVIDIA's H100 data sheet: 128 GB/s, both directions together"},
}
RUNS = (("wan2.1-vace-1.3b", (480, 832, 81)), ("wan2.1-t2v-14b", (720, 1280, 81)))


def plan_of(grid: tuple[int, int, int]) -> Plan:
    number = int(np.prod(grid))
    active = np.arange(number) < round(ACTIVE * number)
    return Plan.from_token_mask(active, grid, num_inference_steps=STEPS, schedule=SCHEDULE, extrapolation=1)


def figures(forms: Forms, plan: Plan, gpu: Gpu, size: int) -> dict[str, float]:
    """Seconds of compute and bytes sent of each form, and the bytes of one branch's cache, of one of P ranks."""
    found: dict[str, float] = {}
    for kind in forms.by_kind:
        options = plan.form_options.for_kind(kind)
        ranks = Ranks(0, size, "0") if size > 1 else None
        form = in_process(write_form(kind, forms.program, forms.analysis, plan, options, ranks), options)
        found[f"{kind}_seconds"] = gpu.seconds(work_of(form.module))
        found[f"{kind}_bytes"] = sent_bytes(form.module, size)
        if kind == "full":
            found["cache_bytes"] = sum(entry.num_bytes for entry in form.reads)
    return found


def scaled(name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """A model's figures on each number of ranks, counted on few blocks and extended to all of them."""
    model, gpu = find_model(name), find_gpu(GPU)
    plan = plan_of(model.with_references(model.grid_of(*size)))
    missing = missing_blocks(model)
    captured = forms_of(model, plan, torch.bfloat16, missing)
    totals = {ranks: figures(captured, plan, gpu, ranks) for ranks in SIZES}
    base = {ranks: dict(found) for ranks, found in totals.items()}
    for block, count in missing.items():
        longer = forms_of(model, plan, torch.bfloat16, {**missing, block: count - 1})
        for ranks in SIZES:
            more = figures(longer, plan, gpu, ranks)
            for key, value in more.items():
                totals[ranks][key] += count * (value - base[ranks][key])
    kinds = [kind.form for kind in plan.steps]
    rows = []
    for ranks, found in totals.items():
        row: dict[str, Any] = {"ranks": ranks, **found}
        for link, rate in LINKS.items():
            seconds = {
                kind: found[f"{kind}_seconds"] + found[f"{kind}_bytes"] / rate["bytes_per_second"]
                for kind in ("full", "partial", "reuse")
            }
            row[link] = {**seconds, "edit": model.branches * sum(seconds[kind] for kind in kinds)}
        rows.append(row)
        print(name, json.dumps(row), flush=True)
    steps = {kind: kinds.count(kind) for kind in ("full", "partial", "reuse")}
    return {"model": name, "size": size, "tokens": plan.num_tokens, "steps": steps, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    result = {
        **provenance("cpu"), "gpu": find_gpu(GPU).describe(), "links": LINKS, "active": ACTIVE, "schedule": SCHEDULE,
        "models": [scaled(name, size) for name, size in RUNS],
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
