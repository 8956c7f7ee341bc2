"""Pictures as tensors: files of any mode, arrays of bytes, or tensors; grey or in colours, resized and cut."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from hinv.shapes import Float

Picture = str | np.ndarray | Tensor  # a path, bytes (h, w, 3), or (channels, h, w) in [0, 1]


def one(picture: Picture, gray: bool, side: int | None) -> Float[Tensor, "channels height width"]:
    """(channels, h, w) in [0, 1]: one channel if `gray`; the shorter side resized to `side`, and the centre cut.

    Raises:
        ValueError: a file that is no picture, or holds numbers of which the range is not known.
    """
    return _finished(_read(picture)[None], gray, side)[0]


def many(
    pictures: Sequence[Picture], gray: bool, side: int | None
) -> Iterator[Float[Tensor, "n channels height width"]]:
    """The same of all in their order, neighbours of one size together. Files are read side by side, as each waits for the disk; some hundred at a time."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(pictures), 256):
            read = pool.map(_read, pictures[first : first + 256])
            for _, alike in groupby(read, lambda picture: (picture.shape, picture.dtype)):
                yield _finished(torch.stack(list(alike)), gray, side)


def _read(picture: Picture) -> Tensor:
    """(channels, h, w): bytes of a path or an array; a tensor as it is."""
    if isinstance(picture, str):
        try:
            with Image.open(picture) as image:
                picture = _bytes(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
            raise ValueError(f"cannot read the image {picture}: {error}") from error
    return torch.from_numpy(picture).permute(2, 0, 1) if isinstance(picture, np.ndarray) else picture


def _finished(stack: Tensor, gray: bool, side: int | None) -> Float[Tensor, "n channels height width"]:
    if stack.dtype == torch.uint8:
        stack = stack.double() / 255.0
    if gray and stack.shape[1] == 3:
        stack = transforms.rgb_to_grayscale(stack)
    if side is not None:
        stack = transforms.center_crop(transforms.resize(stack, [side], antialias=True), [side, side])
    return stack


def _bytes(image: Image.Image) -> np.ndarray:
    """(h, w, 3) of bytes. Pillow's own conversion of 16-bit images makes all that exceeds 255 white."""
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"its values run from {gray.min()} to {gray.max()}: images of 8 or 16 bits are known")
        return np.repeat((gray / 257.0).round().astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating point numbers, of which the range is not known: save it with 8 or 16 bits"
        )
    return np.array(image.convert("RGB"))
