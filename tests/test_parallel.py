"""Several processes at one edit give what one process gives, or end with one error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from backend_checks import check, expected, plan_of
from conftest import Captured
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from models import Case
from ranks import Ranks

import hetcache_compile as hetcache
from hetcache_compile.capture.rewrite import write_forms
from hetcache_compile.passes.forms.collectives import Ranks as Group
from hetcache_compile.passes.forms.collectives import sent_bytes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "rank_jobs")
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def truth_of(plan: hetcache.Plan, steps: str) -> tuple[list[torch.Tensor], hetcache.Forms]:
    calls = rank_jobs.timed_calls(steps)
    forms = hetcache.rewrite(rank_jobs.Timed().eval(), plan, (), calls[0])
    return expected(forms, steps, calls), forms


# Rows


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_cover_all_rows_and_each_row_is_owned_once(rows: int, size: int) -> None:
    covered, owned = set(), []
    for rank in range(size):
        group = Group(rank, size, "")
        share = range(group.start(rows), group.start(rows) + group.share(rows))
        covered |= set(share)
        owned += share[len(share) - group.owned(rows) :]
    assert covered == set(range(rows))
    assert sorted(owned) == list(range(rows))


@pytest.mark.parametrize("rows", [8, 7, 1])
def test_rows_and_heads_move(two: Ranks, rows: int) -> None:
    two(rank_jobs.move_rows, rows)


@pytest.mark.parametrize("num_active", [35, 36, 1])
def test_ranks_share_the_rows_of_a_session(two: Ranks, num_active: int) -> None:
    """105 tokens and 35 active ones divide by no two ranks; one active token leaves a rank without one."""
    steps = "FPRPF"
    plan = plan_of(steps, num_active)
    truth, _ = truth_of(plan, steps)
    for outputs, kinds, _ in two(rank_jobs.edit, plan, steps, (2,)):
        check(outputs, truth)
        assert kinds == {"FULL": 2, "PARTIAL": 2, "REUSE": 1}


def test_outputs_are_the_same_on_every_rank(two: Ranks) -> None:
    (first, _, _), (second, _, _) = two(rank_jobs.edit, plan_of("FPF"), "FPF", (2,))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("config", "with_mesh"),
    [
        (ContextParallelConfig(ulysses_degree=2), False),
        (ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2)), False),
        (ContextParallelConfig(ring_degree=2), True),
    ],
    ids=["ulysses", "ring", "mesh"],
)
def test_a_configuration_of_diffusers_says_who_shares_rows(two: Ranks, config: Any, with_mesh: bool) -> None:
    plan = plan_of("FPRF", 35)
    truth, _ = truth_of(plan, "FPRF")
    for outputs in two(rank_jobs.configured, plan, "FPRF", config, with_mesh):
        check(outputs, truth)


OPTIONS: dict[str, dict[str, Any]] = {
    "predicted outputs": {"extrapolation": 1},
    "predicted context": {"context_extrapolation": 1},
    "context moves": {"context_motion": 1},
    "predicted context moves": {"context_motion": 1, "context_extrapolation": 1},
    "int8": {"cache_dtype": "int8"},
    "half of the context": {"cached": 30},
    "merged in boxes": {"merging": "boxes"},
    "merged by K-means": {"merging": "kmeans"},
}


@pytest.mark.wide
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_plan(two: Ranks, option: str) -> None:
    plan = rank_jobs.plan_with("FPFPR", **OPTIONS[option])
    truth, _ = truth_of(plan, "FPFPR")
    for outputs, _, _ in two(rank_jobs.edit, plan, "FPFPR", (2,)):
        check(outputs, truth)


@pytest.mark.wide
def test_inductor_compiles_collectives(two: Ranks) -> None:
    truth, _ = truth_of(plan_of("FP"), "FP")
    for outputs, _, _ in two(rank_jobs.edit, plan_of("FP"), "FP", (2,), None, "inductor"):
        check(outputs, truth)


@pytest.mark.parametrize(
    ("options", "help"),
    [
        ({"selection": "hetcache"}, "selection='uniform'"),
        ({"cached": 40, "cached_by": "attention"}, "cached_by='distance'"),
    ],
)
def test_what_ranks_cannot_share_runs_plainly_and_says_why(two: Ranks, options: dict[str, Any], help: str) -> None:
    for said in two(rank_jobs.refused, rank_jobs.plan_with("FP", **options)):
        assert "needs the queries of all ranks" in said
        assert help in said


def test_records_are_of_one_process(two: Ranks) -> None:
    for said in two(rank_jobs.refused_record):
        assert "a record is of one process" in said


# Models


BAR = 1e-6  # relative to the largest value of an output


def compared(sizes: str, names: Sequence[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, HERE / "sharded_zoo.py", sizes, *names], capture_output=True, text=True, cwd=HERE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_model(found: dict[str, Any]) -> None:
    errors = {name: found[name] for name in ("full", "frozen", "reuse", "partial")}
    assert max(errors.values()) <= BAR, (found["name"], found["ranks"], errors)
    assert found["counted"] == found["sent"]
    assert found["sent"]["full"] > found["sent"]["partial"] > found["sent"]["reuse"] == 0


@pytest.mark.wide
def test_heads_joint_attention_and_sums() -> None:
    """One with heads of its own on each rank, one whose text is in the same attention, and one with sums over tokens.

    What the last two send is the formula's too: of 35 tokens and 11 active ones, of width 24, with 5 outputs.
    """
    names = ["WanTransformer3DModel", "FluxTransformer2DModel", "SanaTransformer2DModel"]
    found = compared("2", names)
    assert sorted(one["name"] for one in found) == sorted(names)
    for one in found:
        check_model(one)
    by_name = {one["name"]: one for one in found}
    own, all_heads = by_name["WanTransformer3DModel"]["cache"]
    assert own < 0.7 * all_heads  # keys and values of half of the heads, and the whole output
    size, width, outputs, text, sum_numbers = 2, 24, 5, 11, 2 * 13 * 12
    for kind, rows, sums in (("full", 35, 2), ("partial", 11, 1)):
        share = -(-rows // size)
        joint = (4 * share * width + text * width) * (size - 1) // size
        assert by_name["FluxTransformer2DModel"]["sent"][kind] == 4 * (2 * joint + share * outputs * (size - 1))
        block = sums * 2 * sum_numbers * (size - 1) // size + share * width * (
            size - 1
        )  # its convolution needs all rows
        assert by_name["SanaTransformer2DModel"]["sent"][kind] == 4 * (2 * block + share * outputs * (size - 1))


@pytest.mark.parametrize(("size", "by_heads"), [(2, True), (3, False), (4, False), (5, False)])
def test_bytes_sent_are_those_of_the_formula(captured: Callable[[Case], Captured], size: int, by_heads: bool) -> None:
    """Of docs/parallel.md, for a model of 2 heads, 2 blocks and 20 outputs for each token, in float32."""
    model = captured(Case("wan"))
    plan = plan_of("FP", 35)
    forms = write_forms(model.program, model.analysis, plan, Group(0, size, "0"))
    width, outputs, blocks = 24, 20, 2
    for kind, rows in (("full", 105), ("partial", 35)):
        share = -(-rows // size)
        each = 4 * share * width * (size - 1) // size if by_heads else 2 * share * width * (size - 1)
        expected_bytes = 4 * (blocks * each + share * outputs * (size - 1))
        assert sent_bytes(forms.by_kind[kind].module, size) == expected_bytes
    assert sent_bytes(forms.by_kind["reuse"].module, size) == 0


ZOO = (
    "WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel", "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel", "CogVideoXTransformer3DModel",
    "MochiTransformer3DModel", "AllegroTransformer3DModel", "EasyAnimateTransformer3DModel",
    "Kandinsky5Transformer3DModel", "CosmosTransformer3DModel", "FluxTransformer2DModel", "ChromaTransformer2DModel",
    "ChromaTransformer2DModel (masked)", "BriaTransformer2DModel", "QwenImageTransformer2DModel",
    "SD3Transformer2DModel", "ZImageTransformer2DModel", "SanaVideoTransformer3DModel", "PixArtTransformer2DModel",
    "DiTTransformer2DModel", "Lumina2Transformer2DModel", "AuraFlowTransformer2DModel", "CogView4Transformer2DModel",
    "HunyuanDiT2DModel", "PRXTransformer2DModel", "StableAudioDiTModel",
)  # fmt: skip
TESTED = [name for number, name in enumerate(ZOO) if number % 4 != 3]
"""20 classes, and one of them with a mask. `python tests/sharded_zoo.py 2,4 NAME ...` checks any of the others."""


@pytest.mark.wide
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names", [TESTED[start : start + 7] for start in range(0, len(TESTED), 7)], ids=lambda names: names[0]
)
def test_models_of_the_zoo_on_two_and_four_ranks(names: tuple[str, ...]) -> None:
    found = compared("2,4", names)
    assert {(one["name"], one["ranks"]) for one in found} == {(name, size) for name in names for size in (2, 4)}
    for one in found:
        check_model(one)


# Guidance


@pytest.mark.parametrize("named", [True, False])
def test_branches_of_guidance_on_ranks_of_their_own(two: Ranks, named: bool) -> None:
    steps = "FPRF"
    plan = plan_of(steps)
    truth, cache_bytes = rank_jobs.guided_truth(plan, steps)
    for outputs, runs, own_bytes, sent in two(rank_jobs.guided_edit, plan, steps, (2,), ("guidance",), named):
        check(outputs, truth)
        assert runs == len(steps)  # of twice as many calls
        assert sent == sum(output.nbytes for output in outputs)  # one call's output in each step
        assert own_bytes == cache_bytes  # of one branch


@pytest.mark.wide
def test_guidance_and_rows_at_once() -> None:
    steps = "FPRF"
    plan = plan_of(steps)
    truth, _ = rank_jobs.guided_truth(plan, steps)
    ranks = Ranks(4, "rank_jobs")
    try:
        for outputs, runs, *_ in ranks(rank_jobs.guided_edit, plan, steps, (2, 2), ("guidance", "rows"), False):
            check(outputs, truth)
            assert runs == len(steps)
    finally:
        ranks.close()


# What goes wrong


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("plan", "active_index of the plan"),
        ("weights", "weights, or the model itself"),
        ("model", "weights, or the model itself"),
        ("latents", "latents"),
        ("later latents", "latents"),
        ("weights of one step", "the kind of a step"),
        ("a compiler that fails", "whether a model can be cached"),
    ],
)
def test_ranks_that_differ_are_found(two: Ranks, what: str, said: str) -> None:
    plans = [plan_of("FPP"), plan_of("FPP", seed=1)]
    for error in two(rank_jobs.differ, what, plans):
        assert error.startswith("ranks differ from rank 0 in: ")
        assert said in error
        assert "on rank 1" in error
    assert ("no such kernel" in error) == (what == "a compiler that fails"), "the rank that refuses says why"


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2,), ("rows",)),
        pytest.param((2,), ("guidance",), marks=pytest.mark.wide),
        pytest.param((4,), ("rows",), marks=pytest.mark.wide),
        pytest.param((2, 2), ("guidance", "rows"), marks=pytest.mark.wide),
    ],
)
def test_a_rank_that_is_killed_ends_the_others_with_one_error(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    ranks = Ranks(prod(shape), "rank_jobs")
    try:
        ranks.start(rank_jobs.lose, plan_of("FPPP"), "dies", shape, names)
        *others, killed = ranks.results()
    finally:
        ranks.close()
    assert killed is None
    for rank, (error, seconds) in enumerate(others):
        assert error.startswith(f"rank {rank} waited in vain for another rank")
        # The test keeps ranks alive that gave up, so one that waits for them waits until its time-out.
        assert seconds < rank_jobs.SHORT + 1


@pytest.mark.wide
@pytest.mark.parametrize(("shape", "names"), [((2,), ("rows",)), ((2,), ("guidance",)), ((2, 2), ("guidance", "rows"))])
def test_a_rank_that_hangs_ends_the_others_after_the_time_out(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    ranks = Ranks(prod(shape), "rank_jobs")
    try:
        ranks.start(rank_jobs.lose, plan_of("FPPP"), "sleeps", shape, names)
        error, seconds = ranks.first()
    finally:
        ranks.close()
    assert error.startswith("rank 0 waited in vain for another rank")
    assert rank_jobs.SHORT - 1 < seconds < 2 * rank_jobs.SHORT


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (("tensor",), "'rows', 'guidance' or both"),
        (ContextParallelConfig(ulysses_degree=3), "is not the number of processes, 2"),
        (ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2)), "weights are not shared"),
        (None, "takes a DeviceMesh or a ContextParallelConfig, not None"),
    ],
    ids=["dims", "degrees", "weights", "nothing"],
)
def test_a_mesh_that_cannot_be_shared_is_refused(two: Ranks, mesh: Any, words: str) -> None:
    for said in two(rank_jobs.refused_mesh, mesh):
        assert words in said


def test_a_session_that_nobody_shares_is_said(two: Ranks) -> None:
    for said in two(rank_jobs.refused_order):
        assert said.startswith("the session was opened outside hetcache.parallel")


def test_weights_that_are_tensor_subclasses(two: Ranks) -> None:
    plan = plan_of("FPRF")
    alone = rank_jobs.quantised(0, plan, "FPRF", False)
    for outputs in two(rank_jobs.quantised, plan, "FPRF", True):
        check(outputs, alone)


@pytest.mark.wide
def test_a_model_that_diffusers_made_parallel_runs_plainly_and_says_what_to_do(two: Ranks) -> None:
    for error, said in two(rank_jobs.enabled, ContextParallelConfig(ulysses_degree=2)):
        assert error < 1e-5
        assert said.startswith("hetcache: the model runs plainly, because model.enable_parallelism(config=...)")
        assert "put `with hetcache.parallel(config):` around the session" in said
        assert said.count("hetcache: ") == 2  # the other one: that the plan was not followed
