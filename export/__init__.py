"""Exporters to ONNX and TensorRT, in processing order. They read the forms that `hetcache_compile.rewrite` writes.

1. `source`, `sample_call`   a model and a sample call;
2. `lower`, `dynamic`        a form in the operators that engines like, with free sizes where asked for;
3. `to_onnx`, `weights`      ONNX models with clean names, and one file for the weights they share;
4. `onnx_files`, `exporter`  the folder, its manifest and samples, all or nothing;
5. `verify`, `trt`, `serving`, `cli`  checks, engines, Triton configurations, the command line;
6. `latency`, `compare`      timing and comparing what was exported.
"""

if __name__ == "export":
    raise ImportError("import hetcache_compile.export, not export: the folder installs inside hetcache_compile")
