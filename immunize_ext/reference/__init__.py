"""Reference implementations in numpy and scipy, float64, one matrix after the other.

What the operators of this package compute, written a second time by other routes: values,
closed-form gradients, Hessian-vector products, finite differences.  The modules import nothing of
the package and no torch, so agreement means something.

* ``spectrum``, ``gram``, ``symmetric``, ``condition_numbers``: extremal singular values and
  eigenvalues, ranks, multiplicities, condition numbers.
* ``regularizers``: R_well and R_ill of a matrix and of a Gram matrix.
* ``local_control``: changes of a layer that a task does not see, and bases inside attention heads.
* ``merge``: the key/value merge by a null-space method, by its optimality system and by the
  closed form; ``merge_optimality``: objective and residuals; ``merge_gradients``: gradients by the
  closed form and by implicit differentiation.
* ``moments``: the second-moment merge by least squares, its gradients from the optimality system.
* ``merge_parts``: rows, columns and layers of a merge by trying all subsets; gates; overlap.
* ``precondition``: right multiplication by K^-1.
* ``khatri_rao``: inner products of per-sample gradients of linear layers.
* ``resolvent``: traces and energies of (A + k I)^-1.
* ``finite_differences``: central differences with an estimate of their own error.

Example:
    >>> import numpy as np
    >>> from immunize_ext import reference
    >>> float(reference.r_well(np.diag([2.0, 2.0])))
    0.0
"""

from immunize_ext.reference._merge_problem import (
    absolute_ridge,
)
from immunize_ext.reference.condition_numbers import (
    condition_number,
    condition_number_gradient,
    condition_number_hvp,
    log_condition_number,
    log_condition_number_gradient,
    log_condition_number_hvp,
)
from immunize_ext.reference.gram import (
    GramExtremes,
    GramExtremesGradient,
    gram_extremes,
    gram_extremes_gradient,
    gram_extremes_hvp,
)
from immunize_ext.reference.khatri_rao import (
    KhatriRaoGradient,
    khatri_rao_gram,
    khatri_rao_gram_gradient,
)
from immunize_ext.reference.local_control import (
    attention_gauge,
    clip_spectral_norm,
    gauss_newton_step,
    project_out,
)
from immunize_ext.reference.merge import (
    merge_formula,
    merge_kkt,
    merge_layers,
    merge_null_space,
)
from immunize_ext.reference.merge_gradients import (
    LayersGradients,
    MergeGradients,
    merge_gradient,
    merge_gradient_implicit,
    merge_layers_gradient,
)
from immunize_ext.reference.merge_optimality import (
    DeduplicatedRows,
    MergeResiduals,
    deduplicate_rows,
    merge_objective,
    merge_residuals,
)
from immunize_ext.reference.merge_parts import (
    best_columns,
    best_gates,
    best_layers,
    best_rows,
    columns_update,
    concept_overlap,
)
from immunize_ext.reference.moments import (
    MomentGradients,
    merge_moments,
    merge_moments_gradient,
)
from immunize_ext.reference.precondition import (
    preconditioned_gradient,
    preconditioned_gradient_by_qr,
)
from immunize_ext.reference.regularizers import (
    gram_r_ill,
    gram_r_ill_gradient,
    gram_r_ill_hvp,
    gram_r_well,
    gram_r_well_gradient,
    gram_r_well_hvp,
    r_ill,
    r_ill_gradient,
    r_ill_hvp,
    r_well,
    r_well_gradient,
    r_well_hvp,
)
from immunize_ext.reference.resolvent import (
    ResolventTraces,
    ResolventTracesGradient,
    resolvent_traces,
    resolvent_traces_gradient,
)
from immunize_ext.reference.spectrum import (
    SingularExtremes,
    SingularExtremesGradient,
    extremal_singular_values,
    extremal_singular_values_gradient,
    extremal_singular_values_hvp,
    singular_values,
)
from immunize_ext.reference.symmetric import (
    SymmetricExtremes,
    SymmetricExtremesGradient,
    symmetric_extremes,
    symmetric_extremes_gradient,
    symmetric_extremes_hvp,
)

__all__ = [
    "DeduplicatedRows",
    "GramExtremes",
    "GramExtremesGradient",
    "KhatriRaoGradient",
    "LayersGradients",
    "MergeGradients",
    "MergeResiduals",
    "MomentGradients",
    "ResolventTraces",
    "ResolventTracesGradient",
    "SingularExtremes",
    "SingularExtremesGradient",
    "SymmetricExtremes",
    "SymmetricExtremesGradient",
    "absolute_ridge",
    "attention_gauge",
    "best_columns",
    "best_gates",
    "best_layers",
    "best_rows",
    "clip_spectral_norm",
    "columns_update",
    "concept_overlap",
    "condition_number",
    "condition_number_gradient",
    "condition_number_hvp",
    "deduplicate_rows",
    "extremal_singular_values",
    "extremal_singular_values_gradient",
    "extremal_singular_values_hvp",
    "gauss_newton_step",
    "gram_extremes",
    "gram_extremes_gradient",
    "gram_extremes_hvp",
    "gram_r_ill",
    "gram_r_ill_gradient",
    "gram_r_ill_hvp",
    "gram_r_well",
    "gram_r_well_gradient",
    "gram_r_well_hvp",
    "khatri_rao_gram",
    "khatri_rao_gram_gradient",
    "log_condition_number",
    "log_condition_number_gradient",
    "log_condition_number_hvp",
    "merge_formula",
    "merge_gradient",
    "merge_gradient_implicit",
    "merge_kkt",
    "merge_layers",
    "merge_layers_gradient",
    "merge_moments",
    "merge_moments_gradient",
    "merge_null_space",
    "merge_objective",
    "merge_residuals",
    "preconditioned_gradient",
    "preconditioned_gradient_by_qr",
    "project_out",
    "r_ill",
    "r_ill_gradient",
    "r_ill_hvp",
    "r_well",
    "r_well_gradient",
    "r_well_hvp",
    "resolvent_traces",
    "resolvent_traces_gradient",
    "singular_values",
    "symmetric_extremes",
    "symmetric_extremes_gradient",
    "symmetric_extremes_hvp",
]
