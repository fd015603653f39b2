"""Pictures on the host: from files to uint8 crops, and to where the feature of each image token stands.

>>> format = ImageFormat(size=384, grid=27, resize="squash")
>>> prepared = prepare(open_picture(np.zeros((480, 640), np.uint8), "an example"), format)
>>> prepared.crops.shape, prepared.places.shape, format.tokens_of(640, 480)
((1, 384, 384, 3), (729, 1), 729)

A vision tower makes `grid * grid` features of each crop. The features of a row's crops, one after the other, are what
`places` count: the embedding of image token t is sum_j weights[t, j] * features[places[t, j]]. So a model needs no
sizes of pictures and no branches, and its shapes are those of a batch. Numpy and Pillow only; no device is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float32, Int32, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

TEXT, NEWLINE = -1, -2
"""Places of a token that is no feature: it has its own embedding, or it is the learned vector at the end of a row."""

RESIZES = ("crop", "squash", "pad", "anyres")
RESAMPLES = ("bicubic", "bilinear")

# What programs store pictures in. Pillow knows more, and hands some of it (EPS) to other programs: not for files of strangers.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_PIXELS = 1 << 28  # of a picture on its way to a crop: one GiB in Pillow


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """How a model wants its pictures, and which features of them become tokens.

    size: side of a crop in pixels.
    grid: side of a crop's map of features.
    resize: "crop": shortest side to `size`, then the centre (CLIP). "squash": to `size` x `size` whatever the shape (SigLIP).
      "pad": to a square of `background`, then to `size` (LLaVA 1.5, https://arxiv.org/abs/2310.03744). "anyres": the whole
      picture squashed, then the crops of the picture fitted into the best of `resolutions`, black beside it; tokens of
      features that saw only black are left out (LLaVA-OneVision, https://arxiv.org/abs/2408.03326).
    resample: "bicubic" or "bilinear".
    class_token: the tower's class feature comes in front of a crop's others and is a token too (CLIP's "full" selection).
    resolutions: (height, width) in pixels, multiples of `size`; for "anyres".
    max_crops: the N of "anyres_max_N": features of the crops that are more than 1.1**2 * N * grid**2 are interpolated to
      N * grid**2 or a little fewer. None keeps all.
    newline: a learned vector ends each row of the crops' features, or the features of a picture that is one crop.
    background: red, green, blue of "pad"; LLaVA takes int(255 * mean), and the default is that of CLIP's mean.

    Raises ValueError for numbers that are not positive, unknown names, and fields that do not go together.
    """

    size: int
    grid: int
    resize: str = "crop"
    resample: str = "bicubic"
    class_token: bool = False
    resolutions: tuple[tuple[int, int], ...] = ()
    max_crops: int | None = None
    newline: bool = False
    background: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self) -> None:
        for name, number in (("size", self.size), ("grid", self.grid), ("max_crops", self.max_crops)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        for name, known in (("resize", RESIZES), ("resample", RESAMPLES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose of {', '.join(known)}.")
        anyres = self.resize == "anyres"
        if anyres != bool(self.resolutions):
            raise ValueError(
                f"resize={self.resize!r} with {len(self.resolutions)} resolutions; they belong to 'anyres'."
            )
        for side in itertools.chain(*self.resolutions):
            if side < self.size or side % self.size:
                raise ValueError(f"a resolution has a side of {side} pixels, no multiple of size={self.size}.")
        if self.max_crops is not None and not anyres:
            raise ValueError(f"max_crops={self.max_crops} belongs to 'anyres', not to resize={self.resize!r}.")
        if self.class_token and anyres:
            raise ValueError("class_token does not go with 'anyres': class features have no place in a map of crops.")
        if not all(0 <= level <= 255 for level in self.background):
            raise ValueError(f"background={self.background} must be three grey levels from 0 to 255.")

    @property
    def features_per_crop(self) -> int:
        """Features that the tower gives of each crop."""
        return self.grid**2 + self.class_token

    @property
    def corners(self) -> int:
        """J: places of an image token, 4 where features are interpolated."""
        return 1 if self.max_crops is None else 4

    @property
    def most_crops(self) -> int:
        """No picture makes more crops."""
        return 1 + max((high * wide for high, wide in self.resolutions), default=0) // self.size**2

    @property
    def max_tokens(self) -> int:
        """No picture takes more tokens."""
        if self.resize != "anyres":
            return self.features_per_crop + self.newline
        maps = [(self.grid * (high // self.size), self.grid * (wide // self.size)) for high, wide in self.resolutions]
        unpadded = {(h, wide) for high, wide in maps for h in range(high, -1, -2)}
        unpadded |= {(high, w) for high, wide in maps for w in range(wide, -1, -2)}
        return self.grid**2 + max(h * (w + self.newline) for h, w in (_interpolated(self, *one) for one in unpadded))

    @property
    def one_crop(self) -> ImageFormat:
        """This format where an example has several pictures: LLaVA-OneVision pads each of them to a square, one crop."""
        if self.resize != "anyres":
            return self
        return dataclasses.replace(self, resize="pad", resolutions=(), max_crops=None)

    def crops_of(self, width: int, height: int) -> int:
        """How many crops `prepare` makes of a picture of this size. Raises ValueError as it does."""
        _check_size(self, width, height)
        return 1 if self.resize != "anyres" else 1 + math.prod(_map(self, width, height).crops)

    def tokens_of(self, width: int, height: int) -> int:
        """How many tokens a picture of this size takes. Raises ValueError as `prepare` does."""
        _check_size(self, width, height)
        if self.resize != "anyres":
            return self.features_per_crop + self.newline
        rows, columns = _map(self, width, height).tokens
        return self.grid**2 + rows * (columns + self.newline)


class Prepared(NamedTuple):
    """The crops of one picture, or of all pictures of a row, and the places of its image tokens.

    crops: what the vision tower sees, before it scales grey levels.
    places: indices into the features of these crops, crop * features_per_crop + feature, a crop's features row by row;
      NEWLINE in all corners for the learned vector.
    weights: of the features at `places`, 1 together; (1, 0, 0, 0) for NEWLINE. None where each token has one place.
    """

    crops: UInt8[np.ndarray, "crop size size 3"]
    places: Int32[np.ndarray, "token corner"]
    weights: Float32[np.ndarray, "token corner"] | None


# Reading


def open_picture(source: Any, where: object) -> Image.Image:
    """The decoded picture, RGB with 8 bits a colour, upright.

    Turned as its EXIF orientation says (a PNG's where that comes before its pixels), composited on white where it is
    transparent: both as `load_image` and the image processors of transformers do. Grey of 16 bits keeps the high byte,
    as PNG means it (Pillow, and so transformers, makes all above 255 white). Of an animation, the first frame.

    Args:
        source: a path that `etils.epath` opens, the bytes of a file, {"bytes": ..., "path": ...} as `datasets` stores it, a
            Pillow picture, or uint8 [height, width, 3] or [height, width]. JPEG, PNG, GIF, BMP, PPM, WebP, TIFF, JPEG 2000.
        where: what errors begin with, such as the `Place` of a record.

    Raises:
        FileNotFoundError: there is no such file; names the nearest.
        ValueError: not a picture, cut short, or of a kind whose grey levels are not defined (32 bits, floating point).
    """
    with _undecoded(source, where) as image:
        turn = _TURNS.get(_orientation(image))
        picture = _rgb(image)
        return picture if turn is None else picture.transpose(turn)


def picture_size(source: Any, where: object) -> tuple[int, int]:
    """(width, height) of what `open_picture` gives, from the header alone. Arguments and errors are the same."""
    with _undecoded(source, where) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


class _Problem(Exception):
    """What is wrong with a picture, without the picture's name."""


@contextlib.contextmanager
def _undecoded(source: Any, where: object) -> Iterator[Image.Image]:
    """The picture with no more than its header read; what goes wrong in the block is told in one line."""
    stored, name = _stored(source, where)
    try:
        if isinstance(stored, Image.Image):
            yield stored
        else:
            with io.BytesIO(stored) if isinstance(stored, bytes) else stored.open("rb") as file:
                try:
                    image: Image.Image = Image.open(file, formats=_FORMATS)
                except UnidentifiedImageError:
                    file.seek(0)
                    head = file.read(20)
                    begins = f"it begins with {head!r}" if head else "it is empty"
                    raise _Problem(f"is none in a format read here ({', '.join(_FORMATS)}): {begins}.") from None
                yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: {name} does not exist{_nearest(stored)}.") from None
    except _Problem as problem:
        raise ValueError(f"{where}: {name} {problem}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {name} has more pixels than Pillow opens ({error}); make it smaller.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others for what is in a file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = "is cut short" if "truncated" in reason.lower() else "cannot be read"
        raise ValueError(f"{where}: {name} {what} ({reason}); replace it or leave it out.") from error


def _stored(source: Any, where: object) -> tuple[Image.Image | bytes | epath.Path, str]:
    """What to open, and its name in errors."""
    name = "the picture"
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        source, name = (path, name) if data is None else (data, f"picture {path}" if path else name)
    if isinstance(source, Image.Image | bytes):
        return source, name
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not source.size or not (source.ndim == 2 or source.shape[2:] == (3,)):
            raise ValueError(
                f"{where}: a picture as an array must be uint8 [height, width, 3] or [height, width]; "
                f"this one is {source.dtype} {list(source.shape)}."
            )
        return Image.fromarray(source), name
    if isinstance(source, str | os.PathLike) and os.fspath(source):
        path = epath.Path(source).expanduser()
        return path, f"picture {path}"
    raise ValueError(
        f"{where}: a picture must be a path, bytes, a dict with 'bytes' or 'path', a Pillow picture or a uint8 array; "
        f"this one is {type(source).__name__} {str(source)[:40]!r}."
    )


def _nearest(path: Any) -> str:
    """The names beside a missing file that are like its own."""
    if not path.parent.is_dir():
        return f", nor does its folder {path.parent}"
    names = [entry.name for entry in itertools.islice(path.parent.iterdir(), 10_000)]  # folders may hold millions
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; near it: {', '.join(near)}" if near else ""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 where there is none."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    exif = Image.Image.getexif(image)  # that of PngImageFile decodes the picture to find what may stand behind it
    return exif.get(ExifTags.Base.Orientation, 1)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if not all(image.size):
        raise _Problem(f"has {image.width} x {image.height} pixels.")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _Problem(
            f"has grey levels of 32 bits (mode {image.mode}), whose range is not known; convert it to 8 bits."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Sizes


class _Map(NamedTuple):
    """The features of a picture's crops as one map: (rows, columns) of the crops, of the features cut off at each side,
    of those that are left, and of the tokens made of these."""

    crops: tuple[int, int]
    margin: tuple[int, int]
    left: tuple[int, int]
    tokens: tuple[int, int]


def _check_size(format: ImageFormat, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has none.")
    long, short = max(width, height), min(width, height)
    pixels = {"crop": format.size**2 * long // short, "pad": long**2}.get(format.resize, 0)
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels has {pixels // 10**6} million on its way through {format.resize!r}; "
            f"make its longer side shorter, or leave it out."
        )


def _resolution(format: ImageFormat, width: int, height: int) -> tuple[int, int]:
    """The (height, width) in which most pixels of the picture are kept and, of several such, fewest are black."""
    return max(format.resolutions, key=lambda one: (_kept(width, height, *one), -one[0] * one[1]))


def _kept(width: int, height: int, high: int, wide: int) -> int:
    """How many pixels of a picture are left when it is fitted into a resolution; made larger, it has no more."""
    scale = min(wide / width, high / height)
    return min(int(width * scale) * int(height * scale), width * height)


def _interpolated(format: ImageFormat, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of tokens of a map with these features."""
    if format.max_crops is None:
        return rows, columns
    ratio = math.sqrt(rows * columns / (format.max_crops * format.grid**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _map(format: ImageFormat, width: int, height: int) -> _Map:
    """Which features of the crops become tokens; rounded as transformers' `unpad_image` and `pack_image_features` round."""
    high, wide = _resolution(format, width, height)
    crops = high // format.size, wide // format.size
    rows, columns = crops[0] * format.grid, crops[1] * format.grid
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2, 0
    else:
        margin = 0, (columns - int(round(width * (rows / height), 7))) // 2
    left = rows - 2 * margin[0], columns - 2 * margin[1]
    tokens = _interpolated(format, *left)
    if tokens != left and not all(tokens):
        raise ValueError(f"a picture of {width} x {height} pixels is too narrow to leave a feature of it; crop it.")
    return _Map(crops, margin, left, tokens)


# Preparing


def prepare(picture: Image.Image, format: ImageFormat) -> Prepared:
    """The crops of an RGB picture, and where the features of its tokens stand.

    Crops are those of CLIP's, SigLIP's and LLaVA's image processors in transformers, before rescaling. Tokens of "anyres"
    are those of LLaVA-OneVision: the features of the whole picture (the first crop), then the map of the others row by row.

    Raises:
        ValueError: the picture is not RGB, so narrow that its few features would be interpolated to none ("anyres"), or so
            long that it would take more than a GiB on its way ("crop", "pad").
    """
    if picture.mode != "RGB":
        raise ValueError(f"the picture's mode is {picture.mode}, not RGB; give what open_picture returns.")
    _check_size(format, *picture.size)
    if format.resize == "anyres":
        crops = _anyres(picture, format)
    else:
        crops = np.asarray({"crop": _centre, "squash": _squash, "pad": _pad}[format.resize](picture, format))[None]
    return Prepared(crops, *_places(format, *picture.size))


def _resample(format: ImageFormat) -> Image.Resampling:
    return Image.Resampling[format.resample.upper()]


def _squash(picture: Image.Image, format: ImageFormat) -> Image.Image:
    return picture.resize((format.size, format.size), _resample(format))


def _centre(picture: Image.Image, format: ImageFormat) -> Image.Image:
    """Resizes all and then crops: resizing only what is kept would round otherwise, by many grey levels at sharp edges."""
    short = min(picture.size)
    width, height = (int(format.size * side / short) for side in picture.size)
    left, top = (width - format.size) // 2, (height - format.size) // 2
    resized = picture.resize((width, height), _resample(format))
    return resized.crop((left, top, left + format.size, top + format.size))


def _pad(picture: Image.Image, format: ImageFormat) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), format.background)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return _squash(square, format)


def _anyres(picture: Image.Image, format: ImageFormat) -> UInt8[np.ndarray, "crop size size 3"]:
    """The whole picture squashed, then the crops, row by row, of the picture at the middle of its resolution."""
    high, wide = _resolution(format, *picture.size)
    across, down = wide / picture.width, high / picture.height
    if across < down:
        fitted = wide, min(math.ceil(picture.height * across), high)
    else:
        fitted = min(math.ceil(picture.width * down), wide), high
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(picture.resize(fitted, _resample(format)), ((wide - fitted[0]) // 2, (high - fitted[1]) // 2))
    size = format.size
    crops = np.asarray(canvas).reshape(high // size, size, wide // size, size, 3).swapaxes(1, 2)
    return np.concatenate([np.asarray(_squash(picture, format))[None], crops.reshape(-1, size, size, 3)])


def _places(
    format: ImageFormat, width: int, height: int
) -> tuple[Int32[np.ndarray, "token corner"], Float32[np.ndarray, "token corner"] | None]:
    corners, grid = format.corners, format.grid
    places = [np.repeat(np.arange(format.features_per_crop)[:, None], corners, axis=1)]
    weights = [np.tile(np.eye(1, corners), (format.features_per_crop, 1))]
    if format.resize == "anyres":
        of = _map(format, width, height)
        apart = np.arange(math.prod(of.crops) * grid**2).reshape(*of.crops, grid, grid)
        index = grid**2 + apart.swapaxes(1, 2).reshape(of.crops[0] * grid, of.crops[1] * grid)
        rows, columns = (
            _neighbours(margin, size, tokens)[: min(corners, 2)]
            for margin, size, tokens in zip(of.margin, of.left, of.tokens, strict=True)
        )
        at = np.stack([index[np.ix_(y, x)] for y, _ in rows for x, _ in columns], axis=-1)
        share = np.stack([np.outer(dy, dx) for _, dy in rows for _, dx in columns], axis=-1)
        if format.newline:
            end = (of.tokens[0], 1, corners)
            at = np.concatenate([at, np.full(end, NEWLINE)], axis=1)
            share = np.concatenate([share, np.broadcast_to(np.eye(1, corners), end)], axis=1)
        places.append(at.reshape(-1, corners))
        weights.append(share.reshape(-1, corners))
    elif format.newline:
        places.append(np.full((1, corners), NEWLINE))
    joined = np.concatenate(places).astype(np.int32)
    return joined, None if corners == 1 else np.concatenate(weights).astype(np.float32)


def _neighbours(first: int, size: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two features between which each token lies along one axis, and their weights.

    Token i of n lies at (i + 1/2) * size / n - 1/2 features behind the first, and not before it: torch's bilinear
    `interpolate` with align_corners=False, here in float64. Where n is `size`, the tokens are the features.
    """
    at = np.maximum((np.arange(tokens) + 0.5) * (size / max(tokens, 1)) - 0.5, 0.0)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return [(first + low, 1 - (at - low)), (first + high, at - low)]


def join(prepared: Sequence[Prepared], format: ImageFormat, crops: int) -> Prepared:
    """The pictures of one row as one, in their order: crops filled up with black ones to `crops`, places counted on.

    Pictures prepared in `format.one_crop` may be among them; none at all gives no tokens.

    Raises:
        ValueError: the pictures make more crops than `crops`.
    """
    needed = sum(len(one.crops) for one in prepared)
    if needed > crops:
        raise ValueError(
            f"{len(prepared)} pictures of a row make {needed} crops, and the batch holds {crops} a row; "
            "raise that, or give the row fewer pictures."
        )
    corners = format.corners
    pixels = np.zeros((crops, format.size, format.size, 3), np.uint8)
    places, weights = [np.zeros((0, corners), np.int32)], [np.zeros((0, corners), np.float32)]
    start = 0
    for one in prepared:
        pixels[start : start + len(one.crops)] = one.crops
        counted = np.where(one.places < 0, one.places, one.places + np.int32(start * format.features_per_crop))
        places.append(np.broadcast_to(counted, (len(counted), corners)))
        alone = np.broadcast_to(np.eye(1, corners, dtype=np.float32), (len(counted), corners))
        weights.append(alone if one.weights is None else one.weights)
        start += len(one.crops)
    return Prepared(pixels, np.concatenate(places), None if corners == 1 else np.concatenate(weights))
