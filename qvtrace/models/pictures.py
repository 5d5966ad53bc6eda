"""Pictures for the sample: the crafted one, and the user's."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from qvtrace.errors import UsageError

CRAFTED_SIZE = (224, 320)  # width, height; a multiple of what Qwen3-VL cuts pictures to


def crafted_picture(size: tuple[int, int] = CRAFTED_SIZE) -> Image.Image:
    """A picture of a bright disc on a gradient: smooth parts, an edge, three different channels."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / max(width - 1, 1), y / max(height - 1, 1)
    disc = (x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04
    channels = [np.where(disc, 1.0, x), np.where(disc, 0.9, y), np.where(disc, 0.2, 1 - x * y)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))


def open_pictures(files: Sequence[str]) -> list[Image.Image]:
    """The pictures in these files, upright and in RGB.

    Raises `UsageError` for a file that is missing or is no picture.
    """
    return [_open(file) for file in files]


def _open(file: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"--image {file}: there is no such file; check the path") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"--image {file}: is no picture that Pillow can read; give a PNG or JPEG"
        ) from error
