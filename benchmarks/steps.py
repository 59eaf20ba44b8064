"""Does every FLOP saved become time saved? One form against the others, one run, ratios.

    python benchmarks/steps.py            # writes benchmarks/results/steps.json and steps.png

Plain compiled model, full form, partial form for several M / N, and reuse form, all with the same inner compiler
on the same inputs. Timings are medians of interleaved rounds, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import diffusers
import numpy as np
import torch
from diffusers import WanVACETransformer3DModel

import hetcache_compile as hetcache
from hetcache_compile.capture.rewrite import hoisted, write_form
from hetcache_compile.compilation.options import BackendOptions
from hetcache_compile.compilation.regional import compile_by_regions
from hetcache_compile.passes.analysis.flops import flop_counter, graph_flops
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.passes.ir.contract import CACHE_DTYPES
from hetcache_compile.provenance import processor_name
from hetcache_compile.runtime.backend import hetcache_backend
from hetcache_compile.sessions.stats import Stopwatch

RESULTS = Path(__file__).parent / "results"
GRID = (9, 16, 16)


def build(width: int, layers: int, control_layers: int, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=256,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=layers,
        vace_layers=list(range(0, layers, max(1, layers // control_layers)))[:control_layers],
        vace_in_channels=96,
    )
    model = model.eval().to(device, dtype)
    frames, height, width_ = GRID[0], GRID[1] * 2, GRID[2] * 2
    kwargs = {
        "hidden_states": torch.randn(1, 16, frames, height, width_, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, 128, 256, device=device, dtype=dtype),
        "control_hidden_states": torch.randn(1, 96, frames, height, width_, device=device, dtype=dtype),
        "control_hidden_states_scale": torch.ones(control_layers, device=device, dtype=dtype),
        "return_dict": False,
    }
    return model, kwargs


def prepare(forms, kind: str, kwargs: dict, inner):
    """A compiled form as the backend runs it, with its cache in place, and its FLOPs by torch's counter.

    Keys and values of the text are made in full forms. They count in the FLOPs of partial ones, which find them made.
    """
    plan, options = forms.plan, forms.plan.form_options
    parts = hoisted(forms.program, forms.analysis, None)
    form = in_process(write_form(kind, parts.program, parts.analysis, plan), options)
    names = (node.name for node in forms.program.module.graph.nodes if node.op == "placeholder")
    inputs = dict(zip(names, forms.program.flat_inputs((), kwargs), strict=True))
    taken = [inputs[name] for name in parts.graphs.takes]
    unchanging = parts.graphs.before(*taken)
    device = kwargs["hidden_states"].device
    indices = [torch.as_tensor(getattr(plan, name), device=device) for name in form.indices]
    cache = [torch.randn(e.shape, device=device).to(e.dtype) for e in form.reads]
    arguments = [*inputs.values(), *unchanging, *indices, *cache]
    compiled = compile_by_regions(form.module, arguments, inner, f"{kind} form")

    def run(*arguments):
        if kind == "full":
            parts.graphs.before(*taken)
        return compiled(*arguments)

    return run, arguments, graph_flops(in_process(forms.by_kind[kind], options).module)


def measure_cache(model, kwargs: dict, forms) -> dict[str, int]:
    """What a session really holds, against what the plan says; and what a second edit adds to it."""
    compiled = torch.compile(model, backend=hetcache_backend, options={"inner": "eager"})
    plan = forms.plan.with_schedule("FPRPR")
    with hetcache.session(plan) as session:
        sizes = []
        for _ in range(2):
            for step in range(len(plan.steps)):
                compiled(**{**kwargs, "timestep": kwargs["timestep"] - step})
            sizes.append(session.stats.cache_bytes)
    return {
        "planned_bytes": forms.buffer_bytes,
        "session_bytes": sizes[0],
        "added_by_second_edit": sizes[1] - sizes[0],
    }


def time_interleaved(runs: dict, rounds: int) -> dict[str, float]:
    for run, arguments in runs.values():
        for _ in range(2):
            run(*arguments)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, arguments) in runs.items():
            watch = Stopwatch(next(a.device for a in arguments if isinstance(a, torch.Tensor)))
            run(*arguments)
            times[name].append(watch.stop().seconds)
    return {name: median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--control-layers", type=int, default=2)
    parser.add_argument("--active", type=float, nargs="+", default=[0.25])
    parser.add_argument("--cache-dtypes", nargs="+", default=["same"], choices=CACHE_DTYPES, help="of the cache")
    parser.add_argument("--moving", action="store_true", help="partial forms with context_motion=1 too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "steps.json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model, kwargs = build(args.width, args.layers, args.control_layers, args.device, dtype)
    inner = BackendOptions(args.inner).compiler()
    num_tokens = int(np.prod(GRID))

    runs, flops, forms = {}, {}, None
    generator = np.random.default_rng(0)
    for share in args.active:
        active = np.zeros(num_tokens, dtype=bool)
        active[generator.permutation(num_tokens)[: round(share * num_tokens)]] = True
        plan = hetcache.Plan.from_token_mask(active, GRID, num_inference_steps=5)
        plans = {
            "" if dtype == "same" else f", {dtype}": replace(plan, cache_dtype=dtype) for dtype in args.cache_dtypes
        }
        plans |= {", context moves": replace(plan, context_motion=1)} if args.moving else {}
        of_share = {change: hetcache.rewrite(model, changed, kwargs=kwargs) for change, changed in plans.items()}
        for (change, forms), kind in itertools.product(of_share.items(), ("full", "partial", "reuse")):
            name = (f"partial {share:g}" if kind == "partial" else kind) + change
            same = kind == "reuse" or (kind == "full" and forms.plan.context_motion)
            if name not in runs and not (same and change):
                print(f"compiling {name}", file=sys.stderr)
                run, arguments, flops[name] = prepare(forms, kind, kwargs, inner)
                runs[name] = run, arguments
    plain = torch.compile(model, backend=args.inner, fullgraph=True)
    runs["plain"] = (lambda *_: plain(**kwargs)), [kwargs["hidden_states"]]
    with flop_counter() as counter:
        model(**kwargs)
    flops["plain"] = counter.get_total_flops()
    seconds = time_interleaved(runs, args.rounds)

    rows = {
        name: {
            "seconds": seconds[name],
            "flops": flops[name],
            "time_ratio": seconds[name] / seconds["full"],
            "flop_ratio": flops[name] / flops["full"],
        }
        for name in runs
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "processor": processor_name(args.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "model": {"width": args.width, "layers": args.layers, "control_layers": args.control_layers},
        "dtype": args.dtype,
        "num_tokens": num_tokens,
        "rounds": args.rounds,
        "forms": rows,
        "full_over_plain": seconds["full"] / seconds["plain"],
        "reuse_over_full": seconds["reuse"] / seconds["full"],
        "partial_time_over_flop_ratio": {
            name: row["time_ratio"] / row["flop_ratio"] for name, row in rows.items() if "partial" in name
        },
        "cache": measure_cache(model, kwargs, forms),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, args.out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["forms"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", label="every FLOP saved is time saved")
    for name, row in rows.items():
        axes.plot(row["flop_ratio"], row["time_ratio"], "o", label=name)
    axes.set(xlabel="FLOPs / full", ylabel="time / full", title=f"{result['num_tokens']} tokens, {result['dtype']}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
