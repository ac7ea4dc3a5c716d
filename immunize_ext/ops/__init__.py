"""Differentiable operators: spectrum, key/value merge, preconditioned gradient."""

from immunize_ext.ops import operators as operators
from immunize_ext.ops.attention_gauge import (
    AttentionLayers,
    HeadWeights,
    attention_gauge,
    balance_attention,
    find_attention,
)
from immunize_ext.ops.concept_overlap import concept_overlap
from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.gates import best_gates, gate_layers
from immunize_ext.ops.khatri_rao import KfacExtremes, kfac_extremes, khatri_rao_gram
from immunize_ext.ops.layers import convolution_matrix, map_layers
from immunize_ext.ops.local_control import (
    GaussNewtonStep,
    InputSubspace,
    clip_spectral_norm,
    gauss_newton_step,
    project_out,
)
from immunize_ext.ops.lora import MergeAdapter, as_lora, lora_state_dict, save_lora
from immunize_ext.ops.lora_change import ChangeAdapter, adapter_of_change
from immunize_ext.ops.lora_files import (
    LoraLayer,
    merge_lora_adapters,
    read_lora,
    write_lora,
)
from immunize_ext.ops.lora_merge import (
    LowRank,
    merge_adapters,
    merge_adapters_kv,
    truncate_adapter,
)
from immunize_ext.ops.merge import merge_kv
from immunize_ext.ops.merge_parts import (
    KeptPart,
    LayerChoice,
    best_layers,
    keep_columns,
    keep_rows,
    row_scores,
)
from immunize_ext.ops.merge_report import MergeReport, merge_report
from immunize_ext.ops.moment_merge import MomentFactor, merge_moments
from immunize_ext.ops.moments import (
    InputMoments,
    LayerMoments,
    collect_moments,
    factor_layers,
)
from immunize_ext.ops.operator_extremes import operator_extremes
from immunize_ext.ops.precondition import (
    PreconditionedLinear,
    Preconditioner,
    precondition_gradient,
)
from immunize_ext.ops.resolvent import ResolventTraces, resolvent_traces
from immunize_ext.ops.spectrum import (
    GramExtremes,
    SingularExtremes,
    SymmetricExtremes,
    condition_number,
    extremal_singular_values,
    gram_extremes,
    gram_log_condition_number,
    log_condition_number,
    smallest_singular_values,
    symmetric_extremes,
)
from immunize_ext.ops.streaming import StreamedGram
from immunize_ext.ops.tracker import SingularTracker, SpectrumTracker

__all__ = [
    "AttentionLayers",
    "ChangeAdapter",
    "GaussNewtonStep",
    "GramExtremes",
    "HeadWeights",
    "InputMoments",
    "InputSubspace",
    "KeptPart",
    "KfacExtremes",
    "LayerChoice",
    "LayerMoments",
    "LoraLayer",
    "LowRank",
    "MergeAdapter",
    "MergeReport",
    "MomentFactor",
    "PreconditionedLinear",
    "Preconditioner",
    "RegularizationFactor",
    "ResolventTraces",
    "SingularExtremes",
    "SingularTracker",
    "SpectrumTracker",
    "StreamedGram",
    "SymmetricExtremes",
    "adapter_of_change",
    "as_lora",
    "attention_gauge",
    "balance_attention",
    "best_gates",
    "best_layers",
    "clip_spectral_norm",
    "collect_moments",
    "concept_overlap",
    "condition_number",
    "convolution_matrix",
    "equal_diagonal_rotation",
    "extremal_singular_values",
    "factor_layers",
    "find_attention",
    "gate_layers",
    "gauss_newton_step",
    "gram_extremes",
    "gram_log_condition_number",
    "keep_columns",
    "keep_rows",
    "kfac_extremes",
    "khatri_rao_gram",
    "log_condition_number",
    "lora_state_dict",
    "map_layers",
    "merge_adapters",
    "merge_adapters_kv",
    "merge_kv",
    "merge_lora_adapters",
    "merge_moments",
    "merge_report",
    "operator_extremes",
    "precondition_gradient",
    "project_out",
    "read_lora",
    "resolvent_traces",
    "row_scores",
    "save_lora",
    "smallest_singular_values",
    "symmetric_extremes",
    "truncate_adapter",
    "write_lora",
]
