"""Everything a run depends on, checked before anything is done."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytorch_optimizer
import torch
from torch import nn

from hinv import optim
from hinv.companion import rivals

NO_METHODS = (optim.Descent, optim.Preconditioned, optim.GradientDescent)  # what methods are made of


@dataclass(frozen=True)
class Config:
    """Everything a run depends on.

    Args:
        method: a class of `hinv.optim` ("GaussNewton", ...), of `hinv.companion.rivals` ("HessianFree", "KFAC"), of `torch.optim` ("SGD", "LBFGS", ...)
            or of pytorch-optimizer ("SOAP").
        rate: learning rate; of SGD on the direction for the classes of hinv. momentum: of SGD, theirs too.
        options: further arguments of that class, such as damping, every, clip, betas.
        schedule, schedule_options: a class of torch.optim.lr_scheduler and its arguments; stepped once a step.
        dataset, images, side, gray, normalize: as `hinv.companion.data.load` takes them; normalize=False leaves the pixels between 0 and 1. augment: random resized crops and flips. fallback: as in `load`.
        test: how many test images to validate on, 0 for none. probe: how many training images, the first of `images`.
        widths, activation, gain, bias: the network is tall_skinny((pixels, *widths, classes)) with the activation of torch.nn.
        init: "orthogonal", tall_skinny's, or "kaiming", torch's kaiming_normal_ for ReLU, as the paper's author takes it.
        batch: images a step. steps, epochs, seconds: the budget; what is used up first ends the run. seconds are those of training alone.
        target: end when the loss of a batch falls below it.
        validate_every, checkpoint_every: in steps; validation also before the first and after the last.
        seed: of the weights, the order of the images and their crops; which images are used does not depend on it.
        workers: processes that read images (results do not depend on it).
    """

    method: str = "GaussNewton"
    rate: float = 1.0
    momentum: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    images: int | None = None
    test: int = 0
    probe: int = 256
    side: int | None = None
    gray: bool = False
    normalize: bool = True
    augment: bool = False
    fallback: str | None = None
    widths: tuple[int, ...] = (24,) * 7
    activation: str = "Tanh"
    gain: float = 1.0
    bias: bool = True
    init: str = "orthogonal"
    batch: int = 64
    steps: int | None = 100
    epochs: float | None = None
    seconds: float | None = None
    target: float | None = None
    validate_every: int = 25
    checkpoint_every: int = 100
    seed: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None and self.seconds is None:
            raise ValueError("a run needs a budget: give steps, epochs or seconds")
        for name in ("batch", "probe", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', not {self.dtype!r}")
        if self.init not in ("orthogonal", "kaiming"):
            raise ValueError(f"init must be 'orthogonal' or 'kaiming', not {self.init!r}")
        if not hasattr(nn, self.activation):
            raise ValueError(f"torch.nn has no activation {self.activation!r}: use Tanh, ReLU, Sigmoid, GELU, ...")
        if self.schedule is not None and not hasattr(torch.optim.lr_scheduler, self.schedule):
            raise ValueError(f"torch.optim.lr_scheduler has no {self.schedule!r}")
        object.__setattr__(self, "widths", tuple(self.widths))
        method_class(self.method)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """A Config from names and values, as json has them.

        Raises:
            ValueError: an unknown name, with the known ones.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(repr, unknown))}: a run has {', '.join(known)}")
        return cls(**values)


def method_class(name: str) -> type[optim.Descent] | type[torch.optim.Optimizer]:
    for place in (optim, rivals):
        ours = getattr(place, name, None)
        if isinstance(ours, type) and issubclass(ours, optim.Descent) and ours not in NO_METHODS:
            return ours
    for place in (torch.optim, pytorch_optimizer):
        theirs = getattr(place, name, None)
        if isinstance(theirs, type) and issubclass(theirs, torch.optim.Optimizer):
            return theirs
    raise ValueError(
        f"unknown method {name!r}: use DampedNewton, GaussNewton, TrustRegionNewton or SaddleFreeNewton, HessianFree or KFAC, or a class of torch.optim "
        "(SGD, Adam, ...) or of pytorch-optimizer (SOAP, ...)"
    )


def descent(config: Config, model: nn.Sequential) -> optim.Descent:
    """The method of a run, on its model."""
    cls, loss, options = method_class(config.method), nn.CrossEntropyLoss(), dict(config.options)
    known = set(inspect.signature(cls).parameters) - {
        "self",
        "model",
        "loss",
        "optimizer",
        "params",
        "lr",
        "momentum",
    } | {"clip"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{config.method} has no option {', '.join(map(repr, unknown))}: it has {', '.join(sorted(known))}"
        )
    if issubclass(cls, optim.Descent):
        inner = torch.optim.SGD(model.parameters(), lr=config.rate, momentum=config.momentum)
        return cls(model, loss, inner, **options)
    clip = options.pop("clip", None)
    if config.momentum:
        if "momentum" not in inspect.signature(cls).parameters:
            raise ValueError(f"{config.method} has no momentum: leave it at 0")
        options["momentum"] = config.momentum
    if "fused" in inspect.signature(cls).parameters and not {"fused", "foreach"} & set(options):
        options["fused"] = True  # the fastest that torch has: a rival's seconds are to be its own
    make = cast(Callable[..., torch.optim.Optimizer], cls)  # torch's base class does not know lr
    return optim.GradientDescent(model, loss, make(model.parameters(), lr=config.rate, **options), clip)
