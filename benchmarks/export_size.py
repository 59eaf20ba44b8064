"""Export the real Wan2.1-VACE-1.3B architecture with random weights, and say what it takes.

    python benchmarks/export_size.py --out out/engine         # writes benchmarks/results/export_size.json
    python benchmarks/export_size.py --out out/engine --trt   # ... and builds engines: export_size_trt.json

Nothing is computed, so the token grid is the real one of 33 frames at 480 x 832.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import WanVACETransformer3DModel

import hetcache_compile as hetcache
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.onnx.describe import versions
from hetcache_compile.provenance import processor_name

RESULTS = Path(__file__).parent / "results"
GRID = (9, 30, 52)
CONFIG = {
    "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96,
}  # fmt: skip
"""transformer/config.json of Wan-AI/Wan2.1-VACE-1.3B-diffusers, where it differs from the class's defaults."""


def wan_vace_1_3b(plan: hetcache.Plan) -> torch.nn.Module:
    """A factory for `hetcache-export benchmarks.export_size:wan_vace_1_3b`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return WanVACETransformer3DModel(**CONFIG)
    finally:
        torch.set_default_dtype(default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the export; removed at the end")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--trt", action="store_true", help="build TensorRT for RTX engines too")
    args = parser.parse_args()
    active = np.random.default_rng(0).random(int(np.prod(GRID))) < 0.25
    plan = hetcache.Plan.from_token_mask(active, GRID, num_inference_steps=50)
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    start = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        seconds[f"{stage} {done}/{total}"] = time.perf_counter() - start
        peaks[f"{stage} {done}/{total}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{seconds[f'{stage} {done}/{total}']:7.1f} s  {stage} {done}/{total}", file=sys.stderr)

    finish = []
    if args.trt:
        from hetcache_compile.export.trt.build import RTX, build_engines

        finish.append(partial(build_engines, kind=RTX, capabilities=["8.9"]))
    manifest = export_model(
        f"{Path(__file__).stem}:wan_vace_1_3b", plan, args.out, ExportOptions(args.dtype), finish=finish,
        progress=progress,
    )  # fmt: skip
    result = {
        "command": f"python benchmarks/export_size.py --dtype {args.dtype}" + " --trt" * args.trt,
        "versions": versions(),
        "processor": processor_name("cpu"),
        "model": {"class": manifest.model.class_name, **CONFIG},
        "grid": GRID,
        "num_active": plan.num_active,
        "dtype": args.dtype,
        "opset": manifest.opset,
        "seconds": time.perf_counter() - start,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_gib_by_stage": peaks,
        "seconds_by_stage": seconds,
        "weights_bytes": manifest.weights.num_bytes,
        "onnx_bytes": {kind: (args.out / form.file).stat().st_size for kind, form in manifest.forms.items()},
        "flops": {kind: form.flops for kind, form in manifest.forms.items()},
        "engine_bytes": {
            kind: {name: file.num_bytes for name, file in spec.forms.items()} for kind, spec in manifest.engines.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"export_size{'_trt' * args.trt}.json").write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(args.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
