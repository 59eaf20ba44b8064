"""Exporters to ONNX and TensorRT. They read the forms that `hetcache_compile.rewrite` writes.

Folders in processing order; none imports from a later one:

1. `model`     a model, a sample call of it, and the options of an export;
2. `lowering`  a form in the operators that engines like, one pass a file, and the list of passes for each opset;
3. `onnx`      free sizes, ONNX models with clean names, one file for the weights they share, the manifest;
4. `trt`       engines;
5. `check`     comparing with torch, and timing;
6. `serving` (Triton configurations), `exporter` (the folder, all or nothing) and `cli` put them together.
"""

if __name__ == "export":
    raise ImportError("import hetcache_compile.export, not export: the folder installs inside hetcache_compile")
