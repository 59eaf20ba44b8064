"""What the tests of the backend share: plans, calls, an inner compiler that counts, and the oracle.

The oracle is `Forms`: the functional forms with an explicit cache, of which `test_frozen_input` shows that they are
right. Most tests compile forms with `inner="eager"`: the dispatch is the same and a second saved is a second saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import GRID, NUM_TOKENS, tiny_call
from torch import nn
from torch.fx import GraphModule

from hetcache_compile import Forms, Plan, StepKind
from hetcache_compile.sessions.session import current_session

N = NUM_TOKENS
TOLERANCE = 1e-5  # absolute, fp32, outputs are of the order of 1
Kwargs = dict[str, Any]


class CountingInner:
    """An inner compiler that runs graphs as they are and counts them; `before_run` is called before each run."""

    def __init__(self) -> None:
        self.graphs = 0
        self.before_run: Callable[[], None] = lambda: None

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.before_run()
            return graph(*args)

        return run


def compiled(model: nn.Module, inner: Any = "eager") -> Any:
    return torch.compile(model, backend="hetcache", options={"inner": inner})


def plan_of(steps: str, num_active: int = 35, num_context: int | None = None, seed: int = 0) -> Plan:
    """A plan with M random active tokens, C random others (default all) and these steps."""
    order = np.random.default_rng(seed).permutation(N)
    active, rest = np.sort(order[:num_active]), order[num_active:]
    context = np.sort(rest[: len(rest) if num_context is None else num_context])
    kinds = tuple(next(kind for kind in StepKind if kind.letter == letter) for letter in steps)
    return Plan(GRID, active, context, np.zeros(N, dtype=np.uint8), kinds)


def expected(forms: Forms, steps: str, calls: Sequence[Kwargs]) -> list[torch.Tensor]:
    """What functional forms give for a chain of steps."""
    cache: dict[str, torch.Tensor] = {}
    outputs = []
    for letter, kwargs in zip(steps, calls, strict=True):
        kind = next(kind.form for kind in StepKind if kind.letter == letter)
        output, cache = forms.run(kind, cache, (), kwargs)
        outputs.append(tensor_of(output))
    return outputs


def tensor_of(output: Any) -> torch.Tensor:
    """A model's output, or what is in its tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    return float((a - b).abs().max())


def check(outputs: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> None:
    """Each output equals its truth."""
    errors = [max_error(output, truth) for output, truth in zip(outputs, truths, strict=True)]
    assert max(errors) <= TOLERANCE, errors


def run(model: Any, calls: Sequence[Kwargs]) -> list[torch.Tensor]:
    return [tensor_of(model(**kwargs)) for kwargs in calls]


def ignoring_time(model: nn.Module) -> nn.Module:
    """A Wan model whose output does not depend on the time, so that steps of an edit can have the same inputs."""
    with torch.no_grad():
        model.condition_embedder.time_embedder.linear_1.weight.zero_()
    return model


def frozen_calls(kwargs: Kwargs, steps: int) -> list[Kwargs]:
    """The same call at other times."""
    return [{**kwargs, "timestep": kwargs["timestep"] - 10 * step} for step in range(steps)]


def tiny_calls(steps: str, first: int = 0, **kwargs: Any) -> list[Kwargs]:
    return [tiny_call(first + seed, **kwargs) for seed in range(len(steps))]


def hetcache_is_closed() -> bool:
    return current_session() is None


def crossed(rows: Iterable[str], columns: Iterable[str]) -> list[Any]:
    """Parameters of a test for every pair of names: all of both run with all other tests, but a fifth of the pairs."""
    columns = list(columns)
    return [
        pytest.param(row, column, id=f"{row}-{column}", marks=[pytest.mark.wide] if (r + c) % 5 else [])
        for r, row in enumerate(rows)
        for c, column in enumerate(columns)
    ]
