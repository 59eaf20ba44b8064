"""Follow a plan on the calls of a toy model, and see how far its last step is off where tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import hetcache_compile as hetcache


def active_error(
    model: nn.Module, plan: hetcache.Plan, calls: Sequence[tuple[torch.Tensor, ...]], inner: str | None = None
) -> float:
    """The largest error of the active tokens of the last call's output `[B, C, T', H', W']`, against its largest value.

    Inactive outputs are another matter.

    Args:
        model: whose output has a value for each token.
        plan: one step for each call.
        calls: arguments, in order.
        inner: the compiler of a session's forms; None: functional forms.
    """
    with torch.no_grad():
        expected = model(*calls[-1])
        if inner is not None:
            torch._dynamo.reset()
            run = torch.compile(model, backend="hetcache", options={"inner": inner})
            with hetcache.session(plan, strict=True):
                actual = [run(*call) for call in calls][-1]
        else:
            forms, cache = hetcache.rewrite(model, plan, calls[0]), {}
            for kind, call in zip(plan.steps, calls, strict=True):
                actual, cache = forms.run(kind.form, cache, call, {})
    difference = (actual - expected).flatten(2)[:, :, torch.from_numpy(plan.active_index)].abs().max()
    return float(difference / expected.abs().max())
