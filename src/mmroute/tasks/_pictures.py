"""Pictures of samples: decoded for whoever looks at them, PNG for whoever stores them."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from mmroute.errors import InputError

__all__ = ["open_image", "png_bytes"]


def open_image(image: Any) -> Image.Image:
    """A picture of a sample, decoded, as a plain Pillow image.

    Args:
        image: a Pillow image, or a path.

    Raises:
        InputError: the file is missing or no picture.
    """
    try:
        if isinstance(image, Image.Image):
            return image.copy()
        with Image.open(image) as opened:
            return opened.copy()
    except FileNotFoundError:
        raise InputError(f"{image}: no such image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: not a readable image: {error}") from None


def png_bytes(image: Any) -> bytes:
    """A picture as PNG; a PNG file keeps its bytes. Never JPEG: its artefacts break decoding of tiles."""
    if not isinstance(image, Image.Image) and Path(image).suffix.lower() == ".png":
        open_image(image)  # a broken file must not travel on
        return Path(image).read_bytes()
    decoded = open_image(image)
    if decoded.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        decoded = decoded.convert("RGB")
    buffer = io.BytesIO()
    decoded.save(buffer, "PNG")
    return buffer.getvalue()
