"""Triton Inference Server: `triton/<form>/config.pbtxt`, with the cache as Triton's implicit state.

Triton keeps the state of a sequence on the device and hands it to the next request: an output named in
`state` becomes the input of the same entry. docs/serving.md says how the forms share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..manifest import FormSpec, Manifest, TensorSpec

TRITON_FOLDER = "triton"
STATEFUL_FORMS = ("full", "partial", "reuse")


def write_triton(folder: Path, manifest: Manifest) -> Manifest:
    """One model configuration for each form; the manifest is unchanged."""
    for kind in STATEFUL_FORMS:
        path = folder / TRITON_FOLDER / kind / "config.pbtxt"
        path.parent.mkdir(parents=True)
        path.write_text(triton_config(kind, manifest))
    return manifest


def triton_config(kind: str, manifest: Manifest) -> str:
    """`config.pbtxt` of one form.

    A cache tensor that the form both reads and writes is a state of it. One that it only reads or only writes is
    a plain input or output, which shared memory passes between the forms without a copy.
    """
    form = manifest.forms[kind]
    states = states_of(form, manifest)
    hidden = {name for pair in states for name in pair}
    lines = [
        f'name: "hetcache_{kind}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{form.file}"',
        "max_batch_size: 0",
        *(_tensor("input", spec) for spec in form.inputs if spec.name not in hidden),
        *(_tensor("output", spec) for spec in form.outputs if spec.name not in hidden),
    ]
    if states:
        inputs = {spec.name: spec for spec in form.inputs}
        entries = [_state(read, written, inputs[read]) for read, written in states]
        lines.append("sequence_batching {\n  direct {}\n" + "".join(entries) + "}")
    lines.append("instance_group [ { count: 1 kind: KIND_GPU } ]")
    return "\n".join(lines) + "\n"


def states_of(form: FormSpec, manifest: Manifest) -> list[tuple[str, str]]:
    """The cache entries that a form reads and writes: input and output names."""
    inputs, outputs = ({spec.name for spec in side} for side in (form.inputs, form.outputs))
    return [(e.input, e.output) for e in manifest.cache if e.input in inputs and e.output in outputs]


def _tensor(side: str, spec: TensorSpec) -> str:
    kind = TRITON_TYPES[spec.dtype]
    return f'{side} [ {{ name: "{spec.name}" data_type: TYPE_{kind} dims: {_dims(spec.shape)} }} ]'


def _state(read: str, written: str, spec: TensorSpec) -> str:
    kind = TRITON_TYPES[spec.dtype]
    return (
        f'  state [ {{ input_name: "{read}" output_name: "{written}" '
        f"data_type: TYPE_{kind} dims: {_dims(spec.shape)} }} ]\n"
    )


def _dims(shape: Sequence[int | str]) -> str:
    return "[ " + ", ".join("-1" if isinstance(size, str) else str(size) for size in shape) + " ]"


TRITON_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
