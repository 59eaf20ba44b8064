"""Several processes at one edit give what one process gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rank_jobs
import torch
from backend_checks import check, expected, plan_of, tiny_calls
from models import TinyDiT
from ranks import Ranks

import hetcache_compile as hetcache


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "rank_jobs")
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_ranks_share_the_rows_of_a_session(two: Ranks) -> None:
    steps = "FPRPF"
    plan, calls = plan_of(steps), tiny_calls(steps)
    truth = expected(hetcache.rewrite(TinyDiT().eval(), plan, (), calls[0]), steps, calls)
    for outputs, kinds, _ in two(rank_jobs.edit, plan, steps, (2,)):
        check(outputs, truth)
        assert kinds == {"FULL": 2, "PARTIAL": 2, "REUSE": 1}
