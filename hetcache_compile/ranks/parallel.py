"""Several processes at one edit: `parallel(mesh)` says which of them share rows, and which branches of guidance.

    torchrun --nproc-per-node 8 edit.py

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("guidance", "rows"))
    with hetcache.parallel(mesh), hetcache.session(plan):
        frames = pipe(...).frames

Every process makes the same calls with the same inputs, and gets the same outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from ..errors import HetCacheError, ParallelError
from ..passes.forms.collectives import Ranks
from .context_parallel import ROWS, mesh_of
from .facts import Facts, differences

if TYPE_CHECKING:
    from diffusers import ContextParallelConfig, ParallelConfig

GUIDANCE = "guidance"
PARALLEL: ContextVar[Parallel | None] = ContextVar("hetcache_parallel", default=None)


def current_parallel() -> Parallel | None:
    """What the innermost `parallel` around this call says, if there is one."""
    return PARALLEL.get()


class Parallel:
    """The processes at one edit.

    Args:
        mesh: of one dim or two, named `rows` and `guidance`; the one dim of a mesh without names is `rows`.

    Attributes:
        rows: the processes that share the rows of each form; None if nobody does.
        guidance: those of which each computes some branches of guidance; None if nobody does.

    Raises:
        ValueError: the mesh has other dims.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        names = mesh.mesh_dim_names or ((ROWS,) if mesh.ndim == 1 else ())
        if not names or not set(names) <= {ROWS, GUIDANCE}:
            raise ValueError(
                f"a mesh has the dims 'rows', 'guidance' or both, not {mesh.mesh_dim_names or mesh.ndim}: "
                "init_device_mesh('cuda', (2, 4), mesh_dim_names=('guidance', 'rows'))"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
        self._groups = [mesh.get_group(number) for number in range(mesh.ndim)]
        for group in self._groups:
            limit_waiting(group)
        found = {
            name: Ranks(mesh.get_local_rank(number), mesh.size(number), group.group_name)
            for number, (name, group) in enumerate(zip(names, self._groups, strict=True))
        }
        self._of_rows = [group for name, group in zip(names, self._groups, strict=True) if name == ROWS]
        self.rows, self.guidance = found.get(ROWS), found.get(GUIDANCE)
        self._sent: list[torch.Tensor] = []

    def agree(self, facts: Facts, *, rows_only: bool = False) -> None:
        """Compare what this process knows with what the others do. Each of them has to call it.

        Args:
            facts: what has to be the same.
            rows_only: compare with those alone that share the rows of this process's forms.

        Raises:
            ParallelError: they differ; on every process.
        """
        known: list[Any] = [(dist.get_rank(), facts)]
        with guarded():
            for group in self._of_rows if rows_only else self._groups:
                gathered: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(gathered, known, group=group)
                known = [one for several in gathered for one in several]
        known.sort(key=lambda one: one[0])
        ranks, values = [rank for rank, _ in known], [value for _, value in known]
        if different := differences(values):
            found = "; ".join(
                f"{name}, on rank{'s' * (len(others) > 1)} {', '.join(str(ranks[n]) for n in others)}"
                for name, others in different.items()
            )
            raise ParallelError(
                f"ranks differ from rank {ranks[0]} in: {found}. Every rank needs the same weights, plan, prompt and "
                "seed (a generator of its own draws other noise on each rank: use torch.Generator('cpu').manual_seed)"
            )

    def computes(self, branch: int) -> bool:
        """Whether this process computes a branch of guidance, the first being 0."""
        return self.guidance is None or branch % self.guidance.size == self.guidance.rank

    def send(self, branch: int, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """Let the processes that do not compute a branch have its outputs."""
        if self.guidance is not None:
            self.settle()
            self._sent = [self._broadcast(branch, one) for one in outputs if isinstance(one, torch.Tensor)]
        return tuple(outputs)

    def receive(self, branch: int, like: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
        """The outputs of a branch that another process computes. They are waited for where they are used first.

        Args:
            branch: of guidance.
            like: the outputs, of which tensors may be fake.
            device: where they are computed.
        """
        return tuple(
            Awaited(self._broadcast(branch, torch.empty(one.shape, dtype=one.dtype, device=device)))
            if isinstance(one, torch.Tensor)
            else one
            for one in like
        )

    def settle(self) -> None:
        """Wait until what was sent has arrived."""
        sent, self._sent = self._sent, []
        with guarded():
            for one in sent:
                torch.ops._c10d_functional.wait_tensor(one)

    def _broadcast(self, branch: int, value: torch.Tensor) -> torch.Tensor:
        assert self.guidance is not None
        source = branch % self.guidance.size
        sent: torch.Tensor = torch.ops._c10d_functional.broadcast(value.contiguous(), source, self.guidance.group)
        return sent


def limit_waiting(group: dist.ProcessGroup) -> None:
    """Let collectives of a group wait no longer than those of all processes, for which a time-out was chosen.

    The groups of a mesh of two dims have torch's own time-out otherwise, of many minutes.
    """
    everybody = dist.group.WORLD
    if everybody is None or group is everybody:
        return
    backends = [one._get_backend(device) for one in (group, everybody) for device in one._device_types]
    times = [one.options._timeout for one in backends if hasattr(one, "options")]
    if times:
        dist.distributed_c10d._set_pg_timeout(min(times), group)


class Awaited(AsyncCollectiveTensor):
    """A tensor that is on its way: whatever is computed from it waits for it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """A view of it waits too: it would be another tensor on its way, whose errors nobody explains."""
        args, kwargs = tree_map_only(Awaited, lambda one: one.trigger_wait(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def wait(self) -> torch.Tensor:
        """The tensor, when it is here."""
        return self.trigger_wait()

    def trigger_wait(self) -> torch.Tensor:
        """The tensor, when it is here."""
        with guarded():
            value: torch.Tensor = super().trigger_wait()  # type: ignore[no-untyped-call]
        return value


@contextlib.contextmanager
def parallel(mesh: DeviceMesh | ContextParallelConfig | ParallelConfig) -> Iterator[Parallel]:
    """Share the work of the sessions that are opened inside among the processes of a mesh.

    Args:
        mesh: of one dim or two, named `rows` and `guidance`; the one dim of a mesh without names is `rows`. Processes
            along `rows` share the tokens of every step. Those along `guidance` each compute some of the calls that
            guidance makes at one time. Or what diffusers' `enable_parallelism` takes: then the processes of its ring
            and its Ulysses degree together are `rows`, and which tensors move follows from the model alone.

    Raises:
        ValueError: the mesh has other dims, or the configuration is of other processes than there are.

    Example:
        >>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("rows",))  # doctest: +SKIP
        >>> with hetcache.parallel(mesh), hetcache.session(plan):  # doctest: +SKIP
        ...     frames = pipe(...).frames
    """
    one = Parallel(mesh if isinstance(mesh, DeviceMesh) else mesh_of(mesh))
    token = PARALLEL.set(one)
    try:
        yield one
    finally:
        PARALLEL.reset(token)


@contextlib.contextmanager
def guarded(*, computes: bool = False) -> Iterator[None]:
    """Say of errors of collectives what they mean.

    Args:
        computes: whether what is inside may fail otherwise too; then errors of collectives are known by their words.

    Raises:
        ParallelError: another process ended, or did not answer within the time-out of the process group.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HetCacheError) or (computes and not _is_of_collective(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ParallelError(
            f"rank {dist.get_rank()} waited in vain for another rank, which ended or takes longer than the time-out of "
            f"init_process_group: its own error says why ({reason})"
        ) from error


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in OF_COLLECTIVES)


OF_COLLECTIVES = ("gloo", "nccl", "connection closed", "pair closure")
"""What torch's errors of collectives say, in lower case; they have no type of their own."""
