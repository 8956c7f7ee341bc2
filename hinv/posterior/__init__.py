"""What the inverse is for: knows `hinv.curvature`, and nothing above it.

`leaving_out`  what one training sample does to the loss on other data; leaving it out
`evidence`     the approximate posterior of a trained network: evidence, predictions, samples
"""

from .evidence import Laplace, laplace
from .leaving_out import influence, leave_one_out

__all__ = ["Laplace", "influence", "laplace", "leave_one_out"]
