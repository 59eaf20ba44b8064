"""Run the forms of an export folder on the tensors' own memory: nothing is copied in or out.

A runner takes torch tensors and hands their addresses to the engine. So a buffer that `full` writes is the very
memory that `partial` reads, on a CPU and on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import EngineError, MissingExtraError
from .manifest import FormSpec, Manifest

Tensors = Mapping[str, torch.Tensor]


class Runner(Protocol):
    """Forms that can be run on one device."""

    device: torch.device
    name: str
    """What really runs the forms: asked from the engine, not repeated from the user."""

    def prepare(self, kind: str) -> Callable[[Tensors, Tensors], None]:
        """Load a form; the result runs it on `(inputs, outputs)`, by name. Loaded once."""


class OrtRunner:
    """onnxruntime, with IO binding."""

    def __init__(self, folder: Path, manifest: Manifest, provider: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "ort" if provider == "ort-cpu" else "ort-gpu") from error
        self.ort, self.folder, self.manifest = onnxruntime, folder, manifest
        self.provider = ORT_PROVIDERS[provider]
        if self.provider not in onnxruntime.get_available_providers():
            raise EngineError(
                f"{provider} needs onnxruntime's {self.provider}, this one has "
                f"{', '.join(onnxruntime.get_available_providers())}: pip uninstall onnxruntime, then "
                "pip install 'hetcache-compile[ort-gpu]'"
            )
        self.device = torch.device("cpu" if provider == "ort-cpu" else "cuda")
        self.name = f"onnxruntime {onnxruntime.__version__} {self.provider}"
        self._loaded: dict[str, Callable[[Tensors, Tensors], None]] = {}

    def prepare(self, kind: str) -> Callable[[Tensors, Tensors], None]:
        """An onnxruntime session for the form.

        Raises:
            EngineError: the form cannot be loaded, or another provider than the one asked for would run it.
        """
        if kind not in self._loaded:
            form = form_of(self.manifest, kind)
            options = self.ort.SessionOptions()
            options.log_severity_level = 3
            try:
                session = self.ort.InferenceSession(self.folder / form.file, options, providers=[self.provider])
            except Exception as error:  # onnxruntime raises classes of its own, one for each status
                raise EngineError(f"onnxruntime cannot load {form.file}: {str(error).splitlines()[0]}") from error
            session.disable_fallback()
            if session.get_providers()[0] != self.provider:
                raise EngineError(
                    f"{form.file} would run on {session.get_providers()[0]}, not on {self.provider}: "
                    "onnxruntime found no working CUDA"
                )
            self._loaded[kind] = self._bound(session)
        return self._loaded[kind]

    def _bound(self, session: Any) -> Callable[[Tensors, Tensors], None]:
        def run(inputs: Tensors, outputs: Tensors) -> None:
            binding = session.io_binding()
            place = (self.device.type, self.device.index or 0)
            for name, tensor in inputs.items():
                binding.bind_input(name, *place, ORT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
            for name, tensor in outputs.items():
                binding.bind_output(name, *place, ORT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # onnxruntime has a stream of its own
            session.run_with_iobinding(binding)

        return run


class TensorRTRunner:
    """TensorRT, or TensorRT for RTX, through its Python API on torch's current CUDA stream."""

    def __init__(self, folder: Path, manifest: Manifest, provider: str) -> None:
        self.folder, self.manifest = folder, manifest
        self.kind, module, extra = TENSORRT_PROVIDERS[provider]
        if self.kind not in manifest.engines:
            raise EngineError(
                f"{folder} holds no {self.kind} engines: export it with hetcache-export --trt={self.kind}"
            )
        self.trt = import_tensorrt(module, extra)
        if not torch.cuda.is_available():
            raise EngineError(f"{provider} needs an NVIDIA GPU with a driver, and torch finds none")
        self.device = torch.device("cuda")
        self.name = f"{module} {self.trt.__version__}"
        self._runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        self._loaded: dict[str, Callable[[Tensors, Tensors], None]] = {}

    def prepare(self, kind: str) -> Callable[[Tensors, Tensors], None]:
        """An execution context for the form's engine.

        Raises:
            EngineError: the engine was made for another GPU or version, or its inputs are not the manifest's.
        """
        if kind not in self._loaded:
            file = self.manifest.engines[self.kind].forms[kind].file
            engine = self._runtime.deserialize_cuda_engine((self.folder / file).read_bytes())
            if engine is None:
                capability = ".".join(map(str, torch.cuda.get_device_capability()))
                raise EngineError(f"{file} does not load on this GPU (compute capability {capability}): build it anew")
            form = form_of(self.manifest, kind)
            names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
            expected = [spec.name for spec in (*form.inputs, *form.outputs)]
            if sorted(names) != sorted(expected):
                raise EngineError(f"{file} has other inputs and outputs than the manifest: build it anew")
            self._loaded[kind] = self._bound(engine.create_execution_context(), file)
        return self._loaded[kind]

    def _bound(self, context: Any, file: str) -> Callable[[Tensors, Tensors], None]:
        def run(inputs: Tensors, outputs: Tensors) -> None:
            for name, tensor in inputs.items():
                context.set_input_shape(name, tuple(tensor.shape))
            for name, tensor in (*inputs.items(), *outputs.items()):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise EngineError(f"{file} failed to run; TensorRT's log says why")

        return run


def form_of(manifest: Manifest, kind: str) -> FormSpec:
    """A form of the manifest.

    Raises:
        EngineError: it was not exported.
    """
    if kind not in manifest.forms:
        raise EngineError(f"the export has no form {kind!r}, only {', '.join(manifest.forms)}")
    return manifest.forms[kind]


def import_tensorrt(module: str, extra: str) -> Any:
    """`tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingExtraError: not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module, extra) from error


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver: without one engines can be built, but not run."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


ORT_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
TENSORRT_PROVIDERS = {
    "tensorrt": ("tensorrt", "tensorrt", "trt"),
    "tensorrt-rtx": ("rtx", "tensorrt_rtx", "trt-rtx"),
}
"""The kind of engine, the Python module and the extra of each provider."""

RUNNERS: dict[str, Callable[[Path, Manifest, str], Runner]] = {
    **dict.fromkeys(ORT_PROVIDERS, OrtRunner),
    **dict.fromkeys(TENSORRT_PROVIDERS, TensorRTRunner),
}
"""What runs each provider."""

ORT_TYPES = {
    torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bool: 9, torch.int32: 6, torch.bfloat16: 16,
    torch.int8: 3,
}  # fmt: skip
"""ONNX's numbers of element types (`TensorProto.DataType`)."""
