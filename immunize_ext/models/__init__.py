"""Models that operators act on: edits of their weights."""

from immunize_ext.models.weight_edit import WeightEdit, apply_edit

__all__ = ["WeightEdit", "apply_edit"]
