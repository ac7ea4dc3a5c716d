"""Images in JSON: small PNG files as text, lossless both ways."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from immunize_ext._extras import require_extra


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded to the nearest."""
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def encode_images(images: Tensor) -> list[str]:
    """Images as PNG files in base64.

    Args:
        images: uint8, shape ``(n, c, h, w)``, c = 1 or 3.

    Returns:
        One text an image.

    Example:
        >>> images = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
        >>> torch.equal(decode_images(encode_images(images)), images)
        True
    """
    pillow = require_extra("PIL.Image", extra="diffusion", purpose="images in results")
    found = []
    for image in images:
        array = image.permute(1, 2, 0).cpu().numpy()
        buffer = io.BytesIO()
        pillow.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found


def decode_images(texts: Sequence[str]) -> Tensor:
    """Take back what :func:`encode_images` gave, uint8, shape ``(n, c, h, w)``."""
    pillow = require_extra("PIL.Image", extra="diffusion", purpose="images in results")
    found = []
    for text in texts:
        with pillow.open(io.BytesIO(base64.b64decode(text))) as opened:
            array = torch.from_numpy(np.array(opened))
        found.append(array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1))
    return torch.stack(found)
