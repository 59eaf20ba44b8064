"""Move cached keys and values as those of computed tokens near them have moved since the last FULL step.

What is stale in a partial step are the keys and values of the context. The active tokens show how stale: the cache
holds their keys and values of the last FULL step too, and the difference to the fresh ones is much the same for
neighbours. So every inactive token has an *anchor*, the nearest active token that is not generated, and moves by its
anchor's difference. That takes no model call and no memory; a few context tokens that are computed all over the
picture (`context_ratio`) are anchors for all others.

=========  ==========================================================================
form       after the pass
=========  ==========================================================================
full       as before
partial    reads `cached[token] + fresh[anchor] - cached[anchor]`; the cache stays
reuse      as before
=========  ==========================================================================

Where inputs have not changed, nothing moves. Cached values that are predicted (`predict`) move by what the prediction
of their anchor is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.contract import TOKEN_ANCHOR
from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait
from ..ir.indices import rows_of

aten = torch.ops.aten


@dataclass(frozen=True)
class MoveContext(FormPass):
    """Cached keys and values that move with the anchors of their tokens.

    The form gets one more index, `token_anchor` [N]: the place of each token's anchor among the M active tokens.

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
        moved = set()
        for entry, cached in list(form.reads.items()):
            for whole in [user for user in cached.users if entry.is_context and user.target is aten.index_copy.default]:
                _, dim, rows, fresh = whole.args
                anchor = form.index(TOKEN_ANCHOR, (self.num_tokens,), torch.int64)
                call = form.before(whole, traced=True)
                places = rows_of(entry.tokens, anchor, self.num_active, form.device, call)
                change = call(aten.sub.Tensor, fresh, call(aten.index_select.default, cached, dim, rows))
                now = call(aten.add.Tensor, cached, call(aten.index_select.default, change, dim, places))
                whole.replace_input_with(cached, now)
                moved.add(entry)
        form.writes = {entry: value for entry, value in form.writes.items() if entry not in moved}
