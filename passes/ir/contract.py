"""What plans and passes agree on: budgets, the options of forms, and the limits of both. Plain data, no graphs."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ORDER = 2
"""The highest order at which outputs are extrapolated."""
NUM_QUERIES = 256
"""Generative queries that attention is measured with, spread evenly over the mask."""
NEVER, CANDIDATE, ALWAYS = range(3)
"""A token's standing: margin that the plan leaves out, context, active whatever is chosen."""
STRATEGIES = ("attention", "kmeans", "hetcache")
"""Selections made in a FULL step: by relevance, by representativeness, by both."""
STEP_WEIGHTS = "step_weights"
INACTIVE, ACTIVE = range(2)
"""The rows of `step_weights`."""


@dataclass(frozen=True)
class Budgets:
    """M active and C cached context tokens: all a form's shapes know of a plan."""

    num_active: int
    num_context: int
