"""Rules for products with quantised weights that are operators of their own, such as those of bitsandbytes.

Some of these operators exist only once their library is imported, and some take weights that are packed for one
device, of which the oracle has no samples. So this table knows them by name; `tests/test_quantised.py` runs them.
"""

from __future__ import annotations

from math import prod

from ..ir.axis import FREE, AxisState, Flow, Parts, Place, Tokens
from ..ir.refusal import shape_of
from .reshape import move
from .rule import Query, Rule, works_along


def product(q: Query) -> Flow | str:
    """`op(x [..., K], weight, ...)` with a result `[..., M]`: each row of x is multiplied with the weight."""
    operand, state = q.first()
    if any(isinstance(q.state(other), Tokens) for other in q.node.all_input_nodes if other is not operand):
        return "its weight carries the token axis"
    return works_along(state, {len(shape_of(operand)) - 1}, "it contracts the token axis")


def quantise_rows(q: Query) -> Flow | str:
    """`int8_vectorwise_quant(x [..., K], threshold)`: x in int8, a flat list of one scale for each row, and outliers.

    With a threshold the columns in which any row has an outlier are treated apart, so rows depend on one another.
    """
    operand, state = q.first()
    if q.arg(1, "threshold", 0.0):
        return "the outliers of one token change every other one"
    whole = works_along(state, {len(shape_of(operand)) - 1}, "it scales over the token axis")
    return whole if isinstance(whole, str) else Flow(Parts((whole.state, _of_rows(whole.state, q), FREE)))


def scaled_product(q: Query) -> Flow | str:
    """`int8_scaled_mm(x [..., K], weight, scales of rows, scales of columns)`."""
    operand, state = q.first()
    scales, *others = (q.state(other) for other in (q.node.args[2], q.node.args[1], *q.node.args[3:]))
    if any(isinstance(other, Tokens) for other in others):
        return "its weight carries the token axis"
    whole = works_along(state, {len(shape_of(operand)) - 1}, "it contracts the token axis")
    expected = FREE if isinstance(whole, str) else _of_rows(whole.state, q)
    return whole if scales == expected else "its operands have different token axes"


def _of_rows(state: AxisState, q: Query) -> AxisState:
    """The state of a flat tensor with one number for each row of the first operand."""
    if not isinstance(state, Tokens):
        return FREE
    rows = shape_of(q.first()[0])[:-1]
    place = move(Place(state.dim, state.outer, state.inner), rows, (prod(rows),))
    assert place is not None  # all dims become one
    return Tokens(place.dim, state.whole, place.outer, place.inner)


PRODUCTS = (
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::gemv_4bit",
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
)
SCALED_PRODUCTS = ("bitsandbytes::int8_scaled_mm",)

NAMED: dict[str, Rule] = {
    **dict.fromkeys(PRODUCTS, product),
    "bitsandbytes::int8_vectorwise_quant": quantise_rows,
    **dict.fromkeys(SCALED_PRODUCTS, scaled_product),
}
