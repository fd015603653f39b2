"""Heat maps: where on a picture something is, as a visual tool found it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from jaxmethods import images


def read_heat_map(path: Any, where: str) -> Float32[np.ndarray, "height width"]:
    """A heat map in [0, 1] of a .npy file (floats in [0, 1], or 8 bits) or a grey picture.

    Raises:
        ValueError, FileNotFoundError: something else; names the row.
    """
    if not isinstance(path, str):
        raise ValueError(f"{where}: heat_map is {type(path).__name__}; give the path of a picture or of a .npy file.")
    if not path.endswith(".npy"):
        pixels = np.asarray(images.open_picture(path, where))
        if (pixels != pixels[..., :1]).any():
            raise ValueError(f"{where}: heat map {path} is coloured; give grey levels, black where nothing is.")
        return pixels[..., 0].astype(np.float32) / 255
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: heat map {path} does not exist.")
    try:
        heat = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: heat map {path} cannot be read ({str(error).splitlines()[0]}).") from None
    if heat.dtype == np.uint8:
        heat = heat.astype(np.float32) / 255
    if heat.ndim != 2 or not heat.size or not (np.issubdtype(heat.dtype, np.floating) or heat.dtype == bool):
        raise ValueError(
            f"{where}: heat map {path} is {heat.dtype} {list(heat.shape)}; it must be [height, width] of floats in [0, 1] or of "
            "8 bits."
        )
    heat = heat.astype(np.float32)
    if not ((heat >= 0) & (heat <= 1)).all():
        raise ValueError(f"{where}: heat map {path} goes from {heat.min():g} to {heat.max():g}; it must lie in [0, 1].")
    return heat


def fitted(
    heat: Float32[np.ndarray, "rows columns"], shape: Sequence[int], where: str
) -> Float32[np.ndarray, "height width"]:
    """A heat map of the size of a picture, whose `shape` begins with height and width.

    One of that size stays as it is. One of a coarser grid, whose rows and columns are in the proportion of the picture's sides (to
    the nearest row or column), is resized bilinearly.

    Raises:
        ValueError: any other; only who made it knows how it lies on the picture. Names the row and both sizes.
    """
    (rows, columns), (height, width) = heat.shape, shape[:2]
    if (rows, columns) == (height, width):
        return heat
    square = round(rows * width / height) == columns or round(columns * height / width) == rows
    if rows > height or columns > width or not square:
        raise ValueError(
            f"{where}: the heat map has {columns} x {rows} cells and the picture {width} x {height} pixels, which do not fit; "
            f"resize the map to {width} x {height}, by how it lies on the picture."
        )
    resized = Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized), 0.0, 1.0)
