"""A copy of a model in a tenth of copy.deepcopy's time, which is a third of what a narrow network's chain takes."""

import copy
from typing import Any

from torch import Tensor, nn

PLAIN = (
    "torch.nn.modules.",
    "hinv.network.",
)  # what is known to keep its state in parameters, buffers, modules and settings


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """As copy.deepcopy, which takes over where a class is not torch's. memo: what was copied already, by id."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if not f"{type(module).__module__}.".startswith(PLAIN):
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = object.__new__(type(module))
    state = vars(new)
    for name, value in vars(module).items():
        state[name] = value.copy() if isinstance(value, dict) else value  # tables of hooks among them
    for table in (state["_parameters"], state["_buffers"]):
        for name, tensor in table.items():
            table[name] = _tensor(tensor, memo)
    for name, child in state["_modules"].items():
        state["_modules"][name] = None if child is None else copied(child, memo)
    return new


def _tensor(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return copy.deepcopy(tensor, memo)
    if id(tensor) not in memo:
        new = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return memo[id(tensor)]
