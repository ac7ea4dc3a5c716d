"""Fast, exact, differentiable linear algebra for model immunization.

``immunize_ext.ops`` holds the operators, ``immunize_ext.ops.regularizers`` their compositions.
Importing the package compiles nothing, changes no setting of torch, and never fails for lack of
the compiled part: without it the operators take a torch-only route and say so once.
"""

from immunize_ext._load import available, status
from immunize_ext._version import __version__
from immunize_ext.ops import regularizers

__all__ = ["__version__", "available", "errors", "ops", "regularizers", "status"]
