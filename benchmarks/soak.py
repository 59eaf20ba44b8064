"""A thousand edits of varied masks on one compiled model: what is compiled, what memory is kept, what is wrong.

    python benchmarks/soak.py            # writes benchmarks/results/soak.json

Each edit has a session of its own. All are made once more in reverse order, and compared bit for bit, and with the
functional forms, which have no session; some are compared with the same edit on a model compiled anew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel

import hetcache_compile as hetcache
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "soak.json"
GRID = (3, 8, 8)
STEPS = "FPRPRF"
TIMES = torch.linspace(990.0, 90.0, len(STEPS))
graphs = 0


def counting(graph: Any, _: Sequence[Any]) -> Any:
    """An inner compiler that counts what it is given, and runs it as it is."""
    global graphs
    graphs += 1
    return graph


def build() -> Any:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=40, num_layers=2,
    ).eval()  # fmt: skip


def plans(count: int) -> Iterator[hetcache.Plan]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        mask = np.zeros(GRID, dtype=bool)
        height, width = generator.integers(1, GRID[1] + 1), generator.integers(1, GRID[2] + 1)
        top, left = generator.integers(0, GRID[1] - height + 1), generator.integers(0, GRID[2] - width + 1)
        mask[:, top : top + height, left : left + width] = True
        yield hetcache.Plan.from_mask(
            mask, GRID, num_inference_steps=len(STEPS), schedule=list(STEPS), margin=1, extrapolation=1
        )


def edit(model: Any, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    text = torch.randn(1, 7, 12, generator=generator)
    return [
        model(torch.randn(1, 4, 3, 16, 16, generator=generator), time[None], text, return_dict=False)[0]
        for time in TIMES
    ]


def functional_edit(forms: hetcache.Forms, number: int) -> list[torch.Tensor]:
    """The same edit by forms that take the cache and return the next one."""
    cache: dict[str, torch.Tensor] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal cache
        kind = forms.plan.steps[next(steps)]
        output, cache = forms.run(kind.form, cache, args, kwargs)
        return output

    steps = iter(range(len(STEPS)))
    return edit(call, number)


def digest(outputs: list[torch.Tensor]) -> str:
    """Of every bit: kept in place of the outputs, which would count as memory."""
    return hashlib.sha256(b"".join(output.numpy().tobytes() for output in outputs)).hexdigest()


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def compiled() -> Any:
    torch._dynamo.reset()
    return torch.compile(build(), backend=hetcache.hetcache_backend, options={"inner": counting})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=40, help="edits that are compared with a model compiled anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    all_plans = list(plans(options.edits))
    model, outputs, memory, made = compiled(), [], [], []
    for number, plan in enumerate(all_plans):
        with hetcache.session(plan, strict=True):
            outputs.append(digest(edit(model, number)))
        if number % 20 == 19:
            gc.collect()
            memory.append(resident_kib())
        made.append(graphs)
    half = len(memory) // 2
    slope = float(np.polyfit(np.arange(half, len(memory)) * 20, memory[half:], 1)[0])
    # Once more, last edit first: what an edit gives must not depend on those before it.
    plain, forms, again, error = build(), {}, 0, 0.0
    example = torch.zeros(1, 4, 3, 16, 16), TIMES[:1], torch.zeros(1, 7, 12)
    for number, plan in reversed(list(enumerate(all_plans))):
        with hetcache.session(plan, strict=True):
            found = edit(model, number)
        again += digest(found) != outputs[number]
        if plan.num_active not in forms:
            forms[plan.num_active] = hetcache.rewrite(plain, plan, example, {"return_dict": False})
        expected = functional_edit(forms[plan.num_active].for_plan(plan), number)
        error = max(error, *(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
    mismatches = 0
    for number in range(0, options.edits, max(1, options.edits // options.fresh)):
        with hetcache.session(all_plans[number], strict=True):
            mismatches += digest(edit(compiled(), number)) != outputs[number]
    result = {
        **provenance("cpu"),
        "edits": options.edits,
        "values_of_m": len({plan.num_active for plan in all_plans}),
        "graphs_compiled": made[-1],
        "last_compilation_in_edit": int(np.searchsorted(made, made[-1])),
        "kib_per_edit_second_half": slope,
        "compared_with_a_model_compiled_anew": len(range(0, options.edits, max(1, options.edits // options.fresh))),
        "mismatches": mismatches,
        "differ_in_reverse_order": again,
        "largest_error_to_functional_forms": error,
    }
    print({key: value for key, value in result.items() if key not in ("versions", "command")})
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
