"""Property tests for differentiable linear algebra operators, ours and yours.

* ``strategies``: hypothesis strategies of inputs with a known truth (needs hypothesis; import the
  module by name).  ``samples`` builds the same from a numpy generator, without hypothesis.
* ``gradients``: is the derivative right?  Finite differences with a bound from rounding and
  curvature, closed forms, float32 against float64, double backward, forward mode.
* ``invariants``: does the operator behave?  vmap and ``torch.func``, memory layouts, independence
  of batch elements, determinism, Euler's identity, orthogonal invariance.
* ``register_profiles``: the hypothesis profiles dev, ci and nightly.

Every check raises ``AssertionError`` with the entry or direction, what was expected, what came, the
bound and why the bound is what it is.  Nothing here knows the operators of this package.

Example: a spectral norm whose backward takes one singular pair, as solvers return them.  At a
    double extreme that pair is arbitrary, and the check says so.

    >>> import torch
    >>> from immunize_ext import testing
    >>> class SpectralNorm(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, a):
    ...         u, s, vh = torch.linalg.svd(a, full_matrices=False)
    ...         ctx.save_for_backward(u[:, :1], vh[:1])
    ...         return s[0]
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         u, vh = ctx.saved_tensors
    ...         return grad * u @ vh
    >>> smooth = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> testing.check_against_finite_differences(SpectralNorm.apply, [smooth])
    >>> double = torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))
    >>> testing.check_against_finite_differences(SpectralNorm.apply, [double])
    Traceback (most recent call last):
    ...
    AssertionError: check_against_finite_differences: the derivative of the outputs along ...
"""

from immunize_ext.testing.gradients import (
    InconclusiveCheckError,
    assert_gradients_close,
    check_against_closed_form,
    check_against_finite_differences,
    check_double_backward,
    check_float32_against_float64,
    check_forward_mode,
)
from immunize_ext.testing.invariants import (
    check_batch_independence,
    check_determinism,
    check_euler_identity,
    check_layouts,
    check_orthogonal_invariance,
    check_transforms,
)
from immunize_ext.testing.layouts import FREE_LAYOUTS, LAYOUTS, GuardedTensor, guarded
from immunize_ext.testing.profiles import register_profiles
from immunize_ext.testing.samples import (
    MergeProblem,
    SpectrumSample,
    TextEmbeddings,
    matrix_from_spectrum,
    merge_problem,
    merge_problem_with_answer,
    text_embeddings,
)

__all__ = [
    "FREE_LAYOUTS",
    "LAYOUTS",
    "GuardedTensor",
    "InconclusiveCheckError",
    "MergeProblem",
    "SpectrumSample",
    "TextEmbeddings",
    "assert_gradients_close",
    "check_against_closed_form",
    "check_against_finite_differences",
    "check_batch_independence",
    "check_determinism",
    "check_double_backward",
    "check_euler_identity",
    "check_float32_against_float64",
    "check_forward_mode",
    "check_layouts",
    "check_orthogonal_invariance",
    "check_transforms",
    "guarded",
    "matrix_from_spectrum",
    "merge_problem",
    "merge_problem_with_answer",
    "register_profiles",
    "text_embeddings",
]
