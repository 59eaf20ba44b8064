"""Token-partitioned caching for diffusion transformers, as a compiler pass.

import hetcache_compile as hetcache

pipe.transformer = torch.compile(pipe.transformer, backend=hetcache.hetcache_backend)
plan = hetcache.plan_for(pipe, mask=mask, height=480, width=832, num_frames=81)
with hetcache.session(plan) as session:
    frames = pipe(...).frames
"""

from .calibration.calibration import Calibration
from .capture.rewrite import Forms, rewrite
from .compilation.artefact import load_compiled, saving_compiled
from .errors import (
    CalibrationError,
    CompiledError,
    GridMismatchError,
    HetCacheError,
    HetCacheWarning,
    InputFileError,
    MaskError,
    MissingExtraError,
    NonFiniteError,
    OutputFileError,
    ParallelError,
    PlanError,
    PlanFileError,
    RecordError,
    RecordFileError,
    Refusal,
    SessionError,
    UnsupportedGraphError,
)
from .passes.rules.table import register_attention
from .pipelines.look_ahead import LookAhead
from .pipelines.planning import plan_for
from .plan.mask import to_mask
from .plan.partition import TokenKind
from .plan.plan import Plan
from .plan.schedule import PRESETS, StepKind
from .provenance import __version__ as __version__
from .ranks.parallel import parallel
from .record.record import Record
from .runtime.backend import hetcache_backend
from .sessions.session import Session, session

__all__ = [
    "PRESETS",
    "Calibration",
    "CalibrationError",
    "CompiledError",
    "Forms",
    "GridMismatchError",
    "HetCacheError",
    "HetCacheWarning",
    "InputFileError",
    "LookAhead",
    "MaskError",
    "MissingExtraError",
    "NonFiniteError",
    "OutputFileError",
    "ParallelError",
    "Plan",
    "PlanError",
    "PlanFileError",
    "Record",
    "RecordError",
    "RecordFileError",
    "Refusal",
    "Session",
    "SessionError",
    "StepKind",
    "TokenKind",
    "UnsupportedGraphError",
    "hetcache_backend",
    "load_compiled",
    "parallel",
    "plan_for",
    "register_attention",
    "rewrite",
    "saving_compiled",
    "session",
    "to_mask",
]
