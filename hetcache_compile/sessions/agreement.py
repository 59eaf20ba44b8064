"""What the processes at one edit compare while a session is open. Alone, a process compares nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ParallelError
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..ranks.facts import checksum, facts_of_plans
from ..ranks.parallel import Parallel, current_parallel
from .calls import Call, Turn


class Agreement:
    """What one session compares.

    Attributes:
        parallel: the processes; None if there is one.
    """

    def __init__(self, parallel: Parallel | None) -> None:
        self.parallel = parallel
        self._weights: Any = WeakIdKeyDictionary()
        self._later: dict[str, Any] = {}

    def on_plans(self, plans: Sequence[Plan]) -> None:
        """Compare the plans that a session opens with.

        Raises:
            ParallelError: they differ.
        """
        if self.parallel is not None:
            self.parallel.agree(facts_of_plans(plans))

    def on_call(self, turn: Turn, call: Call) -> None:
        """Compare a FULL or PARTIAL step with that of the other processes at this edit; the model too, where it is new.

        Processes that share guidance compare the first call of a step. What the others were given is compared then, in
        the next one: nobody waits for a call that another process makes.

        Args:
            turn: of the call.
            call: the call.

        Raises:
            ParallelError: they differ, or the session was opened outside `parallel`.
        """
        if self.parallel is None and current_parallel() is not None:
            raise ParallelError("the session was opened outside hetcache.parallel and is not shared: open it inside")
        if self.parallel is None or turn.kind is StepKind.REUSE:
            return
        facts: dict[str, Any] = {"the kind of a step": turn.kind.name, "the number of a step": turn.step}
        facts["latents"] = checksum(call.latents)
        if turn.kind is StepKind.FULL:
            facts["conditions, such as text states"] = checksum(call.conditions)
        if self._weights.get(call.model) != turn.weights:
            facts["weights, or the model itself"] = call.signature()
            self._weights[call.model] = turn.weights
        if turn.branch.number and self.parallel.guidance is not None:
            self._later |= {f"{name} in call {turn.branch.number}": value for name, value in facts.items()}
            self.parallel.agree(facts, rows_only=True)
        else:
            facts, self._later = {**facts, **self._later}, {}
            self.parallel.agree(facts)

    def on_refusal(self, reason: str) -> None:
        """A call is found to run plainly, for a reason: so it has to in all processes at this edit.

        Raises:
            ParallelError: others go on.
        """
        if self.parallel is not None:
            try:
                self.parallel.agree({"whether a model can be cached": False})
            except ParallelError as error:
                error.add_note(f"here {reason}")
                raise

    def close(self, *, whole: bool) -> None:
        """The session closes: compare what is left, unless it closes by an error.

        Raises:
            ParallelError: processes differ.
        """
        later, self._later = self._later, {}
        if whole and self.parallel is not None:
            self.parallel.settle()
            if later:
                self.parallel.agree(later)
