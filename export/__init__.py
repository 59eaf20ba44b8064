"""Where the ONNX and TensorRT exporters go. They read the forms that `hetcache_compile.rewrite` writes."""

if __name__ == "export":
    raise ImportError("import hetcache_compile.export, not export: the folder installs inside hetcache_compile")
