"""Cached keys and values that move with computed tokens: exact where neighbours move alike, wherever tokens lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from following import active_error
from safetensors.torch import load_file
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError
from hetcache_compile.plan.partition import TokenKind

GRID = (2, 3, 5)
N = 30
TIMES = {"FP": [900, 700], "FFP": [900, 800, 500], "FPFP": [900, 700, 500, 200]}


class Moving(nn.Module):
    """Keys and values of tokens move in time: all alike, or those of each frame; those of text rows as they like.

    Args:
        degree: of the movement, as a polynomial in time.
        by_frame: whether each frame has a movement of its own.
        layout: what attention reads, such as `text, tokens`.
        grid: of the tokens.
    """

    def __init__(
        self, degree: int = 2, by_frame: bool = False, layout: str = "tokens", grid: tuple[int, int, int] = GRID
    ) -> None:
        super().__init__()
        self.grid = grid
        torch.manual_seed(0)
        self.embed, self.query, self.pair = nn.Conv3d(3, 12, 1), nn.Linear(12, 12), nn.Linear(12, 24)
        self.paths = nn.Parameter(torch.randn(degree, GRID[0] if by_frame else 1, 24))
        self.layout = layout.split(", ")

    def forward(self, latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        t = timestep / 1000
        moved = sum(path * t ** (power + 1) for power, path in enumerate(self.paths))
        pairs = self.pair(x) + moved.repeat_interleave(x.shape[1] // len(moved), 0)
        parts = {"tokens": pairs, "again": 2 * pairs, "text": text * t}
        k, v = torch.cat([parts[name] for name in self.layout], 1).unflatten(2, (2, 2, 6)).permute(2, 0, 3, 1, 4)
        q = self.query(x).unflatten(2, (2, 6)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x.transpose(1, 2).unflatten(2, self.grid)


SCATTERED = np.random.default_rng(1).permutation(N) < 9
"""Active tokens, here and there."""


def plan(steps: str = "FP", active: Any = SCATTERED, **options: Any) -> hetcache.Plan:
    made = hetcache.Plan.from_token_mask(active, GRID, num_inference_steps=len(steps), schedule=list(steps))
    return replace(made, **{"context_motion": 1, **options})


def error(model: nn.Module, steps: str, inner: str | None = None, **options: Any) -> float:
    """How far the last step is off, on latents that stay."""
    random = torch.Generator().manual_seed(0)
    given = torch.randn(1, 3, *GRID, generator=random), torch.randn(1, 4, 24, generator=random)
    return active_error(model, plan(steps, **options), [(*given, torch.tensor([t])) for t in TIMES[steps]], inner)


@pytest.mark.parametrize("inner", [None, pytest.param("eager", marks=pytest.mark.wide)])
@pytest.mark.parametrize("layout", ["tokens", "text, tokens", "tokens, text", "again, text, tokens"])
def test_exact_where_all_tokens_move_alike(layout: str, inner: str | None) -> None:
    for steps in ("FP", "FPFP"):
        assert error(Moving(layout=layout), steps, inner) < 1e-5
        assert error(Moving(layout=layout), steps, inner, context_motion=0) > 1e-2


def test_exact_where_the_nearest_active_tokens_move_alike() -> None:
    """Frames move otherwise, so that each token needs anchors in its own."""
    sides = np.zeros(GRID, dtype=bool)
    sides[:, :, [0, 1, 3, 4]] = True
    frames = np.arange(N) // (N // GRID[0])
    for active, same in ((sides.ravel(), True), (SCATTERED, False)):
        made = plan(active=active)
        alike = frames[made.active_index[made.token_anchors]] == frames
        assert alike[:, made.context_index].all() == same
    assert error(Moving(by_frame=True), "FP", active=sides.ravel()) < 1e-5
    assert error(Moving(by_frame=True), "FP") > 1e-3


def test_what_a_prediction_is_off_is_moved() -> None:
    """A parabola that all tokens share, of which a line knows nothing."""
    for inner in (None, "eager"):
        assert error(Moving(2), "FFP", inner, context_extrapolation=1) < 1e-5
        assert error(Moving(2), "FFP", inner, context_extrapolation=1, context_motion=0) > 1e-3


@pytest.mark.wide
def test_inductor() -> None:
    assert error(Moving(), "FPFP", "inductor") < 1e-5


def test_stored_in_fewer_bytes() -> None:
    for inner in (None, "eager"):
        assert error(Moving(), "FPFP", inner, cache_dtype="int8") < 0.02
        assert error(Moving(), "FPFP", inner, cache_dtype="int8", context_motion=0) > 0.05


def test_nothing_moves_on_inputs_that_stay() -> None:
    model, made = Moving(), plan()
    call = torch.randn(1, 3, *GRID), torch.randn(1, 4, 24), torch.tensor([900.0])
    forms = hetcache.rewrite(model, made, call)
    with torch.no_grad():
        full, cache = forms.run("full", {}, call, {})
        partial, after = forms.run("partial", cache, call, {})
    torch.testing.assert_close(partial, full, atol=1e-6, rtol=0)
    for entry in forms.cache_entries:
        if entry.group == "key_values":
            assert torch.equal(after[entry.input_name], cache[entry.input_name]), "the cache is of the last full step"


def test_it_takes_no_memory() -> None:
    call = torch.randn(1, 3, *GRID), torch.randn(1, 4, 24), torch.tensor([900.0])
    still, moving = (hetcache.rewrite(Moving(), plan(context_motion=motion), call) for motion in (0, 1))
    assert moving.buffer_bytes == still.buffer_bytes


def test_plans_of_any_active_tokens_share_their_full_form() -> None:
    moving, still = plan().form_options, plan(context_motion=0).form_options
    assert moving != still
    assert all(moving.for_kind(kind) == still.for_kind(kind) for kind in ("full", "reuse"))


def test_anchors() -> None:
    """The nearest tokens that are computed and outside the mask."""
    mask = np.zeros((1, 1, 12), dtype=bool)
    mask[..., :3] = True
    made = hetcache.Plan.from_mask(
        mask, mask.shape, schedule="full", margin=1.0, context_ratio=0.0, multiple=1, context_motion=1
    )
    assert made.active_index.tolist() == [0, 1, 2, 3]
    assert made.token_anchors.tolist() == [[3] * 12] * 2, "one is as good as two"
    kind = np.full(12, TokenKind.CONTEXT, dtype=np.uint8)
    kind[[0, 5]] = TokenKind.GENERATIVE
    active = np.array([0, 2, 5, 9, 11])
    many = replace(made, active_index=active, context_index=np.delete(np.arange(12), active), token_kind=kind)
    first, second = active[many.token_anchors]
    assert first[[0, 1, 2, 3, 7, 8, 9, 11]].tolist() == [2, 2, 2, 2, 9, 9, 9, 11]
    assert second[[0, 1, 2, 3, 7, 8, 9, 11]].tolist() == [9, 9, 9, 9, 11, 11, 11, 9]
    inside = np.array([0, 5])
    alone = replace(many, active_index=inside, context_index=np.delete(np.arange(12), inside))
    assert inside[alone.token_anchors[0]].tolist() == [0, 0, 0, 5, 5, 5, *[5] * 6], "all are inside: any of them"


@pytest.mark.parametrize("others", [True, False])
def test_what_an_edit_before_generated_shows_nothing(others: bool) -> None:
    """An edit from memory with a smaller mask: its content is the clip's now, which is no movement of the context.

    Where no `others` are computed outside the mask, nothing moves: then the model has to stay too.
    """
    grid = (2, 8, 8)
    large, small = np.zeros(grid, dtype=bool), np.zeros(grid, dtype=bool)
    large[:, 2:6, 2:6] = small[:, 3:5, 3:5] = True
    model, random = Moving(grid=grid), torch.Generator().manual_seed(0)
    model.paths.data *= others
    more = {} if others else {"context_ratio": 0.0}
    clip, text = torch.randn(1, 3, *grid, generator=random), torch.randn(1, 4, 24, generator=random)
    times = [torch.tensor([time]) for time in (900.0, 700.0)]
    torch._dynamo.reset()
    run = torch.compile(model, backend="hetcache", options={"inner": "eager"})

    def edit(mask: np.ndarray, **options: Any) -> tuple[hetcache.Session, float]:
        made = hetcache.Plan.from_mask(
            mask, grid, num_inference_steps=2, schedule=list("FP"),
            **{"margin": 1.5, "multiple": 1, "context_motion": 1, **more},
        )  # fmt: skip
        inside = torch.from_numpy(mask)
        latents = torch.where(inside, 2 * torch.randn(clip.shape, generator=random), clip)
        with torch.no_grad(), hetcache.session(made, strict=True, **options) as session:
            outputs = [run(latents, text, time) for time in times]
            expected = [model(latents, text, time) for time in times]
        return session, max(float((a - b)[..., inside].abs().max()) for a, b in zip(outputs, expected, strict=True))

    first, _ = edit(large, record=True)
    second, error = edit(small, memory_of=first.record)
    assert second.stats.recalled == 1
    assert second.plan.context_motion == others
    assert error < 1e-5


def test_it_is_saved(tmp_path: Any) -> None:
    plan().save(tmp_path / "edit.hetplan")
    loaded = hetcache.Plan.load(tmp_path / "edit.hetplan")
    assert loaded.context_motion == 1
    assert "cached K/V move" in loaded.describe()
    anchors = load_file(tmp_path / "edit.hetplan")["token_anchors"]  # for loops that are written after docs/serving.md
    assert np.array_equal(anchors.numpy(), loaded.token_anchors)


MASK = np.zeros((2, 6, 6), dtype=bool)
MASK[:, 2:4, 2:4] = True
IMMOVABLE = [
    ({"cached_ratio": 0.5}, "cached_ratio 1"),
    ({"merged_ratio": 0.5}, "merged_ratio 1"),
    ({"selection": "attention"}, "context_motion=0"),
    ({"context_ratio": 0.0, "margin": 0.0, "multiple": 1}, "a context_ratio above 0"),
]


@pytest.mark.parametrize(
    ("options", "message"), [({"context_motion": 2}, "context_motion must be 0, 1 or -1"), *IMMOVABLE], ids=str
)
def test_plans_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        hetcache.Plan.from_mask(MASK, MASK.shape, **{"context_motion": 1, **options})


def test_where_it_can() -> None:
    assert hetcache.Plan.from_mask(MASK, MASK.shape, context_motion=-1).context_motion == 1
    for options, _ in IMMOVABLE:
        assert hetcache.Plan.from_mask(MASK, MASK.shape, **{"context_motion": -1, **options}).context_motion == 0
    everywhere = hetcache.Plan.from_mask(np.ones_like(MASK), MASK.shape, context_motion=-1)
    assert everywhere.context_motion == 0


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin_ratio": 0.0}, {"margin": 0.0, "selection": "none"}], ids=str
)
def test_what_only_fills_m_up_moves_nothing(options: dict[str, Any]) -> None:
    """Masks of one M share a batch, whether it was rounded up or not."""
    filled, rounded_up = np.zeros((2, 1, 32, 32), dtype=bool)
    filled[:, :8, :8] = rounded_up[:, :7, :8] = True
    options = {"context_ratio": float("selection" in options), **options}
    both = [hetcache.Plan.from_mask(mask, mask.shape, context_motion=-1, **options) for mask in (filled, rounded_up)]
    assert [plan.num_active for plan in both] == [64, 64]
    assert not any(plan.context_motion for plan in both)
    assert hetcache.session(both).plans == tuple(both)
