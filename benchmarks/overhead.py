"""What a call costs beside the model's own arithmetic: the REUSE call of a deep model, which computes next to nothing.

    python benchmarks/overhead.py            # writes benchmarks/results/overhead.json

The floor is the same Dynamo-compiled model with an inner backend that returns at once: what Dynamo itself takes to find
the graph and hand over its inputs. The overhead is the time of what Dynamo calls, beyond that of the floor's: whole
calls of a deep model look at so many weights that their time moves with the machine's caches. CPU time of one thread,
medians over calls, in the calmest of several turns.
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


def seconds_of(model: Any, call: dict[str, Any], time: torch.Tensor) -> float:
    """The CPU time of one call."""
    start = thread_time()
    model(**call, timestep=time[None])
    return thread_time() - start


@torch.no_grad()
def measure(layers: int, control_layers: int, rounds: int, turns: int, inner: str) -> dict[str, Any]:
    """Milliseconds of whole calls, and of the part that Dynamo hands to the backend: medians, in the calmest turn."""
    model, call = build(layers, control_layers)
    active = np.arange(int(np.prod(GRID))) % 3 == 0
    calls = 20
    plan = hetcache.Plan.from_token_mask(
        active, GRID, num_inference_steps=calls + 1, schedule=["F"] + ["R"] * calls, extrapolation=1
    )
    times = torch.linspace(1000.0, 10.0, calls + 1)

    def medians(backend: Any) -> tuple[float, float]:
        torch._dynamo.reset()
        inside: list[float] = []

        def watched(graph: Any, inputs: Any) -> Any:
            run = backend(graph, inputs)

            def timed(*given: Any) -> Any:
                start = thread_time()
                results = run(*given)
                inside.append(thread_time() - start)
                return results

            return timed

        compiled = torch.compile(model, backend=watched)
        edits = [[seconds_of(compiled, call, time) for time in times] for _ in range(rounds + 1)]
        kept = [edit * len(times) + step for edit in range(1, rounds + 1) for step in range(1, len(times))]
        whole = [seconds for edit in edits for seconds in edit]
        return 1e3 * median(whole[number] for number in kept), 1e3 * median(inside[number] for number in kept)

    def ours(graph: Any, inputs: Any) -> Any:
        return hetcache.hetcache_backend(graph, inputs, options={"inner": reuse_only(inner)})

    floors, reuses = [], []
    for _ in range(turns):
        floors.append(medians(nothing))
        with hetcache.session(plan, strict=True) as session:
            reuses.append(medians(ours))
        assert session.stats.unplanned == 0
    (floor, nothing_inside), (reuse, inside) = min(floors), min(reuses)
    return {
        "floor_ms": floor,
        "reuse_ms": reuse,
        "overhead_ms": inside - nothing_inside,
        "turns": {"floor_ms": [whole for whole, _ in floors], "reuse_ms": [whole for whole, _ in reuses]},
        "parameters": len(list(model.parameters())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of 20 REUSE calls each")
    parser.add_argument("--turns", type=int, default=4, help="of both; the calmest counts")
    parser.add_argument("--inner", default="inductor", help="the compiler of the forms")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    depths = {}
    for depth in DEPTHS:
        name = "{} + {} blocks".format(*depth)
        depths[name] = measure(*depth, options.rounds, options.turns, options.inner)
        print(name, json.dumps(depths[name]), flush=True)
    options.out.write_text(json.dumps({**provenance("cpu"), "inner": options.inner, "depths": depths}, indent=1) + "\n")


if __name__ == "__main__":
    main()
