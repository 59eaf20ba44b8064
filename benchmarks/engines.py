"""Export the reference model for one edit and time its engines on onnxruntime: results/engine.json and engine.png.

python benchmarks/engines.py                              # this machine's CPU
python benchmarks/engines.py --provider tensorrt-rtx      # a GPU
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from hetcache_compile import reference
from hetcache_compile.edit.editing import EditRequest, make_plan
from hetcache_compile.engine.manifest import Manifest
from hetcache_compile.export.check import latency
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.model.sample_call import CallShape
from hetcache_compile.export.trt.build import build_engines

RESULTS = Path(__file__).parent / "results"
KINDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--provider", default="ort-cpu", help="ort-cpu, ort-cuda, tensorrt or tensorrt-rtx")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--schedule", default="balanced")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    clip = reference.procedural_clip(0)  # a mask of about 5 %, a quarter of the tokens with margin and context
    request = EditRequest(video=clip.video, mask=clip.mask, prompt=clip.prompt)
    pipe = reference.load()
    quarter = make_plan(pipe, request, args.schedule).num_tokens // 4
    plan = make_plan(pipe, request, args.schedule, multiple=quarter, context_motion=0)

    def progress(stage: str, done: int, total: int) -> None:
        print(f"{stage} {done}/{total}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "engine"
        export_model(
            str(reference.FOLDER), plan, folder,
            ExportOptions(args.dtype, dynamic_active=(quarter // 2, quarter, 2 * quarter)),
            shape=CallShape(plan, text_tokens=reference.MAX_TEXT_LENGTH), progress=progress,
        )  # fmt: skip
        if args.provider in KINDS:
            build_engines(folder, Manifest.load(folder), KINDS[args.provider], (), progress)
        result = latency.bench_engine(folder, args.provider, args.rounds, progress)
    result["command"] = f"python benchmarks/engines.py {shlex.join(sys.argv[1:])}".strip()
    (RESULTS / "engine.json").write_text(json.dumps(result, indent=2) + "\n")
    latency.plot(result, str(RESULTS / "engine.png"))
    print("\n".join(latency.conclusions(result)))


if __name__ == "__main__":
    main()
