"""Ten edits in one session: nothing is compiled or kept, and each is what it is alone, bit for bit.

`test_edits` has fifty masks in fifty sessions, and `benchmarks/soak.py` a thousand.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import CountingInner, compiled
from models import GRID, call, wan

import hetcache_compile as hetcache
from hetcache_compile import Plan

STEPS = "FPRPRF"
EDITS = 10
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def guided(fast: Any, edit: int) -> list[torch.Tensor]:
    """The outputs of an edit with two named branches."""
    outputs = []
    for step in range(len(STEPS)):
        for number, name in enumerate(("cond", "uncond")):
            kwargs = call(fast, seed=100 * edit + step)
            kwargs["encoder_hidden_states"] = call(fast, seed=100 * edit + 50 * number)["encoder_hidden_states"]
            with fast.cache_context(name):
                outputs.append(fast(**kwargs)[0])
    return outputs


@pytest.fixture(autouse=True)
def own_objects() -> Iterator[None]:
    """Do not look through what other tests have left, again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


def test_ten_edits_in_one_session() -> None:
    inner = CountingInner()
    fast = compiled(wan(num_layers=1), inner)
    mask = np.zeros(GRID, dtype=bool)
    mask[:, 1:3, 2:4] = True
    plan = Plan.from_mask(mask, GRID, num_inference_steps=len(STEPS), schedule=list(STEPS), margin=1)
    alone = []
    for edit in range(EDITS):
        with hetcache.session(plan, strict=True):
            alone.append(guided(fast, edit))
    graphs, kept = inner.graphs, []
    with hetcache.session(plan, strict=True) as session:
        for edit in range(EDITS):
            assert all(map(torch.equal, guided(fast, edit), alone[edit]))
            kept.append((live_tensors(), session.stats.cache_bytes))
        assert len(session.stats.kinds) == 2 * EDITS * len(STEPS)
        assert session.stats.steps == {"FULL": 4 * EDITS, "PARTIAL": 4 * EDITS, "REUSE": 4 * EDITS}
    assert inner.graphs == graphs
    assert kept[1:] == [kept[1]] * (EDITS - 1)
