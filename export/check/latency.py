"""`hetcache bench engine DIR`: how long each exported form takes, and what the plan's steps add up to."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from ...engine.engine import Engine, load
from ...engine.manifest import Manifest
from ...engine.runners import TensorRTRunner
from ...files import atomically
from ...plan.schedule import StepKind
from ...provenance import processor_name
from ..model.options import Progress
from ..model.sample_inputs import SAMPLES_FOLDER, read_samples

ORDER = ("plain", "full", "partial", "reuse")


@dataclass
class Timed:
    """One form, ready to run on fixed memory, and the times of its runs."""

    run: Callable[[], None]
    load_seconds: float
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    enqueue_seconds: list[float] = field(default_factory=list)
    cuda_graph: bool = False


def bench_engine(folder: Path, provider: str, rounds: int, progress: Progress) -> dict[str, Any]:
    """Time every form of an export, in interleaved rounds, so that a noisy machine disturbs all alike.

    Args:
        folder: an export.
        provider: see `engine.load`.
        rounds: how often each form is timed.
        progress: called before each round.

    Returns:
        What `bench.json` holds: per form seconds (median, p90, enqueue, first run), ratios, the plan's total; and
        partial / full at the smallest, usual and largest M of an export with `--dynamic-active`.
    """
    engine = load(folder, provider)
    timed = prepare(engine, folder, {})
    time_forms(engine, timed, rounds, lambda number: progress("timing", number, rounds))
    result = summarise(engine, timed, folder, provider)
    active = engine.manifest.dynamic_dims.get("num_active")
    sizes = sorted({active.min, active.opt, active.max}) if active else []
    for number, num_active in enumerate(sizes):
        progress("timing other budgets", number, len(sizes))
        indices = some_indices(engine, num_active)
        forms = {kind: form for kind, form in prepare(engine, folder, indices).items() if kind in ("full", "partial")}
        time_forms(engine, forms, rounds, lambda number: None)
        seconds = {kind: median(form.seconds) for kind, form in forms.items()}
        share = num_active / engine.manifest.plan.num_tokens
        flops = engine.manifest.partial_flops[str(num_active)], engine.manifest.forms["full"].flops
        result["by_active_share"][f"{share:.3f}"] = {
            "time_ratio": seconds["partial"] / seconds["full"],
            "flop_ratio": flops[0] / flops[1],
        }
    return result


def some_indices(engine: Engine, num_active: int) -> dict[str, torch.Tensor]:
    """Evenly spread active tokens; all others are context."""
    num_tokens = engine.manifest.plan.num_tokens
    is_active = torch.zeros(num_tokens, dtype=torch.bool)
    is_active[torch.arange(num_active) * num_tokens // num_active] = True
    indices = {"active_index": is_active.nonzero()[:, 0], "context_index": (~is_active).nonzero()[:, 0]}
    return {name: index.to(engine.device) for name, index in indices.items()}


def time_forms(engine: Engine, timed: Mapping[str, Timed], rounds: int, progress: Callable[[int], None]) -> None:
    """First run, warm-up, and interleaved rounds."""
    for form in timed.values():
        start = time.perf_counter()
        form.run()
        wait(engine.device)
        form.first_seconds = time.perf_counter() - start
        for _ in range(2):
            form.run()
        wait(engine.device)
        if isinstance(engine.runner, TensorRTRunner):
            capture(form)
    for number in range(rounds):
        progress(number)
        for form in timed.values():
            wait(engine.device)
            start = time.perf_counter()
            form.run()
            form.enqueue_seconds.append(time.perf_counter() - start)
            wait(engine.device)
            form.seconds.append(time.perf_counter() - start)
    progress(rounds)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(engine: Engine, folder: Path, indices: dict[str, torch.Tensor]) -> dict[str, Timed]:
    """Every form on fixed memory: `partial` and `reuse` read the very buffers that `full` writes.

    Inputs are the samples of the export, with other `indices` if given.
    """
    manifest = engine.manifest
    names = {entry.output: entry.input for entry in manifest.cache}
    cache: dict[str, torch.Tensor] = {}
    timed: dict[str, Timed] = {}
    for kind in (kind for kind in ORDER if kind in manifest.forms):
        samples = {name: tensor.to(engine.device) for name, tensor in read_samples(folder, kind).items()}
        inputs = {name: cache.get(name, indices.get(name, sample)) for name, sample in samples.items()}
        start = time.perf_counter()
        run = engine.runner.prepare(kind)
        load_seconds = time.perf_counter() - start
        outputs, written = engine.run_form(kind, inputs, {}, {}, run)
        cache.update({name: tensor for name, tensor in written.items() if name not in cache})
        results = outputs | {output: written[name] for output, name in names.items() if name in written}

        def call(
            run: Any = run, inputs: dict[str, torch.Tensor] = inputs, results: dict[str, torch.Tensor] = results
        ) -> None:
            run(inputs, results)

        timed[kind] = Timed(call, load_seconds)
    return timed


def capture(form: Timed) -> None:
    """Record a form as a CUDA graph, where TensorRT allows it."""
    plain = form.run
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            plain()
    except RuntimeError:  # engines that wait for the host inside cannot be recorded
        torch.cuda.synchronize()
        return
    form.run, form.cuda_graph = graph.replay, True


def summarise(engine: Engine, timed: Mapping[str, Timed], folder: Path, provider: str) -> dict[str, Any]:
    """The figures, from medians."""
    manifest = engine.manifest
    seconds = {kind: median(form.seconds) for kind, form in timed.items()}
    steps = {kind.form: manifest.plan.steps.count(kind.letter) for kind in StepKind}
    uncached = seconds.get("plain", seconds["full"])
    total = sum(count * seconds[kind] for kind, count in steps.items())
    flops = {kind: form.flops for kind, form in manifest.forms.items()}
    return {
        "command": f"hetcache bench engine {folder.name} --provider {provider} --rounds {len(timed['full'].seconds)}",
        "runs_on": engine.runner.name,
        "processor": processor_name(engine.device.type),
        "threads": torch.get_num_threads(),
        "rounds": len(timed["full"].seconds),
        "versions": manifest.versions,
        "model": manifest.model.class_name,
        "dtype": manifest.dtype,
        "opset": manifest.opset,
        "num_tokens": manifest.plan.num_tokens,
        "num_active": manifest.plan.num_active,
        "forms": {
            kind: {
                "median_seconds": seconds[kind],
                "p90_seconds": quantiles(form.seconds, n=10)[-1] if len(form.seconds) > 1 else seconds[kind],
                "enqueue_seconds": median(form.enqueue_seconds),
                "first_seconds": form.first_seconds,
                "load_seconds": form.load_seconds,
                "cuda_graph": form.cuda_graph,
                "flops": flops[kind],
                "time_ratio": seconds[kind] / seconds["full"],
                "flop_ratio": flops[kind] / flops["full"],
            }
            for kind, form in timed.items()
        },
        "cache_outputs_cost": seconds["full"] / uncached,
        "active_share": manifest.plan.num_active / manifest.plan.num_tokens,
        "partial_time_over_flop_ratio": (seconds["partial"] / seconds["full"]) / (flops["partial"] / flops["full"]),
        "steps": steps,
        "plan_seconds": total,
        "uncached_seconds": uncached * sum(steps.values()),
        "predicted_speedup": uncached * sum(steps.values()) / total,
        "by_active_share": {},
        "peak_bytes": peak_bytes(engine.device),
    }


def peak_bytes(device: torch.device) -> int:
    """Memory in use: of the GPU now, engines and their buffers included; of the process at its largest on a CPU."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_bench(out: Path, result: Mapping[str, Any]) -> None:
    """`bench.json` and `bench.png`."""
    out.mkdir(parents=True, exist_ok=True)
    atomically(out / "bench.json", lambda path: Path(path).write_text(json.dumps(result, indent=2) + "\n"))
    atomically(out / "bench.png", lambda path: plot(result, path))


def plot(result: Mapping[str, Any], path: str) -> None:
    """Time against FLOPs, both as shares of the full form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", label="every FLOP saved is time saved")
    for kind, form in result["forms"].items():
        axes.errorbar(
            form["flop_ratio"], form["time_ratio"],
            yerr=[[0], [max(0.0, form["p90_seconds"] / form["median_seconds"] - 1) * form["time_ratio"]]],
            fmt="o", label=f"{kind}, {1000 * form['median_seconds']:.1f} ms",
        )  # fmt: skip
    shares = result["by_active_share"]
    if shares:
        points = [(at["flop_ratio"], at["time_ratio"]) for at in shares.values()]
        axes.plot(*zip(*points, strict=True), marker="x", color="C2", label=f"partial at M/N = {', '.join(shares)}")
    axes.set(xlabel="FLOPs / full", ylabel="time / full", title=f"{result['model']}\n{result['runs_on']}")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: a header and a row for each form."""
    rows: list[tuple[str, ...]] = [("form", "median ms", "p90 ms", "enqueue ms", "first ms", "time/full", "FLOPs/full")]
    for kind, form in result["forms"].items():
        names = ("median_seconds", "p90_seconds", "enqueue_seconds", "first_seconds")
        milliseconds = [f"{1000 * form[name]:.2f}" for name in names]
        rows.append((kind, *milliseconds, f"{form['time_ratio']:.3f}", f"{form['flop_ratio']:.3f}"))
    return rows


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    steps = ", ".join(f"{count} {kind}" for kind, count in result["steps"].items())
    shares = ", ".join(
        f"{at['time_ratio']:.3f} at {share} (FLOPs {at['flop_ratio']:.3f})"
        for share, at in result["by_active_share"].items()
    )
    return [
        *([f"partial / full by M/N: {shares}"] if shares else []),
        f"M/N = {result['active_share']:.3f}; time ratio of partial over its FLOP ratio: "
        f"{result['partial_time_over_flop_ratio']:.2f}; full over plain (cost of the cache outputs): "
        f"{result['cache_outputs_cost']:.2f}",
        f"the plan ({steps}): {result['plan_seconds']:.3f} s for each branch of guidance, "
        f"{result['uncached_seconds']:.3f} s uncached: {result['predicted_speedup']:.2f}x",
    ]


def equivalent_commands(folder: Path, manifest: Manifest) -> list[str]:
    """The same measurement with NVIDIA's tools, for a machine of one's own.

    Only indices are loaded: any latents and any cache take the same time, but random indices would be invalid.
    """
    lines = []
    samples = folder / SAMPLES_FOLDER
    for kind, form in manifest.forms.items():
        loads = [f"'{s.name}':{samples / kind / s.name}.bin" for s in form.inputs if s.role == "index"]
        options = [f"--loadInputs={','.join(loads)}"] if loads else []
        if any(isinstance(size, str) for spec in form.inputs for size in spec.shape):
            shapes = ((s.name, [getattr(manifest.plan, str(d), d) for d in s.shape]) for s in form.inputs)
            options.append("--shapes=" + ",".join(f"'{name}':{'x'.join(map(str, shape))}" for name, shape in shapes))
        options.append("--noDataTransfers --useCudaGraph --warmUp=500 --duration=5")
        program, source = "trtexec", f"--onnx={folder / form.file} --stronglyTyped"
        for engine, tool in (("rtx", "tensorrt_rtx"), ("tensorrt", "trtexec")):
            if engine in manifest.engines:
                program, source = tool, f"--loadEngine={folder / manifest.engines[engine].forms[kind].file}"
        lines.append(" ".join([program, source, *options]))
        lines.append(f"polygraphy run {folder / form.file} --onnxrt --data-loader-script {samples / 'load.py'}:{kind}")
    return lines
