"""The rules against the oracle of `passes/oracle.py`: every sample, and where the token axis is born and ends."""

from __future__ import annotations

import pytest
import torch

from hetcache_compile.passes.ir.axis import FREE, OnGrid, Place, Tokens
from hetcache_compile.passes.rules.table import RULES
from hetcache_compile.passes.testing.oracle import SIZES, OpCall, S, Sizes, T, call, check_rows
from hetcache_compile.passes.testing.samples import ACCEPTED, FRAMES

aten = torch.ops.aten


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("whole", ACCEPTED, ids=str)
def test_partial_rows_are_the_rows_of_the_whole(whole: OpCall, sizes: Sizes) -> None:
    check_rows(whole, sizes)


def test_every_rule_has_a_sample_with_tokens() -> None:
    takes_no_tokens = {aten.squeeze.default}
    never = {torch.ops.higher_order.flex_attention}
    with_tokens = [c for c in ACCEPTED if any("n" in leaf.dims for leaf in c.leaves() if isinstance(leaf, T))]
    assert set().union(*(c.ops() for c in with_tokens)) == set(RULES) - takes_no_tokens - never
    assert set().union(*(c.ops() for c in ACCEPTED)) == set(RULES) - never


# Where the token axis is born and ends: the state of the result, written as its dims.

PATCH = call(aten.conv3d.default, T("bctYX"), T("dc122"), T("d"), [1, 2, 2])
MOVED = call(aten.permute.default, T("bdtyx"), [0, 1, 4, 3, 2])
DOUBLED = call(aten.cat.default, [T("bdtyx"), T("bdtyx")], 3)
STRUCTURE: list[tuple[OpCall, str]] = [
    # a convolution into patches makes the grid, and nothing else does
    (PATCH, "bdtyx"),
    (call(aten.conv3d.default, T("bdtyx"), T("kd111")), "bktyx"),
    (call(aten.conv3d.default, T("bdtyx"), T("kd333"), None, [1], [1]), "bktyx"),
    (call(aten.conv3d.default, T("bctYX"), T("dc144"), None, [1, 2, 2], [0, 1, 1]), "bd..."),
    (call(aten.conv3d.default, T("bctYX"), T("dc111"), None, [1, 2, 2]), "bd..."),
    (call(aten.conv3d.default, T("bctPQ"), T("dc122"), None, [1, 2, 2], [0, 1, 1]), "bd..."),
    (call(aten.conv3d.default, T("bctUV"), T("dc122"), None, [1, 2, 2], [0], [1, 2, 2]), "bd..."),
    (call(aten.conv3d.default, T("bctYX"), T("dc122"), None, [1, 2, 2], [0], [1, 1, 1], 1), "bdtyx"),
    (call(aten.conv3d.default, T("bctYX"), T("dc111")), "bd..."),
    # the grid moves with its dims
    (call(aten.add.Tensor, PATCH, T("d111")), "bdtyx"),
    (call(aten.mul.Tensor, T("tyx"), T("bdtyx")), "bdtyx"),
    (call(aten.group_norm.default, PATCH, 1), "bdtyx"),
    (call(aten.permute.default, PATCH, [0, 2, 3, 4, 1]), "btyxd"),
    (call(aten.transpose.int, call(aten.transpose.int, PATCH, 1, 2), 2, 3), "btydx"),
    (call(aten.unsqueeze.default, PATCH, 1), "b1dtyx"),
    (call(aten.squeeze.dim, T("1dtyx"), 0), "dtyx"),
    (call(aten.expand.default, T("dtyx"), S("bdtyx")), "bdtyx"),
    (call(aten.view.default, PATCH, S("bhetyx")), "bhetyx"),
    (call(aten.cat.default, [PATCH, T("bktyx")], 1), "b.tyx"),
    (call(aten.slice.Tensor, PATCH, 3, 1), "....."),
    (call(aten.repeat.default, T("dtyx"), [2, 1, 1, 1]), ".tyx"),
    (call(aten.repeat.default, T("dtyx"), [1, 1, 2, 1]), "...."),
    # birth: all of the grid, in order, and nothing else
    (call(aten.view.default, PATCH, S("bdN")), "bdn"),
    (call(aten.reshape.default, PATCH, S("bd-")), "bdn"),
    (call(aten.view.default, T("tyxbd"), S("N(bd)")), "n."),
    (call(aten.transpose.int, call(aten.view.default, PATCH, S("bdN")), 1, 2), "bnd"),
    (call(aten.view.default, DOUBLED, S("bd-")), "bd."),
    # death: exactly the grid
    (call(aten.view.default, T("bnd"), S("btyxd")), "btyxd"),
    (call(aten.view.default, T("bnd"), S("btyxhe")), "btyxhe"),
    (call(aten.view.default, T("dn"), S("1dtyx")), "1dtyx"),
    # and born again
    (call(aten.view.default, call(aten.view.default, T("bnd"), S("btyxd")), S("bNd")), "bnd"),
]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("whole", "result"), STRUCTURE, ids=str)
def test_where_the_token_axis_is(whole: OpCall, result: str, sizes: Sizes) -> None:
    assert check_rows(whole, sizes) == T(result).state(sizes)


def test_an_image_is_a_video_of_one_frame() -> None:
    patch = call(aten.conv2d.default, T("bcYX"), T("dc22"), None, [2, 2])
    assert check_rows(patch, SIZES["all is n"]) == OnGrid(frozenset({(Place(2), Place(3))}))
    assert check_rows(patch, SIZES["primes"]) == FREE  # 7 frames are no batch of videos of 2 frames
    frames = call(aten.conv2d.default, T("kcYX"), T("dc22"), None, [2, 2])
    assert check_rows(frames, {**SIZES["primes"], "k": 14}) == OnGrid(
        frozenset({(Place(0, outer=7), Place(2), Place(3))})
    )


def test_the_grid_in_another_order_is_no_token_axis() -> None:
    """Places are kept even where the order of the dims is wrong; only neighbours in the right order are tokens."""
    for sizes in SIZES.values():
        assert isinstance(check_rows(call(aten.reshape.default, MOVED, S("bdN")), sizes), OnGrid)


def test_a_folded_birth() -> None:
    for sizes in SIZES.values():
        assert check_rows(call(aten.view.default, PATCH, S("b(dN)")), sizes) == Tokens(1, outer=sizes["d"])
        assert check_rows(FRAMES, sizes) == (Tokens(2) if sizes["t"] == 1 else OnGrid(frozenset({frames_of(sizes)})))


def frames_of(sizes: Sizes) -> tuple[Place, ...]:
    return Place(1), Place(2, inner=sizes["x"]), Place(2, outer=sizes["y"])
