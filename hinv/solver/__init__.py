"""The fast exact solver: knows `hinv.network`, and nothing above it.

A vector's way is down this list:

`matrix`     the matrix as the rooms above see it: products, estimates, factorizations
`factor`     the symmetric elimination, stage by stage from the loss backwards: start here
`parts`      what the elimination does with each kind of stage
`symmetric`  one pivot block: Cholesky or LDL^T, inertia, determinant; `small` the same by NumPy

and beside it

`inverse`    the inverse's diagonal, blocks and trace, what it makes of the outputs, samples: of `factor` and of `dual`
`resolvent`  the elimination at a complex shift: no pivot is zero, and log det has its argument
`dual`       the Gauss-Newton matrix of few outputs, by one Cholesky of their size; `root` its factor, of one batch or many
`kept`       what a factorization keeps of its stages; `whole` one of a matrix that is formed
`sparse`     SuperLU on K, which pivots across stages
`krylov`     what one would do without the structure: dense LU, CG, MINRES
`products`   products by automatic differentiation, independent of all the above
`refine`     refinement with those products, and GMRES behind a factorization that lost digits
`estimate`   flops, seconds and bytes from shapes alone
"""
