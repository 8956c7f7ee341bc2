"""The spectrum of a curvature matrix from its factorizations: exact counts, certified eigenvalues; exact trace, diagonal and blocks without any.

By Sylvester's law H - s I has as many negative eigenvalues as its factorization has negative pivots: one factorization in O(L) counts the
eigenvalues below s. Two counts that differ by k prove that k eigenvalues lie between; ARPACK finds them, the counts certify that none was skipped.

`counts`      how many eigenvalues lie below a shift, in the bins of a histogram; any one by bisection
`eigenpairs`  those at the ends or next to a shift, certified by counts
`diagonal`    exact trace, diagonal and blocks, in O(L)
`absolute`    (|H| + eps I)^-1 b, sign(H) b and smoothed counts, by factorizations at complex shifts
`poles`       which shifts: rational functions with their errors
`dataset`     a whole data set: products summed over a loader, solves by them, and exactly what a matrix of its parameters or outputs gives
`streamed`    how its batches are added up
`estimates`   of trace and density, where an exact answer is out of reach

Functions take an `hinv.Hessian` or `hinv.GGN`, whose methods of the same names are the usual way in. Knows `hinv.solver` and `hinv.network`.
"""

from .absolute import Absolute, PoleReport, sign, smoothed_count, smoothed_density
from .counts import count_below, counts, eigval
from .dataset import DataGGN, DataHessian
from .diagonal import Block, block, blocks, by_stage, diagonal
from .eigenpairs import Eigenpairs, find
from .estimates import TraceEstimate

__all__ = [
    "Absolute",
    "Block",
    "DataGGN",
    "DataHessian",
    "Eigenpairs",
    "PoleReport",
    "TraceEstimate",
    "block",
    "blocks",
    "by_stage",
    "count_below",
    "counts",
    "diagonal",
    "eigval",
    "find",
    "sign",
    "smoothed_count",
    "smoothed_density",
]
