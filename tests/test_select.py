"""Full steps that choose the active tokens: by brute force, by hand, and through the forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_matrices import attention_matrices
from models import Case, TinyDiT, tiny_call

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError, UnsupportedGraphError
from hetcache_compile.passes.ir.contract import ALWAYS, CANDIDATE, NEVER, STRATEGIES
from hetcache_compile.passes.kernels import kmeans
from hetcache_compile.passes.kernels import token_choice as choose
from hetcache_compile.passes.kernels.token_choice import attention_mass, choose_active, spread
from hetcache_compile.plan.options import SELECTIONS
from hetcache_compile.plan.partition import TokenKind

CASE = Case("vace", config=(("num_layers", 1), ("vace_layers", (0,))))
N = CASE.num_tokens
KINDS = ("full", "partial", "full", "partial", "reuse")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(captured):
    return captured(CASE).model


@pytest.fixture(scope="module")
def forms_of(captured):
    """What `rewrite` makes of the model for a plan."""
    return captured(CASE).forms


@pytest.fixture(scope="module")
def compiled(model):
    torch._dynamo.reset()
    yield torch.compile(model, backend="hetcache", options={"inner": "eager"})
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def calls(model):
    """Other latents and another time in each step."""
    made = [CASE.call(model, seed) for seed in range(len(KINDS))]
    for step, call in enumerate(made):
        call["timestep"] = torch.full_like(call["timestep"], 900 - 100 * step)
    return made


def plan(selection: str, **options) -> hetcache.Plan:
    mask = np.zeros(CASE.grid, dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    settings = {"context_ratio": 0.4, "margin": 1, "multiple": 1, "extrapolation": 1, **options}
    return hetcache.Plan.from_mask(
        mask, CASE.grid, num_inference_steps=len(KINDS), schedule=list(KINDS), selection=selection, **settings
    )


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("block", [1, 2**24])
def test_attention_mass_is_the_mean_of_the_attention_matrix(heads: int, block: int, monkeypatch) -> None:
    monkeypatch.setattr(choose, "BLOCK", block)
    query, key = torch.randn(2, 4, 31, 6), torch.randn(2, heads, 31, 6)
    rows = torch.tensor([3, 4, 4, 30])
    keys = key.repeat_interleave(4 // heads, dim=1)
    matrix = (query @ keys.transpose(-1, -2) / 6**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention_mass(query, key, rows), matrix[:, :, rows].mean(dim=(0, 1, 2)))
    assert float(attention_mass(query, key, rows).sum()) == pytest.approx(1)


def test_kmeans_ends_where_no_row_has_a_nearer_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(5, 8, generator=generator)
    labels = torch.arange(200) % 5
    states = middles[labels] + torch.randn(200, 8, generator=generator)
    counts = torch.arange(200) >= 20
    cluster, distance = kmeans.clusters_of_states(states, counts, 5)
    assert (cluster[~counts] == 5).all()
    found, truth = cluster[counts], labels[counts]
    centres = torch.stack([states[counts][found == number].mean(dim=0) for number in range(5)])
    brute = torch.cdist(states[counts], centres).square()
    assert (brute.argmin(dim=1) == found).all()
    torch.testing.assert_close(distance[counts], brute.min(dim=1).values, atol=1e-3, rtol=1e-3)
    assert all(len(set(found[truth == number].tolist())) == 1 for number in range(5))


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_kmeans_is_lloyds_step_by_step(iterations: int, monkeypatch) -> None:
    """States without clusters, where every step moves rows: one row and one centre at a time, from the same seeds."""
    monkeypatch.setattr(kmeans, "STATE_ITERATIONS", iterations)
    states = np.random.default_rng(0).normal(size=(90, 5))
    counts = np.random.default_rng(1).random(90) < 0.8
    counted = np.flatnonzero(counts)
    centres = states[counted[[int((number + 0.5) / 7 * counted.size) for number in range(7)]]]
    labels: list[list[int]] = []
    for _ in range(iterations + 1):
        labels.append([min(range(7), key=lambda c, row=row: ((row - centres[c]) ** 2).sum()) for row in states])
        members = [[row for row in counted if labels[-1][row] == number] for number in range(7)]
        assert all(members)
        before, centres = centres, np.stack([states[rows].mean(axis=0) for rows in members])
    cluster, distance = kmeans.clusters_of_states(torch.from_numpy(states), torch.from_numpy(counts), 7)
    assert cluster[counts].tolist() == np.array(labels[-1])[counts].tolist()
    assert (cluster[~counts] == 7).all()
    expected = ((states - before[labels[-1]]) ** 2).sum(axis=1)
    np.testing.assert_allclose(distance[counts].numpy(), expected[counts], rtol=1e-9, atol=1e-12)
    assert iterations < 2 or labels[0] != labels[1] != labels[2]


def test_kmeans_with_fewer_rows_than_clusters() -> None:
    cluster, distance = kmeans.clusters_of_states(torch.eye(6), torch.arange(6) < 3, 16)
    assert len(set(cluster[:3].tolist())) == 3
    assert float(distance[:3].max()) < 1e-6


def test_the_best_of_each_cluster_in_proportion_to_its_size() -> None:
    """Brute force: of clusters of 60, 30 and 10 rows, the best 20 rows are the best 12, 6 and 2 of each."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=generator)]
    score = torch.rand(100, generator=generator) + cluster  # globally, cluster 2 would win
    chosen = spread(score, cluster, 3).topk(20).indices
    for number, quota in enumerate((12, 6, 2)):
        members = torch.nonzero(cluster == number).flatten()
        best = members[score[members].argsort(descending=True)[:quota]]
        assert set(best.tolist()) == set(chosen[cluster[chosen] == number].tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chosen_tokens_are_distinct_sorted_and_the_same_each_time(strategy: str) -> None:
    relevance, states = torch.rand(100), torch.randn(100, 8)
    standing = torch.full((100,), CANDIDATE)
    standing[::9], standing[1::9] = ALWAYS, NEVER
    chosen = choose_active(relevance, states, standing, 40, strategy, 16)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.shape == (40,)
    always = set(torch.nonzero(standing == ALWAYS).flatten().tolist())
    assert always <= set(chosen.tolist())
    assert (standing[chosen] != NEVER).all()
    torch.testing.assert_close(choose_active(relevance, states, standing, 40, strategy, 16), chosen)
    if strategy == "attention":
        rest = torch.nonzero(standing == CANDIDATE).flatten()
        best = rest[relevance[rest].argsort(descending=True)[: 40 - len(always)]]
        assert set(chosen.tolist()) == set(best.tolist()) | always


def test_scores_in_half_precision_do_not_overflow() -> None:
    """The products are beyond fp16's largest number; their softmax is not, and generative tokens stay active."""
    query = torch.full((1, 1, 8, 64), 60.0, dtype=torch.float16)
    key = torch.randn(1, 1, 8, 64).half() * 60
    mass = attention_mass(query, key, torch.arange(8))
    torch.testing.assert_close(mass, attention_mass(query.float(), key.float(), torch.arange(8)))
    standing = torch.tensor([ALWAYS] * 2 + [CANDIDATE] * 6)
    broken = torch.full((8,), torch.nan)
    assert {0, 1} <= set(choose_active(broken, torch.randn(8, 4), standing, 4, "attention", 2).tolist())


def test_full_steps_choose_what_the_attention_matrices_say(model, calls, forms_of) -> None:
    """Brute force: of the context, the tokens that generative rows of all attention matrices give most to."""
    chosen_by = plan("attention")
    _, cache = forms_of(chosen_by).full(**calls[0])
    rows = torch.from_numpy(chosen_by.query_index)
    assert set(rows.tolist()) == set(np.flatnonzero(chosen_by.token_kind == TokenKind.GENERATIVE))
    matrices = attention_matrices(model, calls[0], N)
    assert len(matrices) == 2
    relevance = torch.stack([matrix[..., rows, :].mean(dim=(0, 1, 2)) for matrix in matrices]).mean(dim=0)
    always = np.intersect1d(chosen_by.active_index, np.flatnonzero(chosen_by.token_kind != TokenKind.CONTEXT))
    context = torch.from_numpy(np.flatnonzero(chosen_by.token_kind == TokenKind.CONTEXT))
    best = context[relevance[context].argsort(descending=True)[: chosen_by.num_active - always.size]]
    assert 0 < best.numel() < context.numel()
    assert set(cache["past_selection.active_index"].tolist()) == {*always, *best.tolist()}


def test_clusters_are_those_of_hidden_states(model, calls, forms_of) -> None:
    """Of what the keys of the middle attention are projected from, before positions are rotated into them."""
    chosen_by, seen = plan("kmeans"), []
    handle = model.blocks[0].attn1.to_k.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**calls[0])
    handle.remove()
    _, cache = forms_of(chosen_by).full(**calls[0])
    standing = torch.from_numpy(chosen_by.token_standing)
    arguments = standing, chosen_by.num_active, "kmeans", choose.NUM_CLUSTERS
    assert cache["past_selection.active_index"].equal(choose_active(torch.zeros(N), seen[0][0], *arguments))
    keys = model.blocks[0].attn1.to_k(seen[0])[0]
    assert not cache["past_selection.active_index"].equal(choose_active(torch.zeros(N), keys, *arguments))


@pytest.mark.parametrize(
    ("strategy", "context_extrapolation"), [(STRATEGIES[0], 0), *((name, 1) for name in STRATEGIES[1:])]
)
def test_the_forms_follow_what_full_steps_choose(
    calls, forms_of, compiled, strategy: str, context_extrapolation: int
) -> None:
    """A partial step is that of a fixed plan with the same tokens, and the backend does what the forms do."""
    chosen_by = plan(strategy, context_extrapolation=context_extrapolation)
    forms = forms_of(chosen_by)
    cache, outputs, chosen = {}, [], []
    for kind, call in zip(KINDS, calls, strict=True):
        output, cache = forms.run(kind, cache, (), call)
        outputs.append(output[0])
        chosen.append(cache["past_selection.active_index"].clone())
    assert not torch.equal(chosen[0], chosen[2])
    active = chosen[0].numpy()
    fixed = replace(
        chosen_by, selection="uniform", active_index=active, context_index=np.setdiff1d(np.arange(N), active)
    )
    fixed_forms = forms_of(fixed)
    _, fixed_cache = fixed_forms.full(**calls[0])
    expected, _ = fixed_forms.partial(fixed_cache, **calls[1])
    torch.testing.assert_close(outputs[1], expected[0], atol=1e-5, rtol=0)
    with hetcache.session(chosen_by):
        torch.testing.assert_close([compiled(**call)[0] for call in calls], outputs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_inputs(model, calls, forms_of, strategy: str) -> None:
    forms = forms_of(plan(strategy))
    expected, cache = forms.full(**calls[0])
    torch.testing.assert_close(expected[0], model(**calls[0])[0], atol=1e-5, rtol=0)
    for kind in ("partial", "reuse"):
        output, cache = forms.run(kind, cache, (), calls[0])
        torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=0)


def test_another_mask_with_the_same_budgets_compiles_nothing(model, calls) -> None:
    compiled_forms = []

    def inner(graph, inputs):
        compiled_forms.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": inner})
    first = plan("hetcache", multiple=N // 2)
    mask = np.zeros(CASE.grid, dtype=bool)
    mask[2, 3, 2:5] = True
    second = hetcache.Plan.from_mask(
        mask, CASE.grid, num_inference_steps=2, schedule="FP", selection="hetcache", multiple=N // 2, extrapolation=1,
    )  # fmt: skip
    assert second.num_active == first.num_active
    with hetcache.session(first):
        [compiled(**call) for call in calls[:2]]
    before = len(compiled_forms)
    with hetcache.session(second):
        [compiled(**call) for call in calls[:2]]
    assert len(compiled_forms) == before


def test_all_generative_and_one_generative_token(calls, forms_of) -> None:
    for mask in (np.ones(CASE.grid, dtype=bool), np.eye(1, N, 17, dtype=bool).reshape(CASE.grid)):
        chosen_by = hetcache.Plan.from_mask(
            mask, CASE.grid, num_inference_steps=2, schedule="FP", selection="hetcache", margin=0, multiple=1
        )
        forms = forms_of(chosen_by)
        expected, cache = forms.full(**calls[0])
        output, _ = forms.partial(cache, **calls[0])
        torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=0)


def test_linear_attention_is_refused() -> None:
    class Linear(torch.nn.Module):
        """Linear attention: a sum over tokens is cached, and no score says which of them matter."""

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            x = latents.flatten(2).transpose(1, 2)
            return (x @ (x.relu().transpose(1, 2) @ x)).transpose(1, 2).unflatten(2, CASE.grid)

    with pytest.raises(UnsupportedGraphError, match=r"(?s)a sum over fixed context.*selection='uniform'"):
        hetcache.rewrite(Linear(), plan("attention", extrapolation=0), (torch.randn(1, 3, *CASE.grid),))


def test_controls() -> None:
    plans = {name: plan(name) for name in SELECTIONS}
    assert (plans["none"].token_kind[plans["none"].active_index] != TokenKind.CONTEXT).all()
    assert plans["random"].num_active == plans["uniform"].num_active == plans["hetcache"].num_active
    assert not np.array_equal(plans["random"].active_index, plans["uniform"].active_index)
    np.testing.assert_array_equal(plan("random").active_index, plans["random"].active_index)
    assert [p.selects_at_run_time for p in plans.values()] == [False] * 3 + [True] * 3


def test_wrong_selections() -> None:
    with pytest.raises(PlanError, match="selection must be one of none, uniform"):
        plan("best")
    with pytest.raises(PlanError, match="cached_ratio 1"):
        plan("attention", cached_ratio=0.5)
    with pytest.raises(PlanError, match="cannot be merged"):
        plan("attention", merged_ratio=0.5)


def test_a_plan_keeps_its_options_in_its_file(tmp_path) -> None:
    for made in (plan("hetcache", context_extrapolation=1), plan("random", merged_ratio=0.5)):
        made.save(tmp_path / "a.hetplan")
        loaded = hetcache.Plan.load(tmp_path / "a.hetplan")
        assert (loaded.selection, loaded.context_extrapolation) == (made.selection, made.context_extrapolation)
        np.testing.assert_array_equal(loaded.context_cluster, made.context_cluster)


class Timed(TinyDiT):
    """`TinyDiT` of a time, and without text: a C++ compiler takes seconds for each kernel."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(latents * (1 - timestep.view(-1, 1, 1, 1, 1) / 2000))


@pytest.mark.wide
def test_inductor_does_what_eager_does() -> None:
    """Buffers are written in place there, in an order of the compiler's own."""
    model, chosen_by = Timed(), plan("hetcache", context_extrapolation=1)
    calls = [
        {"latents": tiny_call(step)["latents"], "timestep": torch.tensor([900.0 - 100 * step])}
        for step in range(len(KINDS))
    ]
    results = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="hetcache", options={"inner": inner})
        with hetcache.session(chosen_by) as session:
            results.append([compiled(**call) for call in calls])
        assert session.stats.steps == {"FULL": 2, "PARTIAL": 2, "REUSE": 1}
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
