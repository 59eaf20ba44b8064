"""Models of the zoo on several ranks against one process: `python sharded_zoo.py 2,4 MODEL ...` prints JSON.

Models are captured once, and each rank is a fork: captures take longer than everything else.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import traceback
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from models_check import distance, new_inputs, random_plan
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ENTRIES
from zoo.entry import Entry

from hetcache_compile.capture.capture import Program, capture
from hetcache_compile.capture.rewrite import Forms, analysed, write_forms
from hetcache_compile.passes.forms.collectives import SENT, Ranks, sent_bytes

GROUP = "0"
"""What torch calls the group of all ranks; forms name it before it is there."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, as collectives run."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in SENT:
            self.bytes += SENT[op](args[0].numel() * args[0].element_size(), self.size)
        return op(*args, **(kwargs or {}))


def compare(entry: Entry, program: Program, one: Forms, mine: Forms, size: int) -> dict[str, Any]:
    """How far a rank's results are from those of one process, and what it sends."""
    old, new = entry.inputs(0), new_inputs(entry, program)
    plain, cache = one.full(**old)
    changed, _ = one.partial(cache, **new)
    counted = {}
    with Traffic(size) as traffic:
        full, cache = mine.full(**old)
        counted["full"], traffic.bytes = traffic.bytes, 0
        frozen, _ = mine.partial(cache, **old)
        counted["partial"], traffic.bytes = traffic.bytes, 0
        reuse, _ = mine.reuse(cache, **old)
        counted["reuse"] = traffic.bytes
    partial, _ = mine.partial(cache, **new)
    return {
        "name": entry.name,
        "ranks": size,
        "full": distance(full, plain),
        "frozen": distance(frozen, plain),
        "reuse": distance(reuse, plain),
        "partial": distance(partial, changed),
        "counted": counted,
        "sent": {kind: sent_bytes(form.module, size) for kind, form in mine.by_kind.items()},
        "cache": [mine.cache_bytes, one.cache_bytes],
    }


def serve(rank: int, size: int, port: int, jobs: list[tuple[Entry, Program, Forms, list[Forms]]]) -> None:
    """What one rank does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120))
    assert dist.group.WORLD.group_name == GROUP
    for entry, program, one, forms in jobs:
        found = compare(entry, program, one, forms[rank], size)
        if rank == size - 1:  # whose share overlaps, where rows do not divide
            print(json.dumps(found), flush=True)


def main(sizes: list[int], names: list[str]) -> int:
    """Compare models on each number of ranks; returns 1 if a rank failed."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    captured = []
    for entry in (entry for entry in ENTRIES if entry.name in names):
        program = capture(entry.build(), (), entry.inputs())
        program, analysis = analysed(program, entry.grid, entry.token_inputs)
        count = int(np.prod(entry.grid))
        plan = random_plan(entry.grid, count // 3, count - count // 3, seed=1)
        captured.append((entry, program, analysis, plan, write_forms(program, analysis, plan)))
    failed = 0
    for size in sizes:
        ranks = [Ranks(rank, size, GROUP) for rank in range(size)]
        jobs = [
            (e, p, one, [write_forms(p, analysis, plan, r) for r in ranks]) for e, p, analysis, plan, one in captured
        ]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                try:
                    serve(rank, size, port, jobs)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        failed |= max(os.waitpid(child, 0)[1] for child in children)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main([int(size) for size in sys.argv[1].split(",")], sys.argv[2:]))
