"""Images for the notebooks: scikit-learn's digits (embedded, the default), CIFAR-10, Imagenette, ImageNet, or any folder of images.

Data is looked for below HINV_DATA (default: the project's data/). A name finds, in this order: the official CIFAR-10 files
(`cifar-10-batches-py`), a tree `<name>/{train,test|val}/<class>/*`, a tree whose folder begins with `<name>-`, and a path.
CIFAR-10 and Imagenette are then downloaded; ImageNet cannot be (what torchvision.datasets.ImageNet unpacks from its archives is such a tree). What was really loaded is in the answer's `name`.
"""

import http.client
import os
import shutil
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import check_md5
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from hinv.companion.checks import ROOT
from hinv.companion.pictures import Picture, many, one
from hinv.shapes import Float, Int

SPLITS = {"train": ("train",), "test": ("test", "val"), "val": ("val", "test")}


class DataNotFound(FileNotFoundError):
    """The images are neither on disk nor to be had; the message says the ways to get them."""


class Images(NamedTuple):
    """x (n, channels, side, side) in [0, 1] unless normalized; y (n,) int64; `name` says what was really loaded."""

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]
    classes: list[str]
    name: str
    mean: Float[Tensor, " channels"]
    std: Float[Tensor, " channels"]

    def __repr__(self) -> str:
        return f"Images({self.name}, {tuple(self.x.shape)}, {len(self.classes)} classes)"


class Source(NamedTuple):
    """Labelled pictures not yet read: paths, arrays (h, w, 3) of bytes, or tensors; y (n,) int64."""

    pictures: Sequence[Picture]
    y: Int[Tensor, " n"]
    classes: list[str]
    name: str


def load(
    name: str = "digits",
    split: str = "train",
    n: int | None = None,
    gray: bool = False,
    side: int | None = None,
    normalize: bool | tuple[Tensor, Tensor] = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    download: bool = True,
    fallback: str | None = None,
    mirrors: tuple[str, ...] = (),
    timeout: float = 600.0,
) -> Images:
    """Load labelled images.

    Args:
        name: "digits", "cifar10", "imagenette" (ten classes of ImageNet), "imagenet", another folder below HINV_DATA, or a path to a folder of class folders.
        split: "train", "test" or "val" (the last two stand for each other in folder trees).
        n: how many, spread evenly over the classes, chosen by `seed`; all by default.
        gray: one channel (the mean of the colours as ITU-R 601 weighs them).
        side: resize the shorter side to this and cut the centre.
        normalize: True for zero mean and unit variance in each channel over the images loaded; (mean, std) to use those of another
            split (`Images.mean`, `.std`).
        download: whether CIFAR-10 or Imagenette may be fetched, from `mirrors` first, within `timeout` seconds for each host.
        fallback: a name to load instead when this one is not found; `Images.name` then says so.

    Raises:
        DataNotFound: with the three ways to get the data.
        ValueError: an unknown split, more images asked for than there are, images of unequal size without `side`.
    """
    pictures, y, classes, found = source(name, split, n, seed, download, fallback, mirrors, timeout)
    alike = [stack.to(dtype) for stack in many(pictures, gray, side)]
    if len({stack.shape[1:] for stack in alike}) > 1:
        raise ValueError(f"the images of {found} differ in size: give side=")
    x = torch.cat(alike).contiguous()
    if isinstance(normalize, tuple):
        mean, std = (t.to(dtype) for t in normalize)
    elif normalize:
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp_min(1e-3)
    else:
        mean, std = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    x = (x - mean[:, None, None]) / std[:, None, None]
    return Images(x, y, classes, found, mean, std)


def source(
    name: str = "digits",
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    download: bool = True,
    fallback: str | None = None,
    mirrors: tuple[str, ...] = (),
    timeout: float = 600.0,
) -> Source:
    """Find images without reading them, for sets larger than memory; arguments and errors as `load`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use 'train', 'test' or 'val'")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    try:
        pictures, labels, classes, found = (
            _digits(split) if name == "digits" else _find(name, split, download, mirrors, timeout)
        )
    except DataNotFound:
        if fallback is None:
            raise
        stand_in = source(fallback, split, n, seed, download, None, mirrors, timeout)
        return stand_in._replace(name=f"{stand_in.name} (stand-in: {name} not found)")
    chosen = _balanced(labels, n, seed, found)
    y = torch.as_tensor(labels)[torch.as_tensor(chosen)].long()
    return Source([pictures[i] for i in chosen], y, classes, found)


class Stack(Dataset):
    """Images in memory, for a DataLoader whose batches are lists of (epoch, number)."""

    def __init__(self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        index = torch.tensor([i for _, i in keys])
        return self.x.index_select(0, index), self.y[index]  # x[index] takes seven times as long


KEPT = 2**28  # bytes of crops that are kept


class Crops(Dataset):
    """Images read as they are needed, each cut and flipped at random: a crop of 35 to 100 percent of the area, resized to `side`.

    The random numbers of a picture depend on seed, epoch and number alone, so neither the order of reading nor the number of worker processes matters.
    Sets whose pictures fit into 2 GiB at twice the side are kept in memory after the first reading, and the first quarter of a GiB of crops too.
    """

    def __init__(
        self,
        source: Source,
        side: int,
        gray: bool,
        mean: Float[Tensor, " channels"],
        std: Float[Tensor, " channels"],
        dtype: torch.dtype,
        seed: int,
    ):
        self.source, self.side, self.gray, self.dtype, self.seed = source, side, gray, dtype, seed
        self.mean, self.std = mean[:, None, None].to(dtype), std[:, None, None].to(dtype)
        small = len(source.y) * 3 * (2 * side) ** 2 * 4 < 2**31
        self._kept: dict[int, Tensor] | None = {} if small else None
        self._cut: dict[tuple[int, int], Tensor] = {}  # crops are functions of their key: many runs see the same ones

    def __len__(self) -> int:
        return len(self.source.y)

    def _read(self, i: int) -> Float[Tensor, "channels height width"]:
        if self._kept is None:
            return one(self.source.pictures[i], self.gray, None)
        if i not in self._kept:
            self._kept[i] = one(self.source.pictures[i], self.gray, 2 * self.side).float()
        return self._kept[i]

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        with torch.random.fork_rng(devices=[]):
            x = torch.stack([self._crop(*key) for key in keys])
        return (x.to(self.dtype) - self.mean) / self.std, self.source.y[torch.tensor([i for _, i in keys])]

    def _crop(self, epoch: int, i: int) -> Float[Tensor, "channels side side"]:
        if (epoch, i) in self._cut:
            return self._cut[epoch, i]
        torch.default_generator.manual_seed(hash((self.seed, epoch, i)))  # of integers: the same in every process
        picture = self._read(i)
        box = RandomResizedCrop.get_params(picture, scale=[0.35, 1.0], ratio=[3 / 4, 4 / 3])
        cut = transforms.resized_crop(picture, *box, [self.side, self.side], antialias=True)
        cut = cut.flip(-1) if torch.rand(()) < 0.5 else cut
        if cut.nbytes * (len(self._cut) + 1) <= KEPT:
            self._cut[epoch, i] = cut
        return cut


def folder() -> Path:
    """Where data is looked for and downloaded to."""
    return Path(os.environ.get("HINV_DATA", ROOT / "data"))


Found = tuple[Sequence[Picture], np.ndarray, list[str], str]  # pictures, labels, names of the classes, what was found


def _digits(split: str) -> Found:
    from sklearn.datasets import load_digits  # here: a second to import, and most runs have images of their own
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    index = train if split == "train" else test
    pictures = [torch.from_numpy(image / 16.0)[None] for image in digits.images[index]]
    return pictures, digits.target[index], [str(c) for c in digits.target_names], "digits"


def _find(name: str, split: str, download: bool, mirrors: tuple[str, ...], timeout: float) -> Found:
    home = folder()
    try:
        found = _on_disk(name, split, home)
    except OSError as error:
        if isinstance(error, DataNotFound):
            raise
        raise DataNotFound(
            f"{home} cannot be searched for '{name}': {error}. Point HINV_DATA to a folder that can be read"
        ) from error
    if found is not None:
        return found
    archive = _archives().get(name)
    if archive and download:
        _download(name, archive, home, mirrors, timeout)
        return _find(name, split, False, mirrors, timeout)
    raise DataNotFound(
        f"no {split} images of '{name}' below {home}. Three ways to get them: (1) put the official files or a tree "
        f"{name}/{{train,test}}/<class>/* there, or point HINV_DATA to where they are; (2) give load() the path of a folder of class "
        "folders; (3) let load('cifar10') or load('imagenette') fetch theirs (ImageNet has no free download). 'digits' always works"
    )


def _on_disk(name: str, split: str, home: Path) -> Found | None:
    if name == "cifar10":
        for root in (home, home / name):
            if (root / CIFAR10.base_folder).is_dir():
                return _official_cifar10(root, split)
    relatives = sorted(home.glob(f"{name}-*")) if Path(name).name == name else []
    candidates = [home / name, *relatives, Path(name)]
    for candidate in candidates:
        if not (candidate.is_dir() and _folders(candidate)):
            continue
        # the first folder that fits is the data set: another one is never mixed in for a split that this one lacks
        if any((candidate / s).is_dir() for s in SPLITS):
            part = next((candidate / s for s in SPLITS[split] if (candidate / s).is_dir()), None)
            if part is None:
                raise DataNotFound(
                    f"{candidate} has no {split} images: it holds {', '.join(s for s in SPLITS if (candidate / s).is_dir())}"
                )
        else:
            part = candidate
        # a class has one number in every split, also where one of them lacks it
        splits = [candidate / s for s in SPLITS if (candidate / s).is_dir()] or [part]
        classes = sorted({folder.name for one in splits for folder in _folders(one)})
        numbers = {c: i for i, c in enumerate(classes) if (part / c).is_dir()}
        samples = [
            (path, label)
            for path, label in make_dataset(str(part), numbers, IMG_EXTENSIONS, allow_empty=True)
            if not Path(path).name.startswith(".")
        ]
        if not samples:
            raise DataNotFound(f"the class folders in {part} hold no images ({', '.join(IMG_EXTENSIONS)})")
        return [path for path, _ in samples], np.array([label for _, label in samples]), classes, candidate.name
    return None


def _folders(path: Path) -> list[Path]:
    """The folders in a folder; hidden ones, as tools leave behind, are none."""
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _official_cifar10(root: Path, split: str) -> Found:
    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataNotFound(
            f"{root / CIFAR10.base_folder} is not whole (a file is missing, or its md5 sum is wrong): complete it, or remove it and it is fetched again"
        ) from error
    return list(data.data), np.array(data.targets), data.classes, "cifar10"


class Archive(NamedTuple):
    """What can be downloaded: the folder `inside` the archive becomes `folder` below HINV_DATA."""

    url: str
    md5: str
    inside: str
    folder: str
    megabytes: int


def _archives() -> dict[str, Archive]:
    return {
        "cifar10": Archive(CIFAR10.url, CIFAR10.tgz_md5, CIFAR10.base_folder, CIFAR10.base_folder, 170),
        "imagenette": Archive(*Imagenette._ARCHIVES["160px"], "imagenette2-160", "imagenette", 99),
    }


def _download(name: str, archive: Archive, home: Path, mirrors: tuple[str, ...], timeout: float) -> None:
    """Fetch, check and unpack an archive into `home`; nothing half-written stays."""
    home.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in (*mirrors, archive.url):
        with tempfile.TemporaryDirectory(dir=home) as work:
            file = Path(work) / Path(urlparse(archive.url).path).name
            try:
                _fetch(url, file, timeout)
                if not check_md5(str(file), archive.md5):
                    raise OSError("the archive's md5 sum is wrong")
                shutil.unpack_archive(file, work, filter="data")
                os.replace(Path(work) / archive.inside, home / archive.folder)
                return
            except (OSError, ValueError, http.client.HTTPException, tarfile.TarError, zlib.error, EOFError) as error:
                problems.append(f"{urlparse(url).hostname}: {error}")
    raise DataNotFound(
        f"'{name}' is not below {home} and could not be downloaded ({'; '.join(problems)}). Three ways: (1) put {archive.inside} or a "
        f"tree {name}/{{train,test}}/<class>/* there, or point HINV_DATA to it; (2) load(<path of a folder of class folders>); "
        f"(3) try the download again with load('{name}', mirrors=('https://...',), timeout=seconds)"
    )


def _fetch(url: str, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with urllib.request.urlopen(url, timeout=min(timeout, 30.0)) as answer, open(path, "wb") as file:
        while chunk := answer.read1(
            1 << 20
        ):  # what has arrived, not a full block: a trickle must not outlast the deadline
            file.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {timeout:g} s ({file.tell():,} bytes so far)")


def _balanced(labels: Int[np.ndarray, " n"], n: int | None, seed: int, found: str) -> list[int]:
    """n indices, the classes taking turns: sort by (rank within a shuffled class, random order of the classes)."""
    if n is None:
        return list(range(len(labels)))
    if n > len(labels):
        raise ValueError(f"{n} images asked for, {found} has {len(labels)}")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    turn, rank = generator.permutation(labels.max() + 1), np.zeros(len(labels), dtype=int)
    seen = np.zeros(labels.max() + 1, dtype=int)
    for i in shuffled:
        rank[i] = seen[labels[i]]
        seen[labels[i]] += 1
    return np.lexsort((turn[labels], rank))[:n].tolist()
