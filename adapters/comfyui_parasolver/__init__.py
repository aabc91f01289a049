"""Nodes for ComfyUI: copy or link this folder into ``custom_nodes``; ParaSolver itself is installed in its Python."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
