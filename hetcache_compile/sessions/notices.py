"""What a session says of calls that run otherwise than planned: each thing once, as an error where it is strict."""

from __future__ import annotations

import warnings

from ..errors import HetCacheWarning, SessionError
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .stats import Stats


class Notices:
    """Warnings and errors of one session.

    Attributes:
        strict: whether a `SessionError` is raised in place of a warning.
        tried_calls: calls of graphs that were to follow the plan.
        refused_calls: those of them that ran plainly.
        foreign_calls: calls in threads or contexts that have no session, while this one was open.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.tried_calls = self.refused_calls = self.foreign_calls = 0
        self._said: set[str] = set()
        self._topics: set[str | None] = set()

    def warn(self, message: str) -> None:
        """Say something once in this session."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"hetcache: {message}", HetCacheWarning, stacklevel=2)

    def refused(self, message: str, error: BaseException | None = None, topic: str | None = None) -> None:
        """A call runs plainly, and why. Of one topic, such as graph breaks, only the first is said.

        Raises:
            SessionError: the session is strict.
        """
        self.refused_calls += 1
        if self.strict:
            raise SessionError(message) from error
        if topic is None or topic not in self._topics:
            self._topics.add(topic)
            self.warn(message)

    def foreign_call(self) -> None:
        """A compiled model was called where no session is open, while this one is open elsewhere."""
        self.foreign_calls += 1
        self.warn(
            "a compiled model was called in a thread or context that has no session, while one is open elsewhere: "
            "that call is plain. Open the session where the model is called, or put `with session.joined():` "
            "around the call"
        )

    def unplanned(self, plan: Plan, step: int | None, time: float | None) -> None:
        """A call fits nothing in the plan. Only the first is said.

        Args:
            plan: of the session.
            step: of the call, where it came out of order.
            time: of the call; None if calls are counted.

        Raises:
            SessionError: the session is strict.
        """
        if step is not None:
            reason = f"step {step} came out of order"
        elif time is None:
            reason = f"more than the plan's {len(plan.steps)} steps were taken"
        else:
            times = plan.timesteps
            reason = (
                f"the plan knows no time {time:g}, its times are {len(times)} from {times.max():g} to {times.min():g}"
            )
        message = (
            f"{reason}: such a call is FULL. Make the plan for the steps of this edit, with "
            "plan_for(pipe, ...) and the same arguments"
        )
        if self.strict:
            raise SessionError(message)
        if "unplanned" not in self._topics:
            self._topics.add("unplanned")
            self.warn(message)

    def closing(self, plan: Plan, stats: Stats, *, shares: bool) -> None:
        """The session closes: say what of its plan did not happen.

        Args:
            plan: of the session.
            stats: what ran.
            shares: whether calls could have shared their context.

        Raises:
            SessionError: the plan was not followed at all, and the session is strict.
        """
        if shares and stats.kinds and not stats.shared:
            self.warn(
                "the plan has shared_context, but no call shared another one's: that takes two calls at a FULL step, "
                "with the same latents and scales and texts of one length. Without guidance, with both branches in one "
                "call, and in an engine the edit takes the time and the memory that it takes without it"
            )
        if stats.kinds or all(kind is StepKind.FULL for kind in plan.steps):
            return
        if self.tried_calls > self.refused_calls:
            return  # the others raised errors that somebody has seen
        if self.refused_calls:
            reason = f"all {self.refused_calls} calls ran plainly, for the reasons said before"
        elif self.foreign_calls:
            reason = f"{self.foreign_calls} calls were made in other threads or contexts, which have no session"
        else:
            reason = (
                "no model was called that was compiled with backend=hetcache_backend: set "
                "pipe.transformer = torch.compile(pipe.transformer, backend=hetcache_backend), and see "
                "that Dynamo did not reach its recompile limit"
            )
        if self.strict:
            raise SessionError(f"the session's plan was not followed: {reason}")
        self.warn(f"the session's plan was not followed: {reason}")
