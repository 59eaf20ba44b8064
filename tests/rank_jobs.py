"""What ranks do in the tests: functions of a rank, and of what the test sends it."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from backend_checks import compiled, expected, plan_of, run, tiny_calls
from models import TinyDiT, call, wan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hetcache_compile as hetcache
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.passes.forms.collectives import Ranks, Share
from hetcache_compile.passes.ir.axis import Tokens
from hetcache_compile.ranks.parallel import Parallel


class Timed(TinyDiT):
    """A model that is given a time, by which outputs are predicted."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(latents * timestep.view(-1, 1, 1, 1, 1) / 500, text)


def timed_calls(steps: str) -> list[dict[str, torch.Tensor]]:
    """Calls of it at falling times."""
    return [{**call, "timestep": torch.tensor([900.0 - 50 * n])} for n, call in enumerate(tiny_calls(steps))]


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def edit(
    rank: int, plan: Any, steps: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None, inner: str = "eager"
) -> tuple[list[torch.Tensor], dict[str, int], int]:
    """An edit of one branch: its outputs, its steps, and the bytes of its cache."""
    model = compiled(Timed(), inner)
    with hetcache.parallel(mesh_of(shape, names)), hetcache.session(plan, strict=True) as session:
        outputs = run(model, timed_calls(steps))
    return outputs, session.stats.steps, session.stats.cache_bytes


def configured(rank: int, plan: Any, steps: str, config: Any, with_mesh: bool) -> list[torch.Tensor]:
    """The outputs of an edit that is shared as diffusers' configuration says."""
    if with_mesh:
        names = ("ring", "ulysses", "others")
        config = replace(config, mesh=mesh_of((config.ring_degree, config.ulysses_degree, 1), names))
    model = compiled(Timed())
    with hetcache.parallel(config), hetcache.session(plan, strict=True) as session:
        assert session.ranks == Ranks(rank, dist.get_world_size(), session.ranks.group)
        return run(model, timed_calls(steps))


def enabled(rank: int, config: Any) -> tuple[float, str]:
    """An edit by a model that shares its tokens by diffusers' own means: its largest error, and what is said of it."""
    model, grid, steps = wan(), (3, 4, 7), "FPRF"  # two processes can share 84 tokens in diffusers' way
    calls = [call(model, grid=grid, text_tokens=12, seed=seed) for seed in range(len(steps))]
    truth = run(model, calls)
    plan = hetcache.Plan.from_token_mask(np.arange(84) < 20, grid, num_inference_steps=len(steps), schedule=steps)
    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, and CPUs are none
        model.enable_parallelism(config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hetcache.parallel(config), hetcache.session(plan):
            outputs = run(compiled(model), calls)
    error = max(float((a - b).abs().max()) for a, b in zip(outputs, truth, strict=True))
    return error, " ".join(str(one.message) for one in caught if issubclass(one.category, HetCacheWarning))


LAYOUTS = (Tokens(2), Tokens(2, (3, 0)), Tokens(2, (0, 2, 1)), Tokens(2, (0, 0, 0)))
"""Tokens alone, behind text, twice with text between and behind, and twice."""


def move_rows(rank: int, rows: int) -> None:
    """What `Share` moves, of a tensor `[batch, heads, rows, features]` that every rank can see whole."""
    size = dist.get_world_size()
    group = Ranks(rank, size, dist.group.WORLD.group_name)
    share, generator = Share(group, rows), torch.Generator().manual_seed(0)
    for tokens in LAYOUTS:
        everything = torch.randn(2, 2 * size, tokens.rows(rows), 3, generator=generator)
        mine = own_rows(everything, tokens, group.start(rows), share.size, rows)
        (gathered,) = share.gather_rows((tokens,), mine)
        assert torch.equal(gathered, everything)
        heads = everything[:, 2 * rank : 2 * (rank + 1)]
        found = share.rows_to_heads((tokens, None, tokens), mine, everything, mine + 1)
        for one, expected_heads in zip(found, (heads, heads, heads + 1), strict=True):
            assert torch.equal(one, expected_heads)
        assert torch.equal(share.heads_to_rows(tokens, heads), mine)
        assert torch.equal(share.heads_to_rows(None, heads), everything)
        total = share.add_up((mine * share.weights(tokens, mine)).sum(2))
        torch.testing.assert_close(total, everything.sum(2))


def own_rows(everything: torch.Tensor, tokens: Tokens, start: int, count: int, rows: int) -> torch.Tensor:
    """One rank's rows of dim 2."""
    parts, place = [everything[:, :, : tokens.whole[0]]], tokens.whole[0]
    for length in tokens.whole[1:]:
        parts.append(everything[:, :, place + start : place + start + count])
        parts.append(everything[:, :, place + rows : place + rows + length])
        place += rows + length
    return torch.cat(parts, 2)


class Counts:
    """An inner compiler that runs graphs as they are and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def guided_calls(steps: str) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For each step the call with the prompt and that without one."""
    pairs = zip(tiny_calls(steps), tiny_calls(steps, first=100), strict=True)
    return [(call, {**call, "text": other["text"]}) for call, other in pairs]


def guided_edit(
    rank: int, plan: Any, steps: str, shape: tuple[int, ...], names: tuple[str, ...], named: bool
) -> tuple[list[torch.Tensor], int, int, int]:
    """An edit with guidance: its outputs, how many calls this rank computed, and bytes: of its cache, and sent."""
    counts, sent = Counts(), [0]
    send = Parallel.send

    def counting(parallel: Parallel, branch: int, outputs: Any) -> Any:
        sent[0] += sum(one.nbytes for one in outputs)
        return send(parallel, branch, outputs)

    model, outputs = compiled(TinyDiT(), counts), []
    with (
        mock.patch.object(Parallel, "send", counting),
        hetcache.parallel(mesh_of(shape, names)),
        hetcache.session(plan, strict=True) as session,
    ):
        for call, other in guided_calls(steps):
            if named:
                with session.branch("cond"):
                    cond = model(**call)
                with session.branch("uncond"):
                    uncond = model(**other)
            else:
                cond, uncond = model(**call), model(**other)
            outputs.append(uncond + 3 * (cond - uncond))
    return outputs, counts.runs, session.stats.cache_bytes, sent[0]


class Doubled(TinyDiT):
    """The same weights, and another model."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(latents * 2, text)


def differ(rank: int, what: str, plans: list[Any], names: tuple[str, ...] = ("rows",)) -> str:
    """An edit in which the last rank has something otherwise: the error."""
    odd = rank == dist.get_world_size() - 1

    def fails(graph: Any, _: Any) -> Any:
        raise RuntimeError("no such kernel")

    plain = Doubled() if odd and what == "model" else TinyDiT(seed=int(odd and what == "weights"))
    model = compiled(plain, fails if odd and what == "a compiler that fails" else "eager")
    calls = tiny_calls("FPP", first=50 * (odd and what == "latents"))
    if odd and what == "later latents":
        calls[2]["latents"] = calls[2]["latents"] + 1
    shape = (dist.get_world_size(),)
    try:
        with hetcache.parallel(mesh_of(shape, names)), hetcache.session(plans[odd and what == "plan"]):
            for number, call in enumerate(calls):
                if odd and what == "weights of one step" and number == 2:
                    with torch.no_grad():
                        plain.qkv.weight.mul_(1.5)
                model(**call)
    except hetcache.ParallelError as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "no error"


SHORT = 5
"""Seconds that the ranks of `lose` wait for each other."""


def lose(rank: int, plan: Any, how: str, shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[str, float]:
    """An edit during which the last rank is gone, or does not answer: the error of the others, and after how long."""
    model = compiled(TinyDiT())
    calls = tiny_calls("FPPP")
    run(model, calls[:1])  # compiles, which ranks do not do in the same time
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=SHORT))  # as `init_process_group` would
    mesh = mesh_of(shape, names)
    start = time.perf_counter()
    try:
        with hetcache.parallel(mesh), hetcache.session(plan, strict=True) as session:
            for number, call in enumerate(calls):
                start = time.perf_counter()
                if number == 2 and rank == dist.get_world_size() - 1:
                    if how == "dies":
                        os._exit(1)
                    time.sleep(6 * SHORT)
                outputs = []
                for name in ("cond", "uncond"):
                    with session.branch(name):
                        outputs.append(model(**call)[:, :1])
                sum(outputs).sum().item()
    except hetcache.ParallelError as error:
        return str(error), time.perf_counter() - start
    return "no error", time.perf_counter() - start


def guided_truth(plan: Any, steps: str) -> tuple[list[torch.Tensor], int]:
    """What one process gives for `guided_edit`, and the bytes of one branch's cache."""
    calls = guided_calls(steps)
    forms = hetcache.rewrite(TinyDiT().eval(), plan, (), calls[0][0])
    cond, uncond = (expected(forms, steps, [pair[n] for pair in calls]) for n in range(2))
    return [b + 3 * (a - b) for a, b in zip(cond, uncond, strict=True)], forms.buffer_bytes


def plan_with(
    steps: str, *, cached: int | None = None, merging: str | None = None, selection: str | None = None, **options: Any
) -> Any:
    """A plan with 35 active tokens and an option."""
    plan = plan_of(steps, 35, cached)
    if merging is not None:
        options |= {"merging": merging, "context_cluster": np.arange(plan.num_context) // 2}
    if selection is not None:
        options |= {"selection": selection}
    return replace(plan, **options)


def refused(rank: int, plan: Any) -> str:
    """What is said of an edit that runs plainly."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hetcache.parallel(mesh_of((2,), None)), hetcache.session(plan):
            run(compiled(TinyDiT()), tiny_calls("FP"))
    return " ".join(str(one.message) for one in caught)


def refused_order(rank: int) -> str:
    """What is said of a session that was opened before it was said who shares it."""
    model = compiled(TinyDiT())
    try:
        with hetcache.session(plan_of("FP")), hetcache.parallel(mesh_of((2,), None)):
            run(model, tiny_calls("FP"))
    except hetcache.ParallelError as error:
        return str(error)
    return "no error"


def quantised(rank: int, plan: Any, steps: str, shared: bool) -> list[torch.Tensor]:
    """The outputs of a model with a weight that is a tensor subclass."""
    from test_adapters import Int8

    plain = TinyDiT().eval()
    plain.qkv.weight = torch.nn.Parameter(Int8.of(plain.qkv.weight.detach()), requires_grad=False)
    model = compiled(plain)
    mesh = hetcache.parallel(mesh_of((2,), None)) if shared else contextlib.nullcontext()
    with mesh, hetcache.session(plan, strict=True):
        return run(model, tiny_calls(steps))


def refused_record(rank: int) -> str:
    """What is said of a session that is to be recorded."""
    try:
        with hetcache.parallel(mesh_of((2,), None)), hetcache.session(plan_of("FP"), record=True):
            return "no error"
    except hetcache.SessionError as error:
        return str(error)


def refused_mesh(rank: int, mesh: Any) -> str:
    """What is said of a mesh, given by the names of its one dim, or of a configuration."""
    try:
        with hetcache.parallel(mesh_of((2,), mesh) if isinstance(mesh, tuple) else mesh):
            return "no error"
    except ValueError as error:
        return str(error)
