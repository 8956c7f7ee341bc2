"""The images of a run, and which of them each step sees: a function of the seed and the number of the step alone."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hinv import ranks
from hinv.companion import data
from hinv.shapes import Float, Int

from .config import Config

Batch = tuple[Float[Tensor, "B ..."], Int[Tensor, " B"]]


@dataclass
class RunImages:
    train: data.Stack | data.Crops
    probe: tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]
    test: tuple[Float[Tensor, "m ..."], Int[Tensor, " m"]] | None
    classes: int
    name: str


@functools.lru_cache(maxsize=12)
def _loaded(**arguments: Any) -> data.Images:
    return data.load(**arguments)


@functools.lru_cache(maxsize=2)
def _crops(
    name: str,
    fallback: str | None,
    n: int | None,
    side: int,
    gray: bool,
    dtype: torch.dtype,
    probe: int,
    seed: int,
) -> tuple[data.Crops, data.Images]:
    """Crops, and the images whose mean and variance they have. Kept, so that the runs of a sweep read and cut each picture once."""
    source = data.source(name, fallback=fallback, n=n)
    few = min(len(source.y), max(probe, 1000))
    sample = _loaded(name=name, fallback=fallback, gray=gray, side=side, dtype=dtype, n=few, normalize=True)
    return data.Crops(source, side, gray, sample.mean, sample.std, dtype, seed), sample


def images(config: Config) -> RunImages:
    """Training, probe and test images, normalized by the mean and variance of the training images' channels (of a sample of them under augmentation)."""
    dtype, side = getattr(torch, config.dtype), config.side
    where = {"name": config.dataset, "fallback": config.fallback}  # the same images for every seed
    how = where | {"gray": config.gray, "side": side, "dtype": dtype}
    if config.augment:
        if side is None:
            raise ValueError("random crops need side=, the size they are resized to")
        if not config.normalize:
            raise ValueError("random crops are normalized: leave normalize at True, or augment at False")
        train, sample = _crops(
            where["name"], where["fallback"], config.images, side, config.gray, dtype, config.probe, config.seed
        )
    else:
        sample = _loaded(**how, n=config.images, normalize=config.normalize)
        train = data.Stack(sample.x, sample.y)
    if config.batch > len(train):
        raise ValueError(f"a batch of {config.batch} from {len(train)} images of {sample.name}: use a smaller batch")
    test = None
    if config.test:
        others = _loaded(**how, split="test", n=config.test)
        test = (others.x - sample.mean[:, None, None]) / sample.std[:, None, None], others.y
    return RunImages(
        train, (sample.x[: config.probe], sample.y[: config.probe]), test, len(sample.classes), sample.name
    )


class Batches:
    """Keys (epoch, number) of the batch of every step from `start` on, without end: a permutation for each epoch, seeded by it.

    Of several processes each has every n-th image of a batch.
    """

    def __init__(self, n: int, batch: int, seed: int, start: int):
        self.n, self.batch, self.seed, self.start = n, batch, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        each, step, epoch = self.n // self.batch, self.start, None
        while True:
            if epoch != step // each:
                epoch = step // each
                generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
                order = torch.randperm(self.n, generator=generator).tolist()
            first = step % each * self.batch
            yield [(epoch, i) for i in order[first : first + self.batch][ranks.number() :: ranks.size()]]
            step += 1


def _as_it_is(batch: Any) -> Any:
    return batch


def loader(images: RunImages, config: Config, start: int) -> Iterator[Batch]:
    """The batches from step `start` on, without end."""
    return iter(
        DataLoader(
            images.train,
            batch_sampler=Batches(len(images.train), config.batch, config.seed, start),
            collate_fn=_as_it_is,
            num_workers=config.workers,
            generator=torch.Generator(),  # the global random numbers are not the loader's
        )
    )
