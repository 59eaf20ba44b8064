"""A call of every operator that has a rule, for the oracle; see there how calls are written."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..rules.table import ELEMENTWISE
from .oracle import OpCall, S, T, call

aten = torch.ops.aten
END = torch.iinfo(torch.int64).max

# Elementwise operators: `PATTERNS` for their number of tensors, `ARGUMENTS` for what else they need.

PATTERNS: dict[int, list[tuple[str, ...]]] = {
    1: [("n",), ("bnd",), ("bdn",)],
    2: [("bnd", "bnd"), ("bnd", "d"), ("bnd", "b1d"), ("bnd", "Nd"), ("bdn", "N"), ("bnd", "bN1"), ("bn", "")],
    3: [("bnd", "bnd", "b1d"), ("nd", "d", "Nd"), ("bnd", "1", "n1"), ("bdn", "dN", "d1")],
}
BROADCAST_FIRST = [("d", "bnd"), ("b1d", "bnd"), ("Nd", "bnd"), ("bN1", "n1"), ("dN", "bdn")]
ARGUMENTS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.clamp.default: ((0.5, 0.8), {}),
    aten.to.dtype: ((torch.float32,), {}),
    aten._to_copy.default: ((), {"dtype": torch.float32}),
    aten.masked_fill.Scalar: ((2.0,), {}),
    aten.masked_fill.Tensor: ((T(""),), {}),
    aten.div.Tensor_mode: ((), {"rounding_mode": "floor"}),
    aten.div.Scalar_mode: ((), {"rounding_mode": "trunc"}),
}
DTYPES: dict[Any, tuple[torch.dtype, ...]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), (torch.bool, torch.float64)),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), (torch.float64, torch.bool)),
    **dict.fromkeys(
        (
            aten.bitwise_and.Tensor,
            aten.bitwise_or.Tensor,
            aten.bitwise_not.default,
            aten.__and__.Tensor,
            aten.__or__.Tensor,
        ),
        (torch.bool,),
    ),
    **dict.fromkeys((aten.real.default, aten.imag.default, aten._conj.default), (torch.complex128,)),
}


def elementwise_calls() -> list[OpCall]:
    """Each elementwise operator with each pattern for as many tensors as it takes."""
    calls = []
    for op in ELEMENTWISE:
        required = [a for a in op._schema.arguments if not a.has_default_value() and a.name != "value"]
        tensors = sum(str(a.type) == "Tensor" for a in required)
        patterns = list(PATTERNS[tensors])
        if tensors > 1 and op is not aten.copy.default:  # which has the shape of its first operand
            patterns += [(*pattern, "1")[:tensors] for pattern in BROADCAST_FIRST]
        more, kwargs = ARGUMENTS.get(op, ((), {}))
        dtypes = DTYPES.get(op, (torch.float64,))
        for pattern in patterns:
            operands = iter(T(dims, dtypes[min(i, len(dtypes) - 1)]) for i, dims in enumerate(pattern))
            given = [
                1.5 if str(a.type) == "number" else next(operands)
                for a in required
                if str(a.type) in ("Tensor", "number")
            ]
            calls.append(call(op, *given, *more, **kwargs))
    return calls


def index_below(dims: str, bound: int) -> OpCall:
    """Indices between 0 and `bound` - 1, drawn from data."""
    below = call(aten.clamp.default, call(aten.mul.Scalar, T(dims), 1.3), 0.0, bound - 0.5)
    return call(aten.to.dtype, below, torch.int64)


def norms(op: Any, *dims_and_weights: tuple[str, str]) -> list[OpCall]:
    """A norm over trailing dims, with weights and without."""
    with_weights = [call(op, T(dims), S(weights), T(weights)) for dims, weights in dims_and_weights]
    return with_weights + [call(op, T(dims), S(weights)) for dims, weights in dims_and_weights]


def attention(q: str | OpCall, k: str | OpCall, v: str | OpCall, *more: Any, **kwargs: Any) -> OpCall:
    """Attention over operands that are given by their dims."""
    operands = [T(x) if isinstance(x, str) else x for x in (q, k, v)]
    return call(aten.scaled_dot_product_attention.default, *operands, *more, **kwargs)


def self_attention_of_one_tensor(dims: str) -> OpCall:
    """Its query, key and value are one node."""
    operand = T(dims)
    return call(aten.scaled_dot_product_attention.default, operand, operand, operand)


# Axes that hold more than one run of tokens, or fold it with other dims.
JOINT = call(aten.cat.default, [T("bhle"), T("bhne"), T("bhke")], 2)
JOINT_COLUMNS = call(aten.transpose.int, JOINT, 2, 3)
JOINT_MASK = call(aten.matmul.default, WHOLE_JOINT := call(aten.cat.default, [T("bhle"), T("bhNe"), T("bhke")], 2),
                  call(aten.transpose.int, WHOLE_JOINT, 2, 3))  # fmt: skip
TWO_RUNS = call(aten.cat.default, [T("bhne"), T("bhle"), T("bhne")], 2)
IN_BATCH = call(aten.view.default, T("bnd"), S("(bn)d"))
IN_FEATURES = call(aten.view.default, T("bnhe"), S("b(nh)e"))
JOINT_IN_BOTH = call(aten.reshape.default, call(aten.transpose.int, JOINT, 1, 2), S("-e"))
FRAMES = call(aten.view.default, T("bnd"), S("bt(yx)d"))
FOLDED: list[OpCall] = [
    *(call(aten.add.Tensor, axis, T("d")) for axis in (IN_BATCH, FRAMES)),
    call(aten.add.Tensor, IN_BATCH, call(aten.view.default, T("bNd"), S("(bn)d"))),
    call(aten.add.Tensor, IN_FEATURES, call(aten.view.default, T("bNhe"), S("b(nh)e"))),
    call(aten.linear.default, IN_BATCH, T("kd"), T("k")),
    call(aten.view.default, IN_BATCH, S("bnd")),
    call(aten.view.default, IN_BATCH, S("bnhe")),
    call(aten.view.default, IN_FEATURES, S("bnhe")),
    call(aten.view.default, IN_FEATURES, S("bn(he)")),
    call(aten.view.default, IN_FEATURES, S("(bnhe)")),
    call(aten.repeat.default, T("nd"), [2, 1]),
    call(aten.repeat.default, T("bnd"), [2, 3, 1]),
    call(aten.repeat_interleave.self_int, T("bnd"), 3, 1),
    call(aten.repeat_interleave.self_int, T("bnd"), 2, -1),
    call(aten.repeat_interleave.self_int, T("bnd"), 2, 0),
    call(aten.add.Tensor, call(aten.repeat_interleave.self_int, T("nd"), 2, 0), T("d")),
    call(aten.add.Tensor, JOINT_IN_BOTH, T("e")),
    call(aten.reshape.default, JOINT_IN_BOTH, S("b-he")),
    call(aten.cat.default, [IN_BATCH, IN_BATCH], 1),
    attention(*[call(aten.view.default, T("bnke"), S("(bn)ke"))] * 3),
    # joint axes
    JOINT,
    TWO_RUNS,
    call(aten.cat.default, [T("nd"), T("nd")]),
    call(aten.cat.default, [JOINT, T("bh2e")], 2),
    call(aten.add.Tensor, JOINT, T("e")),
    call(aten.mul.Tensor, JOINT, WHOLE_JOINT),
    *(call(aten.slice.Tensor, JOINT, 2, *ends) for ends in ((0, 3), (2, 5), (-3, -1), (-4,), (3,), (0, -5), (0, END))),
    *(call(aten.select.int, JOINT, 2, index) for index in (0, -1)),
    call(aten.split_with_sizes.default, JOINT, S("lnk"), 2),
    call(operator.getitem, call(aten.split_with_sizes.default, TWO_RUNS, S("nln"), 2), 2),
    call(aten.split_with_sizes.default, T("nd"), S("n"), 0),
    call(aten.constant_pad_nd.default, T("bnd"), [0, 0, 2, 3]),
    call(aten.constant_pad_nd.default, T("bnd"), [1, 2], 0.5),
    call(aten.pad.default, T("bnd"), [0, 0, 0, 5]),
    call(aten.pad.default, T("bnd"), [1, 1], "reflect"),
    call(aten.slice_scatter.default, JOINT, call(aten.slice.Tensor, JOINT, 2, 2, END), 2, 2, END),
    call(aten.slice_scatter.default, T("bhne"), T("bhNe"), 2),
    call(aten.slice_scatter.default, JOINT, T("bh2e"), 2, 1, 3),
    call(aten.slice_scatter.default, JOINT, call(aten.slice.Tensor, WHOLE_JOINT, 2, 2, END), 2, 2, END),
    call(aten.reshape.default, JOINT_COLUMNS, S("b(he)-")),
    call(aten.linear.default, call(aten.transpose.int, JOINT_IN_BOTH, 0, 0), T("ke")),
]

ACCEPTED: list[OpCall] = [
    *FOLDED,
    *elementwise_calls(),
    call(aten.add.Tensor, T("bdtyx"), T("d111")),
    call(aten.add.Tensor, T("bdtyx"), T("tyx")),
    # shapes and types of others
    call(aten.type_as.default, T("bnd"), T("bnd", torch.float32)),
    call(aten.type_as.default, T("bnd"), T("d", torch.float32)),
    call(aten.type_as.default, T("Nd"), T("bnd", torch.float32)),
    *(call(op, T(d)) for op in (aten.zeros_like.default, aten.ones_like.default) for d in ("n", "bnd", "bdn")),
    *(call(aten.empty_like.default, T(d)) for d in ("n", "bnd", "bdn")),
    *(call(aten.full_like.default, T(d), 2.0) for d in ("n", "bnd", "bdn")),
    *(call(op, T("bnd"), S("bNd")) for op in (aten.new_zeros.default, aten.new_ones.default)),
    call(aten.new_empty.default, T("bnd"), S("bNd")),
    call(aten.new_full.default, T("bnd"), S("bNd"), 2.0),
    call(aten.add.Tensor, call(aten.new_zeros.default, T("bnd"), S("N1")), T("bnd")),
    # products
    *(call(aten.linear.default, T(dims), T("kd"), T("k")) for dims in ("nd", "bnd", "nbd", "blnd")),
    call(aten.linear.default, T("bnd"), T("kd")),
    call(aten.matmul.default, T("nd"), T("dk")),
    call(aten.matmul.default, T("bnd"), T("dk")),
    call(aten.matmul.default, T("nbd"), T("dk")),
    call(aten.matmul.default, T("nbd"), T("d")),
    call(aten.matmul.default, T("nd"), T("d")),
    call(aten.matmul.default, T("bhne"), T("bhek")),
    call(aten.matmul.default, T("bhne"), T("1hek")),
    call(aten.matmul.default, T("nd"), T("bdk")),
    call(aten.matmul.default, T("hne"), T("bhek")),
    call(aten.mm.default, T("nd"), T("dk")),
    call(aten._int_mm.default, T("nd", torch.int8), T("dk", torch.int8)),
    call(aten.bmm.default, T("bnd"), T("bdk")),
    call(aten.addmm.default, T("k"), T("nd"), T("dk")),
    call(aten.addmm.default, T("Nk"), T("nd"), T("dk")),
    call(aten.addmm.default, T("1k"), T("nd"), T("dk")),
    call(aten.addmm.default, T("nk"), T("nd"), T("dk")),
    call(aten.mm.default, T("ld"), T("dn")),
    call(aten.matmul.default, T("bhle"), T("bhen")),
    call(aten.matmul.default, T("bnld"), T("Ndk")),
    call(aten.matmul.default, T("nld"), T("1dk")),
    call(aten.matmul.default, T("nld"), T("bndk")),
    call(aten.bmm.default, T("nld"), T("Ndk")),
    call(aten.matmul.default, T("bhkn"), T("bhne")),
    call(aten.matmul.default, JOINT_COLUMNS, JOINT),
    call(aten.matmul.default, call(aten.matmul.default, T("bhkn"), T("bhne")), T("bhen")),
    call(aten.einsum.default, "bnd->ndb", [T("bnd")]),
    call(aten.einsum.default, "bnd -> bn", [T("bnd")]),
    call(aten.einsum.default, "bnd,kd->bkn", [T("bnd"), T("kd")]),
    call(aten.einsum.default, "nd,bnd->bn", [T("Nd"), T("bnd")]),
    call(aten.einsum.default, "bnd,nd->dn", [T("bnd"), T("nd")]),
    call(aten.outer.default, T("n"), T("k")),
    call(aten.outer.default, T("k"), T("n")),
    # norms
    *norms(aten.layer_norm.default, ("bnd", "d"), ("nbd", "d"), ("bnhe", "he"), ("bhne", "e"), ("nd", "d")),
    *norms(aten.rms_norm.default, ("bnd", "d"), ("nbd", "d"), ("bnhe", "he"), ("bhne", "e"), ("nd", "d")),
    call(aten.layer_norm.default, T("bdtyx"), S("x"), T("x")),
    call(aten.group_norm.default, T("nkl"), 1, T("k"), T("k")),
    call(aten.group_norm.default, T("bdtyx"), 1),
    # convolutions
    call(aten.conv3d.default, T("bctYX"), T("dc122"), T("d"), [1, 2, 2]),
    call(aten.conv2d.default, T("bcYX"), T("dc22"), T("d"), [2, 2]),
    call(aten.conv1d.default, T("bcn"), T("dc1"), T("d")),
    call(aten.conv2d.default, T("bcnl"), T("dc11"), T("d")),
    call(aten.conv2d.default, T("ncYX"), T("dc22"), T("d"), [2, 2]),
    call(aten.conv3d.default, T("nctYX"), T("dc122"), None, [1, 2, 2]),
    call(aten.convolution.default, T("bcn"), T("dc1"), T("d"), [1], [0], [1], False, [0], 1),
    # attention: cross, self, token by token
    attention("bhne", "bhle", "bhlk"),
    attention("hne", "hle", "hle"),
    attention("bhne", "bhle", "bhle", None, 0.0, False, scale=0.3),
    attention("bhne", "bhle", "bhle", T("Nl")),
    attention("bhne", "bhle", "bhle", T("bhNl", torch.bool)),
    attention("bhne", "bhle", "bhle", T("b11l")),
    attention("bhne", "bhne", "bhnk"),
    attention("bne", "bne", "bne"),
    attention("bhne", "bhne", "bhne", scale=0.3),
    self_attention_of_one_tensor("bhne"),
    # masks: a row for each query, a column for each key
    attention("bhne", "bhne", "bhne", T("NN")),
    attention("bhne", "bhne", "bhne", T("b11N", torch.bool)),
    attention("bhne", "bhne", "bhne", T("N1")),
    attention("bhne", "bhne", "bhne", attn_mask=T("bhNN")),
    # whole queries, joint keys
    attention("bhle", "bhne", "bhne"),
    attention("bhle", "bhne", "bhne", T("lN")),
    attention(JOINT, JOINT, JOINT),
    attention(JOINT, JOINT, JOINT, JOINT_MASK),
    attention("bhne", JOINT, JOINT),
    attention("bhle", TWO_RUNS, TWO_RUNS),
    attention(TWO_RUNS, TWO_RUNS, TWO_RUNS),
    attention("nhke", "Nhle", "Nhle"),
    attention("nhke", "1hle", "1hle"),
    call(aten.scaled_dot_product_attention.default, T("bhne"), T("b1ne"), T("b1ne"), enable_gqa=True),
    attention("nhke", "nhle", "nhle"),
    attention("bnke", "bnle", "bnle"),
    # reductions
    *(
        call(op, T("bnd"), *more)
        for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
        for more in (([2],), ([-1], True), ([0],), ([0, 2],), ([0, -1], True))
    ),
    *(call(aten.softmax.int, T(dims), dim) for dims, dim in (("bnd", 2), ("bnd", 0), ("bhnl", -1), ("bdn", -2))),
    *(call(aten._softmax.default, T(dims), dim, False) for dims, dim in (("bnd", 2), ("bnd", 0), ("bdn", -2))),
    # reshapes: the token axis stays, is born, dies
    *(
        call(op, T(old), S(new))
        for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
        for old, new in (
            *(
                ("bnd", "bnhe"),
                ("bnhe", "bnd"),
                ("nbd", "n(bd)"),
                ("bnd", "b-he"),
                ("bnhe", "bn-"),
                ("bnd", "1bnd1"),
            ),
            *(("1nd", "nd"), ("bdn", "bhen"), ("bhen", "(bhe)n"), ("bdn", "bd-")),
            *(("bdtyx", "bdN"), ("tyxd", "Nd"), ("btyxhe", "b-d"), ("bdtyx", "bhetyx")),
            *(("bnd", "btyxd"), ("bnd", "btyxhe"), ("dn", "dtyx"), ("nd", "tyx1d")),
        )
    ),
    call(aten.transpose.int, call(aten.view.default, T("bdtyx"), S("bdN")), 1, 2),
    call(aten.view.default, call(aten.permute.default, T("tyxbd"), [3, 0, 1, 2, 4]), S("bNd")),
    call(aten.view.default, call(aten.conv3d.default, T("bctYX"), T("dc122"), None, [1, 2, 2]), S("bdN")),
    *(call(aten.select_scatter.default, T(a), T(b), 2, 1) for a, b in (("bnd", "bn"), ("bNd", "bn"), ("bnd", "bN"))),
    call(aten.select_scatter.default, T("bnd"), T("nd"), 0, 1),
    call(aten.index_put.default, T("bnd"), [None, None, T("2", torch.int64)], T("bn2")),
    call(aten.index_put.default, T("bnd"), [None, None, T("2", torch.int64)], T("bN2")),
    call(aten.index_put.default, T("bNd"), [None, None, T("2", torch.int64)], T("bn2")),
    *(call(op, T("bnd", torch.bool), dim) for op in (aten.any.dim, aten.all.dim) for dim in (0, -1)),
    # lookups, and operators along other dims
    call(aten.embedding.default, T("kd"), call(aten.to.dtype, T("bn"), torch.int64)),
    *(
        call(op, T(dims), dim)
        for op in (aten.cumsum.default, aten.glu.default)
        for dims, dim in (("bn2", 2), ("2nd", 0))
    ),
    *(call(aten.flip.default, T("bnd"), flipped) for flipped in ([0], [-1, 0])),
    *(call(aten.roll.default, T("bnd"), *more) for more in (([1], [2]), ([1, 2], [0, -1]))),
    *(call(aten.linalg_vector_norm.default, T("bnd"), 2, [-1], keep) for keep in (True, False)),
    *(call(op, T("bnd"), 0.5, False) for op in (aten.dropout.default, aten.native_dropout.default)),
    call(aten.index_select.default, T("bnd"), 2, T("2", torch.int64)),
    call(aten.index.Tensor, T("bnd"), [T("3", torch.int64)]),
    call(aten.index.Tensor, T("bnd"), [None, None, T("13", torch.int64)]),
    call(aten.pad_sequence.default, [T("nd"), T("nd")], True),
    call(aten.pad_sequence.default, [T("nd"), T("Nd")], True),
    call(aten.view_as_real.default, call(aten.view_as_complex.default, T("bn2"))),
    # dims
    *(call(aten.permute.default, T("bnd"), order) for order in ([2, 0, 1], [0, 2, 1], [-2, -1, -3])),
    call(aten.permute.default, T("bnhe"), [0, 2, 1, 3]),
    *(call(aten.transpose.int, T("bnhe"), a, b) for a, b in ((1, 2), (-2, -3), (0, 3), (3, 1), (-4, 1))),
    *(call(aten.t.default, T(dims)) for dims in ("nd", "dn", "n")),
    *(call(aten.unsqueeze.default, T("bnd"), dim) for dim in (0, 1, 2, 3, -1, -2, -3)),
    *(call(aten.squeeze.dim, T(dims), dim) for dims, dim in (("1nd", 0), ("bn1", -1), ("1bn", 0), ("bnd", 0))),
    *(call(aten.squeeze.dims, T("1b1n1"), dims) for dims in ([0, 2], [-1, 0], [0, 1, 4], [4])),
    call(aten.squeeze.default, T("1dtyx")),
    *(call(aten.expand.default, T(old), S(new)) for old, new in (("1nd", "bnd"), ("nd", "bnd"), ("n1", "bnd"))),
    *(call(aten.expand.default, T(old), S(new)) for old, new in (("1n", "b-"), ("d1n", "b-hn"), ("1dtyx", "bdtyx"))),
    *(call(aten.repeat.default, T(dims), times) for dims, times in (("1nd", [2, 1, 3]), ("nd", [3, 1, 2]))),
    # pieces
    call(aten.cat.default, [T("bnd"), T("bnk")], 2),
    call(aten.cat.default, [T("bnd"), T("lnd")]),
    call(aten.cat.default, [T("bnd"), T("bNk"), T("bn1")], -1),
    call(aten.cat.default, [T("bdtyx"), T("bktyx")], 1),
    *(call(aten.stack.default, [T("bnd"), T("bnd")], dim) for dim in (0, 1, 2, 3, -1, -3)),
    call(aten.stack.default, [T("bNd"), T("bnd")]),
    *(call(aten.split.Tensor, T("bnd"), 2, dim) for dim in (0, 2, -1)),
    call(aten.split.Tensor, T("bnd"), 2),
    *(call(aten.split_with_sizes.default, T("bn5"), [2, 3], dim) for dim in (2, -1)),
    *(call(aten.chunk.default, T("bnd"), 2, dim) for dim in (0, 2, -1)),
    *(call(aten.slice.Tensor, T("bnd"), *more) for more in ((2, 1, 5), (0, 0, 2), (-1, 0, END, 2), ())),
    *(call(aten.select.int, T("bnd"), dim, 1) for dim in (0, 2, -1, -3)),
    *(call(aten.unbind.int, T(dims), *dim) for dims, dim in (("bnd", ()), ("bnd", (2,)), ("bdn", (-2,)))),
    *(call(operator.getitem, call(aten.unbind.int, T("bnd"), dim), 1) for dim in (0, 2)),
    call(operator.getitem, call(aten.chunk.default, T("bnd"), 2, -1), 0),
    *(
        call(aten.slice_scatter.default, T(whole), T(part), dim, 0, END, 2)
        for whole, part, dim in (("bnd", "bnr", 2), ("bNd", "bnr", 2), ("bnd", "bNr", -1), ("dn", "rn", 0))
    ),
    call(aten.slice_scatter.default, call(aten.empty_like.default, T("bnd")), T("bnd"), 2),
    call(aten.concat.default, [T("bnd"), T("bnk")], 2),
    call(aten.concat.default, [T("bld"), T("bnd")], 1),
    *(call(aten.fill.Scalar, T(dims), 0.5) for dims in ("n", "bnd")),
    call(aten.fill.Tensor, T("bnd"), T("")),
    *(call(op, T("ncYX"), [2, 2]) for op in (aten.max_pool2d.default, aten.avg_pool2d.default)),
    *(call(op, T("nctYX"), [1, 2, 2]) for op in (aten.max_pool3d.default, aten.avg_pool3d.default)),
    # attention token by token, each with a mask of its own
    attention("nhke", "nhle", "nhle", T("n1kl")),
    attention("nhke", "nhle", "nhle", T("Nh1l", torch.bool)),
    attention("nhke", "Nhle", "Nhle", T("n11l")),
    attention("nhke", "nhle", "nhle", T("kl")),
    attention("Nhke", "Nhle", "Nhle", T("n1kl")),
    attention("nhke", "nhke", "nhke", None, 0.0, True),
    # by an index: along other dims, of each row's own choice, and into the whole token axis
    *(call(aten.topk.default, T(dims), 2, *dim) for dims, dim in (("bnd", ()), ("bdn", (1,)), ("bnd", (0,)))),
    *(call(aten.sort.default, T(dims), *dim) for dims, dim in (("bnd", ()), ("bdn", (1,)), ("bnd", (0, True)))),
    call(operator.getitem, call(aten.topk.default, T("bnd"), 3), 1),
    *(
        call(aten.gather.default, T(base), dim, index_below(index, 2))
        for base, dim, index in (
            *(("bnd", 2, "bn2"), ("bNd", 2, "bn2"), ("bnd", 2, "bN2"), ("ndb", 1, "nlb")),
            *(("bld", 1, "bnd"), ("dl", -1, "dn"), ("bNl", 0, "lnl")),
        )
    ),
    *(
        call(op, T(base), dim, index_below(index, 2), *source)
        for base, dim, index in (("bnd", 2, "bnl"), ("bNd", 2, "bnl"), ("bnd", -1, "bNl"), ("dnb", 0, "lnb"))
        for op, source in (
            (aten.scatter_add.default, (T(index),)),
            (aten.scatter.value, (0.5,)),
        )
    ),
    call(aten.scatter_add.default, T("bnd"), 2, index_below("bNl", 2), T("bnl")),
    call(aten.scatter_add.default, T("bNd"), 2, index_below("bNl", 2), T("bnl")),
    call(aten.scatter.src, T("bnd"), 2, call(aten.zeros_like.default, T("bn1", torch.int64)), T("bN1")),
    call(aten.scatter_add.default, T("bnd"), 1, index_below("bld", 2), T("bld")),
    call(aten.scatter_add.default, call(aten.view.default, T("bnd"), S("(bn)d")), 0, index_below("ld", 2), T("ld")),
    *(
        call(op, T(base), dim, T("2", torch.int64), T(source))
        for op in (aten.index_add.default, aten.index_copy.default)
        for base, dim, source in (("bnd", 2, "bn2"), ("bNd", -1, "bn2"), ("bnd", 2, "bN2"), ("dn", 0, "2n"))
    ),
    call(aten.index_add.default, T("bnd"), 1, index_below("2", 2), T("b2d"), alpha=0.5),
    call(aten.index_copy.default, T("bnd"), 1, T("1", torch.int64), T("b1d")),
    # products with a bias
    *(
        call(aten.baddbmm.default, T(bias), T("bnd"), T("bdk"), beta=0.5, alpha=2.0)
        for bias in ("bnk", "bNk", "b1k", "Nk", "nk", "k", "1n1")
    ),
    call(aten.baddbmm.default, T("blN"), T("bld"), T("bdn")),
    call(aten.baddbmm.default, T("N1k"), T("nld"), T("ndk")),
]
