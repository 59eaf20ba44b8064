"""Find attention that a model writes by hand, with products and a softmax.

What is found, in this order:

1. scores: `matmul`, `bmm`, `mm`, `baddbmm` or `einsum` of queries and keys;
2. in any order: times or over numbers, or tensors that are the same for all keys (these go to the queries); plus
   masks; `masked_fill` and `where` with minus infinity or a large negative number; casts to another float type; views
   that leave the last two dims as they are;
3. weights: `softmax` over the keys, or `exp(scores - max)` over its sum, divided before or after the next product;
4. casts, views, dropout that is off;
5. the product of weights and values.

It is found only where scores and weights have no other use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from ..ir.refusal import shape_of

aten = torch.ops.aten

CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default)
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims,
)  # fmt: skip
VERY_LARGE = -1e8
"""Nothing that is added to a score counts beside this."""
MASKED_OUT = -1e4
"""A key whose score is this or less has no weight, beside a key that is not masked."""


# 1. Products.


@dataclass(frozen=True)
class _Product:
    """`alpha · left · right + bias`, with a letter for each dim, as in `einsum`."""

    operands: tuple[Node, Node]
    words: tuple[str, str]
    result: str
    alpha: float = 1.0
    bias: Node | None = None


def _product(node: Node) -> _Product | None:
    if node.target is aten.einsum.default:
        return _einsum(node)
    arguments: tuple[Any, ...] = node.args
    numbers: dict[str, Any] = dict(node.kwargs)
    alpha, beta = numbers.get("alpha", 1), numbers.get("beta", 1)
    if node.target is aten.baddbmm.default and beta in (0, 1) and alpha > 0:
        bias, left, right = arguments
        bias = bias if beta else None
    elif node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        left, right, bias = *arguments, None
    else:
        return None
    rank = len(shape_of(left))
    if rank < 2 or rank != len(shape_of(right)):
        return None
    lead = "".join(chr(ord("A") + d) for d in range(rank - 2))
    return _Product((left, right), (lead + "id", lead + "dj"), lead + "ij", alpha, bias)


def _einsum(node: Node) -> _Product | None:
    equation, operands = cast("tuple[str, Sequence[Node]]", node.args[:2])
    words, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or words.count(",") != 1:
        return None
    left, right = words.split(",")
    if "..." in equation:
        extra = {len(shape_of(o)) - len(w) + 3 for o, w in zip(operands, (left, right), strict=True) if "..." in w}
        if len(extra) != 1 or not all("..." in word for word in (left, right, result)):
            return None
        # Letters that no equation has.
        dots = "".join(chr(0x100 + d) for d in range(extra.pop()))
        left, right, result = (word.replace("...", dots) for word in (left, right, result))
    return _Product((operands[0], operands[1]), (left, right), result)


def _order(word: str, wanted: str) -> tuple[int, ...] | None:
    """The permutation of the dims `word` that gives `wanted`, if there is one."""
    if len(set(word)) != len(word) or sorted(word) != sorted(wanted):
        return None
    return tuple(word.index(letter) for letter in wanted)


@dataclass(frozen=True)
class Operand:
    """A tensor, and the order of its dims in which it is `[..., rows, features]`."""

    node: Node
    order: tuple[int, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes before rows and features."""
        return tuple(shape_of(self.node)[d] for d in self.order[:-2])


# 2. Scores.


@dataclass(frozen=True)
class Mask:
    """Scores plus a mask; or, with a value, that value where the mask is set. `inverted`: where it is not set."""

    node: Node
    value: float | None = None
    inverted: bool = False


@dataclass(frozen=True)
class Scores:
    """`scale · query · key` and what is done to it before the softmax.

    Attributes:
        query: `[..., S, D]`.
        key: `[..., T, D]`.
        lead: sizes before S and T in the product.
        masked_lead: the same where masks meet it.
        scale: a number.
        factors: operators and tensors that scale a query.
        masks: in the order in which they are applied.
    """

    query: Operand
    key: Operand
    lead: tuple[int, ...]
    masked_lead: tuple[int, ...]
    scale: float
    factors: tuple[tuple[Any, Node], ...] = ()
    masks: tuple[Mask, ...] = ()


def _scores(node: Any, num_users: int = 1) -> Scores | None:
    """What computes a score, if nothing else uses it."""
    if not isinstance(node, Node) or len(node.users) != num_users:
        return None
    product = _product(node)
    if product is not None:
        return _of_queries_and_keys(node, product)
    if _is_free(node) or _is_reshape_of_lead(node):
        found = _scores(node.args[0])
        if found is not None and not found.masks and node.target in RESHAPES:
            return replace(found, masked_lead=shape_of(node)[:-2])
        return found
    for position, step in STEPS.get(node.target, ()):
        scores = node.args[position]
        if not isinstance(scores, Node) or shape_of(scores) != shape_of(node):
            continue
        found = _scores(scores)
        if found is not None:
            return step(node, scores, found)
    return None


def _of_queries_and_keys(node: Node, product: _Product) -> Scores | None:
    operands, words, result = list(product.operands), list(product.words), product.result
    lead, row, column = result[:-2], result[-2:-1], result[-1:]
    if row in words[1]:
        operands.reverse()
        words.reverse()
    shared = (set(words[0]) & set(words[1])) - set(result)
    if len(result) < 2 or len(shared) != 1:
        return None
    (feature,) = shared
    orders = _order(words[0], lead + row + feature), _order(words[1], lead + column + feature)
    if orders[0] is None or orders[1] is None:
        return None
    sizes = shape_of(node)[:-2]
    found = Scores(Operand(operands[0], orders[0]), Operand(operands[1], orders[1]), sizes, sizes, product.alpha)
    return found if product.bias is None else _with_mask(node, found, Mask(product.bias))


def _scaled(node: Node, scores: Node, found: Scores) -> Scores | None:
    """Times or over a number, or a tensor with one value for all keys; the first operand of a division."""
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    factor = node.args[1] if node.args[0] is scores else node.args[0]
    if found.masks or (divides and node.args[0] is not scores):
        return None
    if isinstance(factor, int | float):
        return None if factor <= 0 else replace(found, scale=found.scale / factor if divides else found.scale * factor)
    if factor is scores or found.masked_lead != found.lead or not isinstance(factor, Node):
        return None
    if (shape_of(factor) or (1,))[-1] != 1 or not dtype_of(node).is_floating_point:
        return None
    return replace(found, factors=(*found.factors, (node.target, factor)))


def _plus(node: Node, scores: Node, found: Scores) -> Scores | None:
    """Plus a mask. After a fill with a number that is not very large it might undo that."""
    mask = node.args[1] if node.args[0] is scores else node.args[0]
    if not isinstance(mask, Node) or mask is scores or node.kwargs.get("alpha", 1) != 1:
        return None
    least = max(VERY_LARGE, torch.finfo(dtype_of(scores)).min)
    if any(before.value is not None and before.value > least for before in found.masks):
        return None
    return _with_mask(node, found, Mask(mask))


def _filled(node: Node, scores: Node, found: Scores) -> Scores | None:
    """`masked_fill(scores, mask, value)`, `where(mask, scores, value)`, `where(mask, value, scores)`."""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        mask, value, inverted = node.args[1], node.args[2], False
    else:
        inverted = node.args[1] is scores
        mask, value = node.args[0], node.args[2 if inverted else 1]
    if isinstance(value, Node):
        value = value.args[1 if value.target is aten.full.default else 0] if value.target in NUMBERS else None
    if not isinstance(mask, Node) or not isinstance(value, int | float) or not value <= MASKED_OUT:
        return None
    filled = Mask(mask, float(value), inverted)
    if _is_finite(filled) and any(_is_finite(before) and before.value != value for before in found.masks):
        return None  # where all keys are masked, those of the larger number have all weight
    return _with_mask(node, found, filled)


def _is_finite(mask: Mask) -> bool:
    return mask.value not in (None, -float("inf"))


def _with_mask(node: Node, found: Scores, mask: Mask) -> Scores | None:
    shape = shape_of(mask.node)
    if found.masks and shape_of(node)[:-2] != found.masked_lead:
        return None  # masks of different views of the scores
    return replace(found, masks=(*found.masks, mask)) if shape and shape[-1] == shape_of(node)[-1] else None


NUMBERS = (aten.full.default, aten.scalar_tensor.default)
STEPS: dict[Any, tuple[tuple[int, Callable[[Node, Node, Scores], Scores | None]], ...]] = {
    aten.mul.Tensor: ((0, _scaled), (1, _scaled)),
    aten.mul.Scalar: ((0, _scaled),),
    aten.div.Tensor: ((0, _scaled),),
    aten.div.Scalar: ((0, _scaled),),
    aten.add.Tensor: ((0, _plus), (1, _plus)),
    aten.masked_fill.Scalar: ((0, _filled),),
    aten.masked_fill.Tensor: ((0, _filled),),
    aten.where.self: ((1, _filled), (2, _filled)),
    aten.where.ScalarOther: ((1, _filled),),
    aten.where.ScalarSelf: ((2, _filled),),
}
"""By operator: at which argument the scores may be, and what it does to them."""


def _is_free(node: Node) -> bool:
    """Whether a node has its operand's numbers: a copy, a cast to another float type, dropout that is off."""
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0) or node.args[2] is False
    return node.target in COPIES or (node.target in CASTS and dtype_of(node).is_floating_point)


def _is_reshape_of_lead(node: Node) -> bool:
    operand = node.args[0] if node.args else None
    return (
        node.target in RESHAPES and isinstance(operand, Node) and shape_of(operand)[-2:] == shape_of(node)[-2:]
    )  # the last two dims stay where they are, in memory order


# 3. and 4. Weights.


@dataclass(frozen=True)
class _Weights:
    """A softmax over the last dim.

    Attributes:
        scores: its operand.
        num_users: uses of the scores in it.
        node: its result; or, with a `total`, what is to be divided by that after the next product.
        total: the sum of `node`.
    """

    scores: Node
    num_users: int
    node: Node
    total: Node | None = None


def _weights(node: Node) -> _Weights | None:
    """The softmax that a node ends (`softmax`) or is the middle of (`exp`)."""
    if node.target in (aten.softmax.int, aten._softmax.default):
        operand, dim = node.args[:2]
        assert isinstance(operand, Node)
        return _Weights(operand, 1, node) if dim in (-1, len(shape_of(node)) - 1) else None
    difference = node.args[0] if node.target is aten.exp.default else None
    if not isinstance(difference, Node) or difference.target is not aten.sub.Tensor or len(difference.users) != 1:
        return None
    scores, largest = difference.args[:2]
    if difference.kwargs or not isinstance(scores, Node) or not _is_largest(largest, scores):
        return None
    total = next((user for user in node.users if _reduces(user, aten.sum.dim_IntList)), None)
    others = [user for user in node.users if user is not total]
    if total is None or len(others) != 1:
        return None
    if others[0].target is aten.div.Tensor and others[0].args == (node, total):
        return _Weights(scores, 2, others[0]) if len(total.users) == 1 else None
    return _Weights(scores, 2, node, total)


def _is_largest(node: Any, scores: Node) -> bool:
    while isinstance(node, Node) and node.target in COPIES:
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
        return isinstance(node, Node) and node.args[0] is scores and _reduces(node, aten.max.dim)
    return isinstance(node, Node) and node.args[0] is scores and _reduces(node, aten.amax.default)


def _reduces(node: Node, op: Any) -> bool:
    """Whether a node is a reduction over the last dim, which stays."""
    if node.target is not op or len(node.args) < 3 or node.kwargs or node.args[2] is not True:
        return False
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    operand = node.args[0]
    return isinstance(operand, Node) and list(dims) in ([-1], [len(shape_of(operand)) - 1])


# 5. The whole.


@dataclass(frozen=True)
class HandWritten:
    """An attention by hand.

    Attributes:
        scores: of queries and keys.
        value: `[..., T, D]`.
        place: the node of the result.
        lead: sizes before S and D in the second product.
        result: the order of `[..., S, D]` in the result.
    """

    scores: Scores
    value: Operand
    place: Node
    lead: tuple[int, ...]
    result: tuple[int, ...]


def find_attention(node: Node) -> HandWritten | None:
    """The attention whose weights a node computes, if it is one by hand that can be one operator."""
    weights = _weights(node) if node.op == "call_function" else None
    scores = _scores(weights.scores, weights.num_users) if weights else None
    if weights is None or scores is None:
        return None
    last, following = weights.node, [user for user in weights.node.users if user is not weights.total]
    while len(following) == 1 and (_is_free(following[0]) or _is_reshape_of_lead(following[0])):
        if following[0].args[0] is not last:  # `type_as`: only its type is of use
            return None
        last, following = following[0], list(following[0].users)
    product = _product(following[0]) if len(following) == 1 else None
    if product is None or product.bias is not None or product.alpha != 1 or product.operands.count(last) != 1:
        return None
    side = product.operands.index(last)
    word, other = product.words[side], product.words[1 - side]
    lead, row, column = word[:-2], word[-2:-1], word[-1:]
    features = set(product.result) - set(word)
    if len(features) != 1 or len(set(word)) != len(word) or not row:
        return None
    (feature,) = features
    order, result = _order(other, lead + column + feature), _order(lead + row + feature, product.result)
    if order is None or result is None:
        return None
    place = following[0]
    if weights.total is not None:
        divided = next(iter(place.users)) if len(place.users) == 1 else place
        if divided.target is not aten.div.Tensor or divided.args != (place, weights.total):
            return None
        if len(weights.total.users) != 1 or result != tuple(range(len(result))):
            return None
        place = divided
    value, sizes = Operand(product.operands[1 - side], order), shape_of(last)[:-2]
    if any(own not in (1, size) for own, size in zip(value.lead, sizes, strict=True)):
        return None
    if not all(dtype_of(node).is_floating_point for node in (scores.query.node, scores.key.node, value.node)):
        return None
    return HandWritten(scores, value, place, sizes, result)


def dtype_of(node: Node) -> torch.dtype:
    """The type of a node's result."""
    return node.meta["val"].dtype  # type: ignore[no-any-return]
