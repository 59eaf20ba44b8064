"""Nodes for ComfyUI. A folder in `custom_nodes` with `from hetcache_compile.comfyui import *` in it loads them.

Nothing of ComfyUI is imported before a node is used, and no file of it is changed.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
