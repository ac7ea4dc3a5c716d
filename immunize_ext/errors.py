"""The exceptions and warnings that immunize_ext raises beyond ``ValueError``.

Each one derives from the class that callers already catch for this kind of failure.
"""

from collections.abc import Sequence

import torch


class NotPositiveDefiniteError(torch.linalg.LinAlgError):  # type: ignore[name-defined]
    """A matrix that must be positive definite is not.

    Attributes:
        batch_index: Position of the first such matrix in the batch; ``()`` for a single matrix.
        rank: Its numerical rank, or ``None`` where it was not determined.
        needed_ridge: The smallest ridge, absolute, that would make it numerically positive
            definite, or ``None`` where it was not determined.

    Example:
        >>> error = NotPositiveDefiniteError.for_matrix(
        ...     "from_embeddings", "Q", dim=8, rank=5, needed_ridge=1e-9
        ... )
        >>> print(error)
        from_embeddings: Q must be positive definite, got rank 5 of 8; use a ridge of at least 1e-09
        >>> error.rank
        5
    """

    def __init__(
        self,
        message: str,
        *,
        batch_index: tuple[int, ...] = (),
        rank: int | None = None,
        needed_ridge: float | None = None,
    ) -> None:
        super().__init__(message)
        self.batch_index = batch_index
        self.rank = rank
        self.needed_ridge = needed_ridge

    @classmethod
    def for_matrix(
        cls,
        function: str,
        argument: str,
        *,
        dim: int,
        batch_index: tuple[int, ...] = (),
        rank: int | None = None,
        needed_ridge: float | None = None,
    ) -> "NotPositiveDefiniteError":
        """Build the error with its message from the facts.

        Args:
            function: The function that refuses.
            argument: Its argument, or the matrix made of it.
            dim: Number of rows of the matrix.
            batch_index: Position of the matrix in the batch; ``()`` for a single matrix.
            rank: Its numerical rank.
            needed_ridge: The smallest absolute ridge that would do.

        Returns:
            The error, to be raised.
        """
        where = f" at batch index {batch_index}" if batch_index else ""
        got = "an indefinite or singular matrix" if rank is None else f"rank {rank} of {dim}"
        ridge = "add a ridge"
        if needed_ridge is not None:
            ridge = f"use a ridge of at least {needed_ridge:.3g}"
        return cls(
            f"{function}: {argument} must be positive definite, got {got}{where}; {ridge}",
            batch_index=batch_index,
            rank=rank,
            needed_ridge=needed_ridge,
        )


class ContradictoryTargetsError(ValueError):
    """The same embedding is asked to map to two different values.

    Attributes:
        rows: Rows of the stacked concept embeddings that contradict each other.
        names: Names of the concepts these rows belong to, without repetition.

    Example:
        >>> error = ContradictoryTargetsError.for_rows(
        ...     "merge_kv", rows=(0, 7), names=("cat", "dog", "cat")
        ... )
        >>> print(str(error).split(", got ")[1])
        rows 0, 7 of concepts cat, dog; use contradictions="average" or a finite hardness
        >>> error.names
        ('cat', 'dog')
    """

    def __init__(
        self, message: str, *, rows: Sequence[int] = (), names: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.rows = tuple(rows)
        self.names = tuple(dict.fromkeys(names))

    @classmethod
    def for_rows(
        cls, function: str, *, rows: Sequence[int], names: Sequence[str]
    ) -> "ContradictoryTargetsError":
        """Build the error with its message from the rows and the concepts they belong to.

        Args:
            function: The function that refuses.
            rows: Rows of the stacked concept embeddings.
            names: Names of their concepts; repetitions are dropped.

        Returns:
            The error, to be raised.
        """
        listed = ", ".join(str(row) for row in rows)
        concepts = ", ".join(dict.fromkeys(names))
        return cls(
            f"{function}: embeddings must not ask one token for different values, got rows "
            f'{listed} of concepts {concepts}; use contradictions="average" or a finite hardness',
            rows=rows,
            names=names,
        )


class EqualSingularValuesError(ValueError):
    """Singular values are equal, where the function asked for has no value.

    R_ill(S) = 1/D with D = |S|_F^2/(2k) - sigma_min^2/2 has none at D = 0, where all are equal; the
    best approximation of rank r is not one where the values r and r + 1 are.

    Attributes:
        batch_index: Position of the first such matrix in the batch; ``()`` for a single matrix.

    Example:
        >>> error = EqualSingularValuesError.for_matrix("r_ill", "s", batch_index=(2,))
        >>> print(str(error).split(";")[0])
        r_ill: s must have singular values that differ, got all of them equal at batch index (2,)
    """

    def __init__(self, message: str, *, batch_index: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.batch_index = batch_index

    @classmethod
    def for_matrix(
        cls, function: str, argument: str, *, batch_index: tuple[int, ...] = ()
    ) -> "EqualSingularValuesError":
        """Build the error with its message.

        Args:
            function: The function that refuses.
            argument: Its argument.
            batch_index: Position of the matrix in the batch; ``()`` for a single matrix.

        Returns:
            The error, to be raised.
        """
        where = f" at batch index {batch_index}" if batch_index else ""
        return cls(
            f"{function}: {argument} must have singular values that differ, got all of them "
            f"equal{where}; start from another matrix or use log_condition_number",
            batch_index=batch_index,
        )

    @classmethod
    def at_cut(cls, function: str, argument: str, rank: int) -> "EqualSingularValuesError":
        """Build the error about a truncation that cuts through equal values.

        Args:
            function: The function that refuses.
            argument: Its argument, or the matrix made of it.
            rank: The rank to be kept.

        Returns:
            The error, to be raised.
        """
        return cls(
            f"{function}: {argument} must have different singular values {rank} and {rank + 1}, "
            "got equal ones: many adapters are the best; take another rank"
        )


class NegativeCurvatureError(torch.linalg.LinAlgError):  # type: ignore[name-defined]
    """A system I + gamma A that must be positive definite curves down in some direction.

    Attributes:
        curvature: p^T (I + gamma A) p / p^T p of the direction p that was met, at most 0.
        products: Products with A until then.

    Example:
        >>> error = NegativeCurvatureError.along("solve", -0.5, gamma=3.0, products=1)
        >>> error.curvature
        -0.5
    """

    def __init__(self, message: str, *, curvature: float = 0.0, products: int = 0) -> None:
        super().__init__(message)
        self.curvature = curvature
        self.products = products

    @classmethod
    def along(
        cls, function: str, curvature: float, *, gamma: float, products: int
    ) -> "NegativeCurvatureError":
        """Build the error with its message from the facts.

        Args:
            function: The function that refuses.
            curvature: Of the direction, per unit of length.
            gamma: Factor of A.
            products: Products with A until then.

        Returns:
            The error, to be raised.
        """
        return cls(
            f"{function}: I + gamma A must be positive definite, got curvature {curvature:.3g} "
            f"with gamma = {gamma:.3g} after {products} products; lower gamma, or take the "
            "Gauss-Newton matrix for A",
            curvature=curvature,
            products=products,
        )


class NotConvergedError(torch.linalg.LinAlgError):  # type: ignore[name-defined]
    """An iteration ended before its result was as accurate as asked.

    Attributes:
        residual: Of the best that was found, relative to the size of the operator; ``None`` where
            nothing was.
        products: Products with the operator until then.

    Example:
        >>> error = NotConvergedError.after("search", 1e-3, rtol=1e-10, products=400)
        >>> error.products
        400
    """

    def __init__(self, message: str, *, residual: float | None = None, products: int = 0) -> None:
        super().__init__(message)
        self.residual = residual
        self.products = products

    @classmethod
    def after(
        cls, function: str, residual: float | None, *, rtol: float, products: int
    ) -> "NotConvergedError":
        """Build the error with its message from the facts.

        Args:
            function: The function that refuses.
            residual: Of the best that was found, relative.
            rtol: What was asked.
            products: Products until then.

        Returns:
            The error, to be raised.
        """
        found = "nothing" if residual is None else f"{residual:.3g}"
        return cls(
            f"{function}: residuals must fall to {rtol:.3g} of the operator, got {found} after "
            f"{products} products; raise restarts or rtol, or add a ridge to the small end",
            residual=residual,
            products=products,
        )


class NumericalWarning(UserWarning):
    """A result is right as defined, but the input makes it less accurate than usual."""


class FallbackWarning(UserWarning):
    """Operators run their torch-only route, because the compiled part is not loaded."""
