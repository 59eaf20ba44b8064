"""What a call costs beside the model's own arithmetic: the REUSE call of a deep model, which computes next to nothing.

    python benchmarks/overhead.py            # writes benchmarks/results/overhead.json

The floor is the same Dynamo-compiled model with an inner backend that returns at once: what Dynamo itself takes to find
the graph and hand over its inputs. Rounds of both alternate; medians of CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import numpy as np
import torch
from diffusers import WanVACETransformer3DModel

import hetcache_compile as hetcache
from hetcache_compile.compilation.options import BackendOptions
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "overhead.json"
GRID = (3, 4, 4)
DEPTHS = ((8, 4), (30, 15))


def build(layers: int, control_layers: int) -> tuple[Any, dict[str, Any]]:
    """A WanVACE of tiny width, and keyword arguments of a call."""
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=40, num_layers=layers, vace_in_channels=6,
        vace_layers=list(range(0, layers, layers // control_layers))[:control_layers],
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(1, 7, 12),
        "control_hidden_states": torch.randn(1, 6, 3, 8, 8),
        "control_hidden_states_scale": torch.ones(control_layers),
        "return_dict": False,
    }
    return model, call


def nothing(graph: Any, inputs: Any) -> Any:
    """A backend that returns outputs of the right shape at once."""
    outputs = tuple(torch.zeros(node.meta["example_value"].shape) for node in graph.graph.output_node().args[0])
    return lambda *_: outputs


def reuse_only(inner: str) -> Any:
    """An inner compiler that leaves deep forms as they are: only the REUSE form, which is short, is timed."""
    compiler = BackendOptions(inner).compiler()
    return lambda graph, inputs: compiler(graph, inputs) if len(graph.graph.nodes) < 300 else graph


def seconds_of(model: Any, call: dict[str, Any], times: torch.Tensor) -> list[float]:
    """The time of each call, at times that fall."""
    found = []
    for time in times:
        start = thread_time()
        model(**call, timestep=time[None])
        found.append(thread_time() - start)
    return found


@torch.no_grad()
def measure(layers: int, control_layers: int, rounds: int, inner: str) -> dict[str, Any]:
    """Medians in milliseconds."""
    torch._dynamo.reset()
    model, call = build(layers, control_layers)
    floor = torch.compile(model, backend=nothing)
    cached = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": reuse_only(inner)})
    active = np.arange(int(np.prod(GRID))) % 3 == 0
    calls = 20
    plan = hetcache.Plan.from_token_mask(
        active, GRID, num_inference_steps=calls + 1, schedule=["F"] + ["R"] * calls, extrapolation=1
    )
    times = torch.linspace(1000.0, 10.0, calls + 1)
    seconds_of(floor, call, times[:2])
    floors, reuses = [], []
    with hetcache.session(plan, strict=True) as session:
        seconds_of(cached, call, times[:3])
        session.restart()
        for _ in range(rounds):
            floors += seconds_of(floor, call, times[1:])
            reuses += seconds_of(cached, call, times)[1:]
    assert session.stats.unplanned == 0
    result = {"floor_ms": 1e3 * median(floors), "reuse_ms": 1e3 * median(reuses)}
    result["overhead_ms"] = result["reuse_ms"] - result["floor_ms"]
    result["parameters"] = len(list(model.parameters()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of 20 REUSE calls each")
    parser.add_argument("--inner", default="inductor", help="the compiler of the forms")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    depths = {}
    for depth in DEPTHS:
        name = "{} + {} blocks".format(*depth)
        depths[name] = measure(*depth, options.rounds, options.inner)
        print(name, {key: round(value, 3) for key, value in depths[name].items()}, flush=True)
    options.out.write_text(json.dumps({**provenance("cpu"), "inner": options.inner, "depths": depths}, indent=1) + "\n")


if __name__ == "__main__":
    main()
