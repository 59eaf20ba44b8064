"""Merged context: centroids stand for their members exactly where these are equal, and are near them else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GRID, Case, TinyDiT, tiny_call

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError, UnsupportedGraphError
from hetcache_compile.passes.forms.merge import MergeContext
from hetcache_compile.passes.kernels import kmeans as clustering
from hetcache_compile.passes.kernels.kmeans import EMPTY, KEY_ITERATIONS, centroids, nearest_centres
from hetcache_compile.plan.partition import merge_context

CASE = Case("vace", config=(("num_layers", 1), ("vace_layers", (0,))))
N = CASE.num_tokens


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return CASE.build()


def plan(cluster: np.ndarray, active: int = 20) -> hetcache.Plan:
    order = np.random.default_rng(0).permutation(N)
    mask = np.zeros(N, dtype=bool)
    mask[order[:active]] = True
    whole = hetcache.Plan.from_token_mask(mask, CASE.grid, num_inference_steps=2, schedule="F")
    return replace(whole, context_cluster=cluster)


class Attention(torch.nn.Module):
    """One attention over a grid of 2 x 2 x 5 tokens whose keys and values do not depend on where a token is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv3d(3, 12, 1)
        self.qkv = torch.nn.Linear(12, 36)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x.transpose(1, 2).unflatten(2, (2, 2, 5))


def latents_of(cluster: np.ndarray, active: np.ndarray, *, equal: bool) -> torch.Tensor:
    """Random latents; members of a cluster get those of its first member, if `equal`."""
    values = torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(1))
    context = np.flatnonzero(~active)
    if equal:
        for number in np.unique(cluster):
            members = context[cluster == number]
            values[:, :, members] = values[:, :, members[:1]]
    return values.view(1, 3, 2, 2, 5)


def merged_error(*, equal: bool, sizes: bool = True, merging: str = "boxes") -> float:
    active = np.arange(20) % 3 == 0
    cluster = np.array([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 2, 2], dtype=np.int64)
    latents = latents_of(cluster, active, equal=equal)
    whole = hetcache.Plan.from_token_mask(active, (2, 2, 5), num_inference_steps=2, schedule="F")
    model = Attention()
    forms = hetcache.rewrite(model, replace(whole, context_cluster=cluster, merging=merging), (latents,))
    expected, cache = forms.full(latents)
    assert cache["past_key_values.0.key"].shape == (1, 2, 4, 6)
    if not sizes:
        forms = forms.for_plan(replace(forms.plan, context_cluster=np.arange(4).repeat([4, 3, 3, 3])))
    actual, _ = forms.partial(cache, latents)
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("merging", ["boxes", "kmeans"])
def test_exact_where_the_members_of_a_cluster_are_equal(merging: str) -> None:
    assert merged_error(equal=True, merging=merging) < 1e-6


@pytest.mark.parametrize("merging", ["boxes", "kmeans"])
def test_exact_where_every_cluster_has_one_member(merging: str) -> None:
    """By the pass itself: `rewrite` merges nothing where C' = C. Numbered in another order than the tokens."""
    active, latents = np.arange(20) % 3 == 0, torch.randn(1, 3, 2, 2, 5, generator=torch.Generator().manual_seed(1))
    whole = hetcache.Plan.from_token_mask(active, (2, 2, 5), num_inference_steps=2, schedule="F")
    forms = hetcache.rewrite(Attention(), whole, (latents,))
    by_kind = {kind: MergeContext(13, 13, merging)(form) for kind, form in forms.by_kind.items()}
    order = np.random.default_rng(1).permutation(13)
    merged = replace(forms, by_kind=by_kind, plan=replace(whole, context_cluster=order, merging=merging))
    expected, cache = merged.full(latents)
    _, unmerged = forms.full(latents)
    keys = cache["past_key_values.0.key"]
    torch.testing.assert_close(keys[:, :, order], unmerged["past_key_values.0.key"])
    assert not torch.equal(keys, unmerged["past_key_values.0.key"])
    actual, _ = merged.partial(cache, latents)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_the_bias_counts() -> None:
    """The same centroids with other sizes give another result: the test above does not pass by chance."""
    assert merged_error(equal=True, sizes=False) > 1e-3


def test_not_exact_where_they_differ_but_nearer_where_keys_are_alike() -> None:
    assert merged_error(equal=False) > merged_error(equal=False, merging="kmeans") > 1e-3


@pytest.mark.wide
def test_the_backend_runs_merged_context_as_the_functional_forms_do(model) -> None:
    cluster = np.random.default_rng(0).integers(0, 30, N - 20)
    cluster[:30] = np.arange(30)
    merged = replace(plan(cluster), steps=tuple(map(hetcache.StepKind, (0, 1, 2))))
    calls = [CASE.call(model, seed) for seed in range(3)]
    forms = hetcache.rewrite(model, merged, (), calls[0])
    cache, expected = {}, []
    for kind, call in zip(("full", "partial", "reuse"), calls, strict=True):
        output, cache = forms.run(kind, cache, (), call)
        expected.append(output[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="hetcache", options={"inner": "eager"})
    with hetcache.session(merged) as session:
        actual = [compiled(**call)[0] for call in calls]
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 1}
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    whole = hetcache.rewrite(model, plan(np.zeros(0, dtype=np.int64)), (), calls[0])
    assert forms.buffer_bytes < 0.5 * whole.buffer_bytes


def keys(count: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[B, 3, C, 5]` in groups that overlap, with a common offset as real keys have."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(batch, 3, 11, 5, generator=generator)
    group = torch.randint(11, (batch, count), generator=generator)
    rows = centre.gather(2, group[:, None, :, None].expand(-1, 3, -1, 5))
    return (rows + 0.5 * torch.randn(batch, 3, count, 5, generator=generator) + 7).to(dtype)


def lloyd(rows: np.ndarray, cluster: np.ndarray, count: int) -> np.ndarray:
    """Clusters of `rows` [C, E], number by number."""
    centres = np.stack([rows[cluster == number].mean(0) for number in range(count)])
    for _ in range(KEY_ITERATIONS):
        cluster = ((rows[:, None] - centres) ** 2).sum(-1).argmin(1)
        for number in set(cluster):
            centres[number] = rows[cluster == number].mean(0)
    return cluster


@pytest.mark.parametrize("block", [clustering.BLOCK, 7 * 2 * 13])
def test_clusters_are_those_of_lloyd_for_each_sample(monkeypatch, block: int) -> None:
    """In one block of distances, and in blocks that do not divide the rows. Values and sizes follow."""
    monkeypatch.setattr(clustering, "BLOCK", block)
    key, seed = keys(61), torch.arange(61) % 13
    value = torch.randn(2, 3, 61, 4, generator=torch.Generator().manual_seed(1))
    mean_key, mean_value, log_size = centroids(key, value, seed, 13)
    for sample in range(2):
        rows = key[sample].transpose(0, 1).flatten(1).double().numpy()
        cluster = lloyd(rows, seed.numpy(), 13)
        assert (cluster != seed.numpy()).mean() > 0.5
        numbers, sizes = np.unique(cluster, return_counts=True)
        assert numbers.size > 9
        expected = torch.full((13,), EMPTY)
        expected[numbers] = torch.tensor(np.log(sizes)).float()
        torch.testing.assert_close(log_size[sample], expected)
        for number in numbers:
            members = np.flatnonzero(cluster == number)
            torch.testing.assert_close(mean_key[sample, :, number], key[sample][:, members].mean(1))
            torch.testing.assert_close(mean_value[sample, :, number], value[sample][:, members].mean(1))


def test_a_cluster_that_loses_its_members_gets_no_attention() -> None:
    """Both members of the middle seed lie at others: it stays between them, and goes on without a NaN."""
    key = torch.tensor([0.0, 0.1, 0.2, 10, 10.1, 10.2])[:, None].half()
    value = torch.arange(6.0)[:, None].half()
    found, values, log_size = centroids(key, value, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    torch.testing.assert_close(log_size.exp(), torch.tensor([[3.0, 0, 3]]))
    assert log_size[0, 1] == EMPTY
    torch.testing.assert_close(values.flatten(), torch.tensor([1.0, 0, 4]).half())
    assert found.isfinite().all()
    bias = (log_size[0] / 128**-0.5).half()
    assert bias.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_as_good_clusters(dtype: torch.dtype) -> None:
    """Keys of large heads, whose products float16 cannot hold: the spread within clusters is nearly as small."""
    key = keys(61).flatten(0, 1).transpose(0, 1).flatten(1).repeat(1, 400)[None] * 10
    seed = torch.arange(61) % 13

    def spread(cluster: torch.Tensor) -> float:
        return sum(float(key[0][cluster == number].var(0, correction=0).sum()) for number in cluster.unique())

    exact, rounded = (spread(nearest_centres(rows, seed, 13)[0]) for rows in (key, key.to(dtype)))
    assert rounded < 1.05 * exact < 0.8 * spread(seed)


def test_each_sample_of_a_batch_has_its_own_clusters() -> None:
    """A sample gets the same result alone as beside another."""
    case = Case("wan", batch=2)
    model = case.build()
    call = case.call(model, 0)
    alone = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    merged = replace(plan(np.arange(N - 20) // 3), merging="kmeans")
    results = []
    for kwargs in (call, alone):
        forms = hetcache.rewrite(model, merged, (), kwargs)
        _, cache = forms.full(**kwargs)
        results.append(forms.partial(cache, **kwargs)[0][0])
    torch.testing.assert_close(results[0][:1], results[1], atol=1e-5, rtol=0)


def test_keys_are_clustered_and_not_values_that_lie_alike_in_memory(model: torch.nn.Module) -> None:
    """Tracing tells tensors apart by identity, and nodes that are alike may have one fake value."""
    cluster = np.arange(N - 20) // 3
    kwargs = CASE.call(model, 0)
    _, rows = hetcache.rewrite(model, plan(np.arange(N - 20)), (), kwargs).full(**kwargs)
    _, merged = hetcache.rewrite(model, replace(plan(cluster), merging="kmeans"), (), kwargs).full(**kwargs)
    key, value = (rows[f"past_key_values.0.{role}"] for role in ("key", "value"))
    expected = centroids(key, value, torch.from_numpy(cluster), int(cluster.max()) + 1)
    for role, tensor in zip(("key", "value", "log_size"), expected, strict=True):
        torch.testing.assert_close(merged[f"past_key_values.0.{role}"], tensor)


class Masked(Attention):
    def forward(self, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return x.transpose(1, 2).unflatten(2, (2, 2, 5))


def test_an_attention_with_a_mask_is_refused_before_the_first_step_and_runs_without_merging() -> None:
    whole = hetcache.Plan.from_token_mask(np.arange(20) % 3 == 0, (2, 2, 5), num_inference_steps=2, schedule=list("FP"))
    merged = replace(whole, context_cluster=np.arange(13) // 2)
    arguments = torch.randn(1, 3, 2, 2, 5), torch.randn(1, 1, 20, 20)
    with pytest.raises(UnsupportedGraphError, match=r"(?s)with a mask.*merged_ratio=1"):
        hetcache.rewrite(Masked(), merged, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(Masked(), backend="hetcache", options={"inner": "eager"})
    with pytest.warns(UserWarning, match="merged_ratio=1"), hetcache.session(merged) as session:
        compiled(*arguments)
    assert sum(session.stats.steps.values()) == 0
    with hetcache.session(whole) as session:
        [compiled(*arguments) for _ in range(2)]
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 0}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.wide)])
def test_the_backend_clusters_as_the_functional_forms_do_and_anew_for_each_edit(inner: str) -> None:
    """The second edit has another mask with the same budgets: nothing is compiled for it."""
    torch._dynamo.reset()
    model = Attention()
    compiled = torch.compile(model, backend="hetcache", options={"inner": inner})
    compile_seconds = []
    for seed in range(2):
        active = np.random.default_rng(seed).permutation(20) < 7
        whole = hetcache.Plan.from_token_mask(active, (2, 2, 5), num_inference_steps=2, schedule=list("FP"))
        merged = replace(whole, context_cluster=np.arange(13) // 3, merging="kmeans")
        calls = [torch.randn(1, 3, 2, 2, 5, generator=torch.Generator().manual_seed(seed + n)) for n in range(2)]
        forms = hetcache.rewrite(model, merged, calls[:1])
        first, cache = forms.full(calls[0])
        second, _ = forms.partial(cache, calls[1])
        with hetcache.session(merged) as session:
            actual = [compiled(latents) for latents in calls]
        torch.testing.assert_close(actual, [first, second], atol=1e-5, rtol=0)
        compile_seconds.append(session.stats.compile_seconds)
    assert compile_seconds[1] < 0.2 * compile_seconds[0]


@pytest.mark.wide
def test_inductor_does_what_eager_does() -> None:
    """Boxes; of a small model, because a C++ compiler takes seconds for each kernel."""
    whole = hetcache.Plan.from_token_mask(
        np.arange(20) % 3 == 0, (2, 2, 5), num_inference_steps=3, schedule=list("FPR")
    )
    merged = replace(whole, context_cluster=np.arange(13) // 2)
    calls = torch.randn(3, 1, 3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    model, results = Attention(), []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="hetcache", options={"inner": inner})
        with hetcache.session(merged) as session:
            results.append([compiled(latents) for latents in calls])
        assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 1}
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_clusters_partition_the_context(ratio: float) -> None:
    grid = (4, 8, 9)
    distance = np.random.default_rng(0).random(288)
    context = np.sort(np.random.default_rng(1).permutation(288)[:200])
    cluster = merge_context(context, distance, grid, merged_ratio=ratio)
    sizes = np.bincount(cluster)
    assert sizes.size == round(ratio * 200)
    assert sizes.min() >= 1
    single = (sizes.size - 1) // 2
    assert (sizes[:single] == 1).all()
    assert np.ptp(sizes[single:]) <= 1 + sizes[single:].max() // 4
    nearest = context[np.argsort(distance[context], kind="stable")[:single]]
    assert set(context[cluster < single]) == set(nearest)


def test_clusters_are_near_one_another() -> None:
    """Boxes of neighbours: their members are nearer than random ones."""
    grid = (4, 8, 9)
    context = np.arange(288)
    cluster = merge_context(context, np.arange(288.0), grid, merged_ratio=0.1)
    places = np.stack(np.unravel_index(context, grid), axis=1)

    def spread(labels: np.ndarray) -> float:
        return float(np.mean([places[labels == label].var(axis=0).sum() for label in np.unique(labels)]))

    assert spread(cluster) < 0.4 * spread(np.random.default_rng(0).permutation(cluster))


def test_nothing_is_merged_at_ratio_one() -> None:
    assert merge_context(np.arange(9), np.arange(9.0), (1, 3, 3), merged_ratio=1.0).size == 0


def test_plans_that_merge_otherwise_have_forms_of_their_own(tmp_path) -> None:
    mask = np.zeros(CASE.grid, dtype=bool)
    mask[0, 0, 0] = True
    boxes, made = (
        hetcache.Plan.from_mask(mask, CASE.grid, merged_ratio=0.5, merging=merging) for merging in ("boxes", "kmeans")
    )
    assert "centroids (kmeans)" in made.describe()
    made.save(tmp_path / "plan")
    assert hetcache.Plan.load(tmp_path / "plan").merging == "kmeans"
    assert boxes.form_options.differences(made.form_options) == "merging (boxes, kmeans)"
    alike = (hetcache.Plan.from_mask(mask, CASE.grid, merging=merging) for merging in ("boxes", "kmeans"))
    assert next(alike).form_options == next(alike).form_options
    with pytest.raises(PlanError, match="boxes, kmeans"):
        replace(made, merging="spheres")
    with pytest.raises(PlanError, match="context_extrapolation"):
        replace(made, context_extrapolation=1)


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(PlanError, match="merged_ratio"):
        merge_context(np.arange(9), np.arange(9.0), (1, 3, 3), merged_ratio=ratio)


@pytest.mark.parametrize(
    "cluster", [np.arange(N - 21), np.full(N - 20, 1), np.zeros(N - 20), np.arange(N - 20) * 2], ids=str
)
def test_wrong_clusters(cluster: np.ndarray) -> None:
    with pytest.raises(PlanError, match="cluster"):
        plan(cluster)


class Narrow(TinyDiT):
    """Values are not as wide as keys, and what follows does not say so."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value[..., :3])
        x = self.out(x + attended.mean(-1, keepdim=True))
        (b, _, *size), (pt, ph, pw) = latents.shape, self.patch
        x = x.reshape(b, size[0] // pt, size[1] // ph, size[2] // pw, pt, ph, pw, 5)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, 5, *size)


def test_values_that_are_narrower_than_keys() -> None:
    """One centroid less than there are tokens: nearly exact."""
    mask = np.zeros(GRID, dtype=bool)
    mask[:, :2, :2] = True
    made = hetcache.Plan.from_mask(
        mask, GRID, num_inference_steps=2, schedule="FP", multiple=1, cached_ratio=0.99, merged_ratio=0.97
    )
    assert made.num_merged < made.num_context
    model, inputs = Narrow(), {"latents": tiny_call(0)["latents"]}
    with torch.no_grad():
        forms = hetcache.rewrite(model, made, (), inputs)
        full, cache = forms.full(**inputs)
        assert float((forms.partial(cache, **inputs)[0] - full).abs().max()) < 0.2
