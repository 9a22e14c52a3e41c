"""A parameter as the matrix that quantization sees: a row for each output, the reduction axis last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from qcompile.kernels.ops.conv import matrix_shape, rows_of, weight_of

Kind: TypeAlias = Literal["rows", "columns", "conv", "conv_transposed"]


@dataclass(frozen=True)
class Arrangement:
    """How a parameter and its matrix (or stack of matrices) are made from each other.

    ===================  =======================================  ==============================
    kind                 parameter                                matrix
    ===================  =======================================  ==============================
    ``rows``             ``[..., N, K]``, used as ``x @ W.T``     the same
    ``columns``          ``[..., K, N]``, used as ``x @ W``       ``[..., N, K]``
    ``conv``             ``[O, I/groups, *kernel]``               ``[O, I/groups * kernel]``
    ``conv_transposed``  ``[I, O/groups, *kernel]``               ``[O, I/groups * kernel]``
    ===================  =======================================  ==============================

    Attributes:
        shape: of the parameter.
        kind: one of the above.
        groups: of a convolution.
    """

    shape: tuple[int, ...]
    kind: Kind = "rows"
    groups: int = 1

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        if self.kind == "rows":
            return self.shape
        if self.kind == "columns":
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return matrix_shape(self.shape, self.kind == "conv_transposed", self.groups)

    def matrix(self, parameter: Tensor) -> Tensor:
        """The matrix of a parameter: a view where there is one."""
        if self.kind == "rows":
            return parameter
        if self.kind == "columns":
            return parameter.transpose(-1, -2)
        return rows_of(parameter, self.kind == "conv_transposed", self.groups)

    def parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        if self.kind == "rows":
            return matrix
        if self.kind == "columns":
            return matrix.transpose(-1, -2)
        return weight_of(matrix, self.shape, self.kind == "conv_transposed", self.groups)
