"""Every error that a caller may want to catch. All of them say what was wrong and what to do."""

from __future__ import annotations

from .passes.ir.refusal import GridMismatchError, HetCacheError, Refusal, UnsupportedGraphError

__all__ = [
    "CalibrationError",
    "CompiledError",
    "EngineError",
    "EstimateError",
    "ExportError",
    "GridMismatchError",
    "HetCacheError",
    "HetCacheWarning",
    "InputFileError",
    "MaskError",
    "MethodError",
    "MissingExtraError",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "OutputFileError",
    "ParallelError",
    "PlanError",
    "PlanFileError",
    "RecordError",
    "RecordFileError",
    "Refusal",
    "SessionError",
    "UnsupportedGraphError",
]


class HetCacheWarning(UserWarning):
    """Something runs uncached, or otherwise than planned: slower, never wrong."""


class PlanError(HetCacheError, ValueError):
    """A plan cannot be made from these arguments."""


class MaskError(PlanError):
    """The mask has the wrong shape, is empty, or holds values that are no mask."""


class PlanFileError(HetCacheError, ValueError):
    """The file is no plan, is cut short, or was written by another version."""


class CalibrationError(HetCacheError, ValueError):
    """A calibration cannot be made, read or used for this."""


class CompiledError(HetCacheError, RuntimeError):
    """What was compiled ahead of time cannot be used here."""


class SessionError(HetCacheError, RuntimeError):
    """The calls inside a session do not fit its plan."""


class RecordError(SessionError):
    """What was recorded of one edit cannot be used for another one: something differs that would make it wrong."""


class RecordFileError(HetCacheError, ValueError):
    """The file is no record, is cut short, or was written by another version."""


class ParallelError(HetCacheError, RuntimeError):
    """The processes of one edit differ in what they were given, or one of them is gone."""


class NonFiniteError(HetCacheError, ArithmeticError):
    """The latents hold NaN or infinity; a cache made from them would spoil every later step."""


class InputFileError(HetCacheError, ValueError):
    """A video, mask or model folder cannot be read."""


class OutputFileError(HetCacheError, OSError):
    """A result cannot be written."""


class EstimateError(HetCacheError, ValueError):
    """Nothing can be estimated of this model or this GPU."""


class EngineError(HetCacheError, RuntimeError):
    """An export folder or an engine cannot be loaded or run."""


class MissingExtraError(HetCacheError, ImportError):
    """A package is missing that one of the extras installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'hetcache-compile[{extra}]'")


class MethodError(HetCacheError, RuntimeError):
    """A method of another library cannot run on this model."""


class ExportError(HetCacheError, RuntimeError):
    """The model cannot be exported, or an engine cannot be built."""


class NotEnoughMemoryError(HetCacheError, MemoryError):
    """A part of the work needs more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out.

    Python and onnx raise `MemoryError`. torch, onnxruntime and TensorRT raise errors of other kinds, and put it into
    words.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or any(words in str(chain).lower() for words in OUT_OF_MEMORY):
            return True
        chain = chain.__cause__
    return False


OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
)
"""How libraries say it."""
