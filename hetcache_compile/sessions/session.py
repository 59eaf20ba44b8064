"""A session: one plan at work. It alone knows which step a call is, whose cache it has, and whether that is filled.

Each compiled model has tracks of calls of its own (`branches.Track`), which read the time that a call is given
(`clock`). A call says what it is (`Call`); the session answers with a `Turn`, and is told when the turn is done.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import RecordError, SessionError
from ..passes.forms.collectives import Ranks
from ..passes.ir.contract import STEP_WEIGHTS
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..ranks.parallel import current_parallel
from ..record.caches import Restorer
from ..record.record import BranchKey, Record, RecordedStep, Tensors, check_recordable
from .agreement import Agreement
from .branches import Branch, Track
from .calls import Call, Model, Turn
from .clock import Clock, Timeline
from .context import BRANCH, LOCK, OPEN, SESSION, observe_diffusers, own_session, reset
from .notices import Notices
from .stats import Stats, Stopwatch


def current_session() -> Session | None:
    """The session that a call here belongs to, if any. Where one is open elsewhere only, that is said once."""
    session = own_session()
    if session is None and OPEN:
        for other in list(OPEN):
            other.notices.foreign_call()
    assert session is None or isinstance(session, Session)
    return session


class Session:
    """Use it as a context manager; see `session`."""

    def __init__(
        self,
        plans: Plan | Sequence[Plan],
        *,
        strict: bool = False,
        check_finite: bool = True,
        record: bool = False,
        memory_of: Record | None = None,
    ) -> None:
        self.plans = checked_plans(plans)
        self.memory = memory_of
        self.record = self._new_record() if record else None
        self.restorers = tuple(Restorer(~plan.active_mask) for plan in self.plans)
        if memory_of is not None:
            self._check_memory(memory_of)
            self.plans = (memory_of.known_to(self.plan),)
        self.check_finite = check_finite
        self.stats, self.notices = Stats(), Notices(strict)
        self.is_open = False
        self._models: Any = WeakIdKeyDictionary()
        self.parallel = current_parallel()
        if self.parallel is not None and (record or memory_of is not None):
            raise SessionError("a record is of one process: edit it outside hetcache.parallel")
        self.agreement = Agreement(self.parallel)
        self._indices: dict[tuple[str, torch.device, int], torch.Tensor] = {}
        self.form_options = self.plan.form_options
        self.route_key = (
            self.form_options, self.plan.weights.size > 0, len(self.plans), tuple(self.plan.token_inputs.items()),
            self.ranks, self.hoists,
        )  # fmt: skip
        times = self.plan.timesteps
        self._timeline = Timeline(times, self.plan.sigmas) if times.size else None

    def _new_record(self) -> Record:
        if len(self.plans) > 1:
            raise SessionError("a record is of one mask: open a session with one plan")
        check_recordable(self.plan)
        return Record(self.plan)

    def _check_memory(self, memory: Record) -> None:
        if self.record is not None:
            raise SessionError("an edit from memory has no FULL steps to record: give record or memory_of")
        if len(self.plans) > 1:
            raise SessionError("a record is of one mask: open a session with one plan")
        memory.check_plan(self.plan)

    @property
    def plan(self) -> Plan:
        """The first plan: all agree in their steps, grid and budgets."""
        return self.plans[0]

    @property
    def ranks(self) -> Ranks | None:
        """The processes that share the rows of each form, if several do."""
        return None if self.parallel is None else self.parallel.rows

    @property
    def shares(self) -> bool:
        """Whether calls at a FULL step may read the keys and values that another one computed.

        A record needs those of each call. Processes that share guidance have only their own, and those that share rows
        are kept like them.
        """
        alone = self.record is None and self.memory is None and self.parallel is None
        return bool(self.plan.shared_context) and alone

    @property
    def hoists(self) -> bool:
        """Whether keys and values that no step changes are kept beside the cache, on the device. (The samples of a
        batch that has several plans would share them.)"""
        return len(self.plans) == 1 and self.plan.cache_device != "cpu"

    # Opening and closing

    def __enter__(self) -> Session:
        if own_session() is not None:
            raise SessionError("a session is open already: close it before you open another")
        if self.is_open:
            raise SessionError("this session is open in another thread or context: use `with session.joined():` there")
        self.agreement.on_plans(self.plans)
        observe_diffusers()
        self.is_open = True
        SESSION.set(weakref.ref(self))
        with LOCK:
            OPEN.add(self)
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        """Close it, from whatever thread or context: a closed session is nobody's."""
        self.is_open = False
        with LOCK:
            OPEN.discard(self)
        reference = SESSION.get()
        if reference is not None and reference() is self:
            SESSION.set(None)
        if self.record is not None:
            for device in {device for _, device, _ in self._indices if device.type == "cuda"}:
                torch.cuda.synchronize(device)  # copies to the host may be under way
        for model in list(self._models.values()):
            model.release()
        self._models = WeakIdKeyDictionary()
        self.agreement.close(whole=kind is None)
        if kind is None:
            self.notices.closing(self.plan, self.stats, shares=self.shares)

    @contextlib.contextmanager
    def joined(self) -> Iterator[Session]:
        """Use the session in another thread or context than the one that opened it: an executor, a generator's next."""
        if not self.is_open:
            raise SessionError("this session is not open")
        token = SESSION.set(weakref.ref(self))
        try:
            yield self
        finally:
            reset(SESSION, token)

    def restart(self) -> None:
        """Begin an edit anew with the next call, as happens by itself where time starts over. Memory is kept for it."""
        for model in list(self._models.values()):
            model.restart()

    def restart_model(self, module: torch.nn.Module) -> None:
        """The next call of one model begins an edit. The others go on."""
        parameters = {id(parameter) for parameter in module.parameters()}
        for known, model in list(self._models.items()):
            if known is module or id(known) in parameters:
                model.restart()

    def release(self) -> None:
        """Give the memory of all caches back now. The next call is FULL."""
        for model in list(self._models.values()):
            self.stats.cache_bytes -= model.release()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the branch of the calls inside, where a hand-written loop makes several calls a step."""
        token = BRANCH.set(name)
        try:
            yield
        finally:
            reset(BRANCH, token)

    # Calls

    def begin(self, call: Call) -> Turn:
        """What a call is. Nothing counts until `finish`: a call that fails may be made again.

        Raises:
            SessionError: the call fits nothing in the plan, and the session is strict.
            RecordError: the call needs what was not recorded.
        """
        model = self._models.get(call.model)
        if model is None:
            model = self._models[call.model] = Model()
        name = BRANCH.get()
        track = model.tracks.get(name)
        if track is None:
            timeline = None if call.time is None else self._timeline
            track = model.tracks[name] = Track(name, Clock(len(self.plan.steps), timeline))
        reading = track.read(call.time, call.latents, call.conditions)
        if reading.restarts:
            model.restart()
        elif track.is_left_over(reading):
            model.restart()
            reading = track.read(call.time, call.latents, call.conditions)
        if not reading.fits:
            self.notices.unplanned(self.plan, reading.step, call.time if self._timeline is not None else None)
        track.invalidate_if_doubtful(reading)
        branch, changed = track.branch_of(reading, call.conditions)
        if branch.number is None:
            branch.number = sum(other.number is not None for other in model.branches())
        step = reading.step
        planned = StepKind.FULL if step is None else self.plan.steps[step]
        weights = call.weights(planned is not StepKind.REUSE)
        continues = branch.is_valid(call.owner, weights) and not changed and not branch.is_left(step)
        follows = continues and reading.fits and (branch.step is None or step is None or step - branch.step <= 1)
        kind = planned if follows else StepKind.FULL
        recorded = None
        if self.memory is not None and step is not None and reading.fits and kind is not StepKind.REUSE:
            recorded = self._recalled(self.memory, model.key(call, weights, track, branch), track, branch, step)
        weighed_as = kind
        if recorded is not None:
            if self.corrects:
                branch.compare(recorded.conditions, call.conditions)
            kind = StepKind.FULL if branch.has_other_text and branch.correction is None else StepKind.PARTIAL
            weighed_as = kind if planned is StepKind.REUSE else planned
        lender = None
        again = name is not None and reading.place > 0  # two calls under one name are no guidance
        if kind is StepKind.FULL and step is not None and reading.fits and call.can_share and self.shares and not again:
            lender = model.lender(call, weights, branch, step)
            kind = kind if lender is None else StepKind.PARTIAL
        self._free_idle_models(model, step)
        model.calls += 1
        fresh = not continues
        return Turn(kind, step, branch, fresh, weights, recorded, weighed_as, lender, reading, model, track, changed)

    @property
    def corrects(self) -> bool:
        """Whether what is read from memory can be corrected: centroids that each step draws anew cannot."""
        options = self.plan.form_options
        return not (options.merges and options.merging == "kmeans")

    def _recalled(self, memory: Record, key: BranchKey, track: Track, branch: Branch, step: int) -> RecordedStep | None:
        """The step as it was recorded of a branch, if it was."""
        calls = memory.calls_of(key)
        if key.name is None and not key.place and track.calls == 1 and len(track.last_branches) < memory.places(key):
            raise RecordError(
                f"{memory.places(key)} calls at each time were recorded, and this edit makes "
                f"{len(track.last_branches)}: edit with the guidance of the recorded edit"
            )
        if step not in calls.steps:
            if self.plan.steps[step] is StepKind.FULL:
                raise RecordError(f"step {step} is FULL in the plan, and was not recorded of all calls: record it anew")
            return None
        if calls not in branch.seen and step != calls.first:
            raise RecordError(f"the recorded calls begin at step {calls.first}, and those of this edit at step {step}")
        return RecordedStep(calls, step)

    def records(self, turn: Turn) -> bool:
        """Whether the cache that a step left is recorded."""
        return self.record is not None and turn.kind is StepKind.FULL and turn.reading.fits and turn.step is not None

    def recorded(
        self, turn: Turn, call: Call, inputs: Callable[[], Tensors], settings: Tensors, tensors: Tensors
    ) -> None:
        """A FULL step left its cache for the record."""
        assert self.record is not None
        assert turn.step is not None
        key = turn.model.key(call, turn.weights, turn.track, turn.branch)
        if key not in self.record.branches:
            steps = self.plan.steps.count(StepKind.FULL)
            self.stats.record_bytes += steps * sum(tensor.nbytes for tensor in tensors.values())
        self.record.add(key, turn.step, inputs, call.conditions, settings, tensors)

    def begun_full(self, turn: Turn) -> None:
        """A FULL step, or what stands for one, is about to overwrite the cache: an error must not leave half of one."""
        turn.branch.owner = None
        turn.branch.lender = turn.lender
        for other in turn.model.branches() if turn.lender is not None else ():
            if other.lender is turn.branch:  # or it would keep what is given back here
                other.invalidate()
                other.give_back()

    def finish(self, turn: Turn, call: Call, watch: Stopwatch, compile_seconds: float) -> None:
        """The call was made."""
        branch, track = turn.branch, turn.track
        if turn.kind is StepKind.FULL or turn.recalls or turn.lender is not None:
            branch.owner, branch.weights = call.owner, turn.weights
        if turn.kind is StepKind.FULL and self.shares:
            branch.fill(turn.step, call.known)
        branch.step = turn.reading.last_step
        if track.name is None:
            branch.keep(call.conditions, turn.changed)
        track.advance(turn.reading, branch, call.latents, call.conditions)
        track.others = {other: other.all_calls for other in turn.model.tracks.values() if other is not track}
        stats = self.stats
        stats.kinds.append(turn.kind)
        stats.watches.append(watch)
        stats.compile_seconds += compile_seconds
        stats.recalled += turn.recalls
        stats.shared += turn.lender is not None
        if not turn.reading.fits:
            stats.unplanned += 1

    def allocated(self, num_bytes: int) -> None:
        """A cache has grown by so many bytes, or shrunk."""
        self.stats.cache_bytes += num_bytes

    def _free_idle_models(self, model: Model, step: int | None) -> None:
        """A model has no more steps in this edit, such as an expert, that made no call during a whole step of another
        one. Where that one only begins, it needs the memory now (see `Model.follows`)."""
        before, model.step = model.step, step
        if step == before:
            return
        model.num_steps += 1
        others = [other for other in self._models.values() if other is not model]
        for other in others:
            begins = before is None and step is not None
            if model.calls_of_others.get(other) == other.calls or (begins and model.follows(other, step or 0)):
                self.stats.cache_bytes -= other.release()
                other.was_followed = True
        model.calls_of_others = {other: other.calls for other in others}

    def index(
        self, name: str, device: torch.device, number: int = 0, *, kind: StepKind | None = None, step: int | None = None
    ) -> torch.Tensor:
        """What a form takes of plan `number`, on a device, copied there once.

        Args:
            name: such as `active_index`; `step_weights` are those of step `step`, unless it is of another kind than
                planned.
            device: where the form runs.
            number: of the plan.
            kind: of the step.
            step: its number; None where the plan does not know it.
        """
        plan = self.plans[number]
        if name == STEP_WEIGHTS and plan.weights.size and step is not None and kind is plan.steps[step]:
            return self._on_device("weights", device, number)[step]
        return self._on_device(name, device, number)

    def _on_device(self, name: str, device: torch.device, number: int) -> torch.Tensor:
        key = (name, device, number)
        if key not in self._indices:
            self._indices[key] = torch.as_tensor(getattr(self.plans[number], name), device=device)
        return self._indices[key]


def session(
    plan: Plan | Sequence[Plan],
    *,
    strict: bool = False,
    check_finite: bool = True,
    record: bool = False,
    memory_of: Record | None = None,
) -> Session:
    """Open a session: inside it, models compiled with `hetcache_backend` follow the plan.

    A call's step is the one that has its time. A call at a time that the plan does not know, or out of order, is FULL,
    counted in `stats.unplanned`, and warned of once. An edit begins where time starts over, and where diffusers says
    that a pipeline has ended.

    Args:
        plan: what each step computes; or several plans, for batches whose samples have masks of their own. With P of
            them, sample i of a batch follows plan `i % P`, so that guidance may put two batches of P samples into one
            call (`torch.cat([uncond, cond])`). They must agree in grid, budgets, extrapolation and steps.
        strict: raise `SessionError` in place of every warning: where a call fits nothing in the plan, where a model
            cannot be cached, and where no model followed the plan at all. That nothing shared its context, or that a
            cache went to the host's memory, is warned of nevertheless.
        check_finite: raise `NonFiniteError` when a FULL step gets latents with NaN or infinity (one small
            reduction and one wait for the device in each FULL step).
        record: keep the cache after each FULL step, on the host, for later edits of the same clip: `session.record`.
            `stats.record_bytes` says from the first step on how much memory that takes.
        memory_of: what an earlier edit of the clip left. Steps that were recorded read their own cache and compute the
            active tokens only, so that no step is FULL, but for the first one of a branch that has another text
            (docs/second-edit.md).

    Raises:
        RecordError: the plan cannot be followed from the record. What only the calls show, such as another clip, other
            weights or other noise outside the mask, raises it there.

    Example:
        >>> with hetcache.session(plan) as session:  # doctest: +SKIP
        ...     frames = pipe(...).frames
        >>> session.stats.steps  # doctest: +SKIP
        {'FULL': 6, 'PARTIAL': 4, 'REUSE': 10}
    """
    return Session(plan, strict=strict, check_finite=check_finite, record=record, memory_of=memory_of)


ALIKE = ("steps", "token_inputs", "cache_device", "shared_context")
"""What plans of one batch share, beside what their forms know of them."""


def checked_plans(plans: Plan | Sequence[Plan]) -> tuple[Plan, ...]:
    """One plan or several, as a tuple.

    Raises:
        SessionError: there is none, or they need forms or steps of their own.
    """
    if isinstance(plans, Plan):
        return (plans,)
    if not plans:
        raise SessionError("a session needs at least one plan")
    first, *rest = plans
    for number, plan in enumerate(rest, start=1):
        different = first.form_options.differences(plan.form_options)
        different = different or next((name for name in ALIKE if getattr(first, name) != getattr(plan, name)), "")
        if different:
            raise SessionError(f"the plans of a batch must be alike, but plans 0 and {number} differ in {different}")
    return tuple(plans)
