"""Move cached keys and values as those of computed tokens near them have moved since the last FULL step.

What is stale in a partial step are the keys and values of the context. The active tokens show how stale: the cache
holds their keys and values of the last FULL step too, and the difference to the fresh ones is much the same for
neighbours. So each token moves by the mean difference of its *anchors*, the nearest active tokens that are not
generated. That takes no model call and nothing more in the cache; a few context tokens that are computed all over the
picture (`context_ratio`) are anchors for all others.

=========  =================================================================================
form       after the pass
=========  =================================================================================
full       as before
partial    reads `cached[token] + mean(fresh[anchors] - cached[anchors])`; the cache stays
reuse      as before
=========  =================================================================================

Where inputs have not changed, nothing moves, but for what a smaller cache type rounds. Sums (linear attention) do not
move. Cached values that are predicted (`predict`) move by what the prediction of their anchors is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.axis import Tokens
from ..ir.contract import NUM_ANCHORS, TOKEN_ANCHORS
from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait
from ..ir.indices import rows_of

aten = torch.ops.aten


@dataclass(frozen=True)
class MoveContext(FormPass):
    """Cached keys and values that move with the anchors of their tokens.

    The form gets one more index, `token_anchors` [A, N]: the places of each token's anchors among the M active tokens.

    Attributes:
        num_tokens: N.
        num_active: M.
    """

    num_tokens: int
    num_active: int

    name = "move"
    kinds = ("partial",)
    requires = frozenset({Trait.FUNCTIONAL, Trait.ALL_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Move what attention reads; leave in the cache what the last full step computed."""
        moved, places = set(), dict[Tokens, list[Node]]()
        for entry, cached in list(form.reads.items()):
            for whole in [user for user in cached.users if entry.is_context and user.target is aten.index_copy.default]:
                layout = entry.tokens.at(0)
                anchors = places[layout] = places.get(layout) or self._anchor_rows(form, layout)
                _, dim, rows, fresh = whole.args
                call = form.before(whole, traced=True)
                change = call(aten.sub.Tensor, fresh, call(aten.index_select.default, cached, dim, rows))
                total, *others = [call(aten.index_select.default, change, dim, one) for one in anchors]
                for other in others:
                    total = call(aten.add.Tensor, total, other)
                now = call(aten.add.Tensor, cached, call(aten.mul.Scalar, total, 1 / NUM_ANCHORS))
                whole.replace_input_with(cached, now)
                moved.add(entry)
        form.writes = {entry: value for entry, value in form.writes.items() if entry not in moved}

    def _anchor_rows(self, form: FormEditor, tokens: Tokens) -> list[Node]:
        """Along a token axis, for each of its rows: the row of its first anchor, second anchor, ... among M tokens."""
        anchors = form.index(TOKEN_ANCHORS, (NUM_ANCHORS, self.num_tokens), torch.int64)
        call = form.at_start()
        each = [call(aten.select.int, anchors, 0, number) for number in range(NUM_ANCHORS)]
        return [rows_of(tokens, one, self.num_active, form.device, call) for one in each]
