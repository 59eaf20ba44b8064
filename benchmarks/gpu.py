"""What the forms save on a GPU, at the size of a real model with random weights.

    python benchmarks/gpu.py                       # writes benchmarks/results/gpu.json as it goes
    python benchmarks/gpu.py --size toy --device cpu    # the same at a size that runs in a test

The model has the shapes of Wan2.1-VACE-1.3B (30 + 15 blocks) or of its first blocks; inputs are random. Errors come
first: a form that is wrong is not timed. Then each size is timed in one process: plain calls as they are, compiled
whole and block by block, and the forms of several masks; medians of calls by CUDA events. `--seconds` bounds the run:
what does not fit is left out, and said. Needs no network and nothing beside torch 2.11 or later and diffusers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import WanVACETransformer3DModel
from torch.nn import functional

import hetcache_compile as hetcache
from hetcache_compile.provenance import provenance
from hetcache_compile.sessions.stats import Stopwatch

RESULT = Path(__file__).parent / "results" / "gpu.json"
SIZES: dict[str, dict[str, Any]] = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824},
    "toy": {"num_attention_heads": 2, "ffn_dim": 256},
}
TEXT = {"text_dim": 4096, "length": 512}
VACE_CHANNELS = 96
SCHEDULE = "FPRRR" * 10
CACHES: dict[str, dict[str, Any]] = {
    "fp8 cache": {"cache_dtype": "fp8"},
    "int8 cache": {"cache_dtype": "int8"},
    "cache on the host": {"cache_device": "cpu"},
    "int8 cache on the host": {"cache_dtype": "int8", "cache_device": "cpu"},
}
"""Options of the plan for forms with other caches, by section."""
SECTIONS = (
    "rates", "errors", "forms", "CUDA graphs", *CACHES, "group offload", "second edit", "compiled blocks", "eager",
    "TaylorSeer", "cache-dit", "compiled",
)  # fmt: skip
EVERY = 5
"""Steps of which other caches compute one."""


class Report:
    """A result that is on disk after every figure.

    Args:
        path: of the JSON.
        seconds: how long the whole run may take.
    """

    def __init__(self, path: Path, seconds: float, head: dict[str, Any]) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.data: dict[str, Any] = {**head, "sections": {}, "left_out": {}}

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """A dict to fill. What is raised is written down, and the run goes on."""
        found = self.data["sections"].setdefault(name, {})
        start = time.monotonic()
        try:
            yield found
        except Exception as error:
            self.data["left_out"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.print_exc()
        found["section_seconds"] = round(time.monotonic() - start, 1)
        print(name, json.dumps(found), flush=True)
        self.write()

    def has_time(self, name: str, needed: float) -> bool:
        """Whether `needed` more seconds are left; if not, that is written down."""
        left = self.end - time.monotonic()
        if left < needed:
            self.data["left_out"][name] = f"{left:.0f} s were left, it needs about {needed:.0f}"
        return left >= needed

    def write(self) -> None:
        """Put it on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def build(size: str, layers: int, control_layers: int, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights, small enough that its output stays finite in any dtype."""
    torch.manual_seed(0)
    shape = SIZES[size]
    with torch.device(device):
        model = WanVACETransformer3DModel(
            attention_head_dim=128 if size != "toy" else 16, in_channels=16, out_channels=16,
            text_dim=TEXT["text_dim"] if size != "toy" else 32, freq_dim=256, num_layers=layers,
            vace_layers=list(range(0, layers, layers // control_layers))[:control_layers],
            vace_in_channels=VACE_CHANNELS, **shape,
        )  # fmt: skip
    return as_loaded(model.eval().requires_grad_(False), dtype)


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """The model in a type, as `from_pretrained(torch_dtype=...)` loads it: some modules stay in float32."""
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model


def grid_of(frames: int, toy: bool) -> tuple[int, int, int]:
    """Tokens of a clip of 480 x 832 pixels: latent frames, rows, columns."""
    return ((frames - 1) // 4 + 1, *((4, 6) if toy else (30, 52)))


def inputs_of(model: Any, grid: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a call, but for its time."""
    device = next(model.parameters()).device
    latent = (grid[0], 2 * grid[1], 2 * grid[2])
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    return {
        "hidden_states": random(1, 16, *latent),
        "encoder_hidden_states": random(1, TEXT["length"] if device.type == "cuda" else 7, model.config.text_dim),
        "control_hidden_states": random(1, VACE_CHANNELS, *latent),
        "control_hidden_states_scale": torch.ones(len(model.config.vace_layers), device=device, dtype=dtype),
        "return_dict": False,
    }


def plan_of(grid: tuple[int, int, int], share: float, schedule: Any, **options: Any) -> hetcache.Plan:
    """A plan whose active tokens are a box in the middle of every frame, of about `share` of all."""
    number = int(np.prod(grid))
    rows, columns = np.mgrid[: grid[1], : grid[2]]
    distance = np.maximum(abs(rows + 0.5 - grid[1] / 2) / grid[1], abs(columns + 0.5 - grid[2] / 2) / grid[2])
    order = np.argsort(np.tile(distance.ravel(), grid[0]), kind="stable")
    active = np.zeros(number, dtype=bool)
    active[order[: round(share * number)]] = True
    plan = hetcache.Plan.from_token_mask(
        active, grid, num_inference_steps=len(schedule), schedule=schedule, extrapolation=1
    )
    return dataclasses.replace(plan, **options)


def times_of(steps: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(999.0, 20.0, steps, device=device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def first_call(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of wall clock of a call, to its end."""
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def timed(run: Callable[[], Any], device: torch.device, calls: int) -> dict[str, float]:
    """Median seconds of calls, and how far apart a quarter of them and three quarters lie."""
    run()
    watches = []
    for _ in range(calls):
        watch = Stopwatch(device)
        run()
        watches.append(watch.stop())
    seconds = sorted(watch.seconds for watch in watches)
    return {
        "seconds": median(seconds),
        "spread": (seconds[3 * len(seconds) // 4] - seconds[len(seconds) // 4]) / median(seconds),
    }


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Sections


def measure_rates(found: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """What the device can do: matrix products, copies, attention."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 256
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found["matmul_flops"] = 2 * size**3 / timed(lambda: left @ right, device, 10)["seconds"]
    source = torch.randn(2**30 if cuda else 2**20, device=device)
    target = torch.empty_like(source)
    found["copy_bytes"] = 2 * 4 * source.numel() / timed(lambda: target.copy_(source), device, 10)["seconds"]
    tokens = 32760 if cuda else 96
    query, key, value = (torch.randn(1, 12, tokens, 128, device=device, dtype=dtype) for _ in range(3))
    attend = functional.scaled_dot_product_attention
    seconds = timed(lambda: attend(query, key, value), device, 5)["seconds"]
    found["attention_flops"] = 4 * 12 * tokens * tokens * 128 / seconds


@torch.no_grad()
def check_errors(
    found: dict[str, Any],
    size: str,
    layers: int,
    device: torch.device,
    shares: list[float],
    compiling: Mapping[str, Any],
    dtypes: list[str],
    caches: list[Mapping[str, Any]],
) -> None:
    """Every form, compiled, on inputs that do not change, against the plain model in float64."""
    grid = grid_of(9, size == "toy")
    exact = build(size, layers, layers // 2, str(device), torch.float32)
    inputs = inputs_of(exact, grid, torch.float32)
    time = torch.tensor([500.0], device=device)
    doubles = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    reference = copy.deepcopy(exact).double()(**doubles, timestep=time)[0]
    for dtype in (getattr(torch, name) for name in dtypes):
        model = as_loaded(copy.deepcopy(exact), dtype)
        own = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        rows = {"plain": error_of(model(**own, timestep=time)[0], reference)}
        torch._dynamo.reset()
        frozen = torch.compile(FrozenTime(model, float(time)), backend=hetcache.hetcache_backend, options=compiling)
        for share, caching in itertools.product(shares, caches):
            plan = plan_of(grid, share, "FPRFPRFPR", **caching)
            with hetcache.session(plan, strict=True) as session:
                outputs = [frozen(time_now[None], **own)[0] for time_now in times_of(len(plan.steps), device)]
            for kind, output in zip(session.stats.kinds, outputs, strict=True):
                name = ", ".join([f"M/N {share}", *caching.values(), kind.name.lower()])
                rows[name] = max(rows.get(name, 0.0), error_of(output, reference))
        found[str(dtype).removeprefix("torch.")] = rows


class FrozenTime(torch.nn.Module):
    """A model that sees one time, whatever it is given: so a session can tell steps apart, and each should return the
    same."""

    def __init__(self, model: Any, time: float) -> None:
        super().__init__()
        self.model, self.time = model, time

    def forward(self, timestep: torch.Tensor, **inputs: Any) -> Any:
        """The model's output at its one time."""
        return self.model(timestep=0 * timestep + self.time, **inputs)


@torch.no_grad()
def measure_plain(found: dict[str, Any], way: str, model: Any, inputs: dict[str, Any], calls: int) -> None:
    """The model as it is, compiled whole, or compiled block by block; one call, and many in a row."""
    device = inputs["hidden_states"].device
    torch._dynamo.reset()
    if way == "compiled blocks":
        model = copy.copy(model)
        model._modules = {name: copy.copy(module) for name, module in model._modules.items()}
        model.compile_repeated_blocks()
    run = torch.compile(model) if way == "compiled" else model
    call = {**inputs, "timestep": times_of(1, device)}
    found["cold_seconds"] = first_call(lambda: run(**call), device)
    found.update(timed(lambda: run(**call), device, calls))
    found["row_seconds"] = first_call(lambda: [run(**call) for _ in range(2 * calls)], device) / (2 * calls)


@torch.no_grad()
def measure_forms(
    found: dict[str, Any], model: Any, inputs: dict[str, Any], grid: tuple[int, int, int], shares: list[float],
    calls: int, compiling: Mapping[str, Any], caching: Mapping[str, Any], report: Report, expected_cold: float,
) -> None:  # fmt: skip
    """The compiled model in sessions: each kind of step, its first call, the cache, peak memory; and a whole edit."""
    device = inputs["hidden_states"].device
    torch._dynamo.reset()
    cached = torch.compile(model, backend=hetcache.hetcache_backend, options=compiling)
    for share in shares:
        if not report.has_time(f"M/N {share}", expected_cold):
            break
        plan = plan_of(grid, share, "F" + "P" * (calls + 1) + "R" * (calls + 1) + "F" * calls, **caching)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cold: dict[str, float] = {}
        with hetcache.session(plan, strict=True) as session:
            for kind, time_now in zip(plan.steps, times_of(len(plan.steps), device), strict=True):
                seconds = first_call(lambda t=time_now: cached(**inputs, timestep=t[None]), device)
                cold.setdefault(kind.name.lower(), seconds)
            stats = session.stats
            row: dict[str, Any] = {
                "tokens": plan.num_tokens, "active": plan.num_active, "cold_seconds": cold,
                "compile_seconds": stats.compile_seconds, "cache_bytes": stats.cache_bytes,
            }  # fmt: skip
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        for kind in hetcache.StepKind:
            of_kind = [w.seconds for k, w in zip(stats.kinds, stats.watches, strict=True) if k is kind]
            warm = sorted(of_kind[1:])
            spread = (warm[3 * len(warm) // 4] - warm[len(warm) // 4]) / median(warm)
            row[kind.name.lower()] = {"seconds": median(warm), "spread": spread}
        row["edit"] = measure_edit(cached, inputs, plan_of(grid, share, SCHEDULE, **caching), device)
        found[f"M/N {share}"] = row
        print(json.dumps(row), flush=True)
        report.write()


def measure_edit(cached: Any, inputs: dict[str, Any], plan: hetcache.Plan, device: torch.device) -> dict[str, Any]:
    """All steps of a plan in a row, by wall clock: the second of two edits."""
    times = times_of(len(plan.steps), device)
    for _ in range(2):
        with hetcache.session(plan, strict=True) as session:
            seconds = first_call(lambda: [cached(**inputs, timestep=time[None]) for time in times], device)
    return {"steps": session.stats.steps, "seconds": seconds, "seconds_in_forms": session.stats.total_seconds}


@torch.no_grad()
def measure_offload(
    found: dict[str, Any], model: Any, inputs: dict[str, Any], grid: tuple[int, int, int], share: float, calls: int,
    compiling: Mapping[str, Any],
) -> None:  # fmt: skip
    """diffusers' group offloading, plain and cached; the cached outputs against those of weights that stay."""
    device, kinds = inputs["hidden_states"].device, "F" + "P" * (calls + 1) + "R" * 2 + "F" * calls
    plan = plan_of(grid, share, kinds)
    times = times_of(len(plan.steps), device)

    def edit(model: Any) -> tuple[list[torch.Tensor], hetcache.Stats]:
        torch._dynamo.reset()
        cached = torch.compile(model, backend=hetcache.hetcache_backend, options=compiling)
        with hetcache.session(plan, strict=True) as session:
            outputs = [cached(**inputs, timestep=now[None])[0].cpu() for now in times]
        return outputs, session.stats

    expected, resident = edit(model)
    model.to("cpu")
    model.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    )
    call = {**inputs, "timestep": times[:1]}
    first_call(lambda: model(**call), device)
    for name, run in (("plain", None), ("cached", edit)):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = found[name] = {}
        if run is None:
            row["full"] = timed(lambda: model(**call), device, calls)
        else:
            outputs, offloaded = run(model)
            row["largest_error"] = max(map(error_of, outputs, expected))
            row |= by_kind(offloaded)
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
    found["weights stay"] = by_kind(resident)


def by_kind(stats: hetcache.Stats) -> dict[str, Any]:
    """Median seconds of the calls of each kind but the first, which compiles."""
    found = {}
    for kind in hetcache.StepKind:
        warm = [w.seconds for k, w in zip(stats.kinds, stats.watches, strict=True) if k is kind][1:]
        found[kind.name.lower()] = {"seconds": median(warm)}
    return found


@torch.no_grad()
def measure_second_edit(
    found: dict[str, Any], model: Any, inputs: dict[str, Any], grid: tuple[int, int, int], share: float, calls: int,
    compiling: Mapping[str, Any],
) -> None:  # fmt: skip
    """An edit that is recorded, and the same again: each PARTIAL step reads the record of its FULL one."""
    device = inputs["hidden_states"].device
    torch._dynamo.reset()
    cached = torch.compile(model, backend=hetcache.hetcache_backend, options=compiling)
    plan = plan_of(grid, share, "F" * (calls + 1))
    times, outputs, record = times_of(calls + 1, device), list[list[torch.Tensor]](), None
    for name in ("first", "second"):
        with hetcache.session(plan, strict=True, record=record is None, memory_of=record) as session:
            outputs.append([cached(**inputs, timestep=now[None])[0].cpu() for now in times])
        record, stats = session.record or record, session.stats
        warm = [watch.seconds for watch in stats.watches][1:]
        found[name] = {"seconds": median(warm), "steps": stats.steps, "record_bytes": stats.record_bytes}
    found["largest_error"] = max(map(error_of, outputs[1], outputs[0]))


@torch.no_grad()
def measure_other(found: dict[str, Any], cache: str, model: Any, inputs: dict[str, Any]) -> None:
    """Another library's cache that computes one step in `EVERY`: the second of two edits of as many steps as ours."""
    device, steps = inputs["hidden_states"].device, len(SCHEDULE)
    for way in ("eager", "compiled blocks"):
        torch._dynamo.reset()
        cached = copy.deepcopy(model)
        if cache == "TaylorSeer":
            cached.enable_cache(
                diffusers.TaylorSeerCacheConfig(
                    cache_interval=EVERY, max_order=1, use_lite_mode=True, disable_cache_before_step=1
                )
            )
        else:
            import cache_dit

            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, num_inference_steps=steps,
                residual_diff_threshold=1e9,
                steps_computation_mask=[int(step % EVERY == 0) for step in range(steps)],
            )  # fmt: skip
            cache_dit.enable_cache(cached, cache_config=config)
        if way == "compiled blocks":
            cached.compile_repeated_blocks()
        row = found[way] = {}
        for name in ("cold_seconds", "seconds"):
            if cache == "TaylorSeer":
                cached._reset_stateful_cache()
            row[name] = first_call(lambda m=cached: run_edit(m, inputs, times_of(steps, device)), device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["steps"] = steps


def run_edit(model: Any, inputs: dict[str, Any], times: torch.Tensor) -> None:
    """All steps of one branch."""
    for now in times:
        with model.cache_context("cond"):
            model(**inputs, timestep=now[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="1.3B", choices=tuple(SIZES), help="the width of the model")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--control-layers", type=int, default=15)
    parser.add_argument("--error-layers", type=int, default=4, help="blocks of the model whose errors are looked at")
    parser.add_argument("--frames", type=int, nargs="+", default=[33, 81])
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.1, 0.5])
    parser.add_argument("--calls", type=int, default=5, help="of each kind, after the first")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop beginning anything more")
    parser.add_argument("--cold", type=float, default=45, help="seconds to set aside for compiling the forms of a mask")
    parser.add_argument("--error-dtypes", nargs="+", default=["float32", "bfloat16"], help="types that they are of")
    parser.add_argument("--inner", default="inductor", help="the compiler of the forms")
    parser.add_argument("--mode", help="of torch.compile, for the forms whose errors are looked at")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS, help="in order")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device, size = torch.device(options.device), options.size
    compiling = {"inner": options.inner}
    report = Report(options.out, options.seconds, provenance(options.device))
    report.data["model"] = {"size": size, "layers": options.layers, "control_layers": options.control_layers}
    model = build(size, options.layers, options.control_layers, options.device, torch.bfloat16)
    for section in options.sections:
        if section == "rates":
            with report.section(section) as found:
                measure_rates(found, device, torch.bfloat16)
            continue
        if section == "errors":
            with report.section(section) as found:
                caches = [{}, *(CACHES[name] for name in options.sections if name in CACHES)]
                check_errors(
                    found, size, options.error_layers, device, options.active[:1],
                    {**compiling, "mode": options.mode}, options.error_dtypes, caches,
                )  # fmt: skip
            continue
        for frames in options.frames:
            name = f"{frames} frames, {section}"
            grid = grid_of(frames, size == "toy")
            inputs = inputs_of(model, grid, torch.bfloat16)
            if not report.has_time(name, options.cold if section != "eager" else 10):
                continue
            with report.section(name) as found:
                if section in ("forms", "CUDA graphs", *CACHES):
                    mode = {"mode": "reduce-overhead"} if section == "CUDA graphs" else {}
                    measure_forms(
                        found, model, inputs, grid, options.active, options.calls, {**compiling, **mode},
                        CACHES.get(section, {}), report, options.cold,
                    )  # fmt: skip
                elif section == "second edit":
                    measure_second_edit(found, model, inputs, grid, options.active[0], options.calls, compiling)
                elif section == "group offload":
                    offloaded = copy.deepcopy(model)
                    measure_offload(found, offloaded, inputs, grid, options.active[0], options.calls, compiling)
                elif section in ("TaylorSeer", "cache-dit"):
                    measure_other(found, section, model, inputs)
                else:
                    measure_plain(found, section, model, inputs, options.calls)
    report.write()


if __name__ == "__main__":
    main()
