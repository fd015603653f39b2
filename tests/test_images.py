"""Pictures from every kind of source, their crops, and the places of their features, by hand and by other routes."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxmethods.images import NEWLINE, ImageFormat, join, open_picture, picture_size, prepare

WHERE = "train.jsonl, line 3"
GRID = tuple(itertools.product((8, 16, 24), repeat=2))
ANYRES = ImageFormat(size=8, grid=3, resize="anyres", resolutions=GRID, newline=True)
MAX2 = ImageFormat(size=8, grid=3, resize="anyres", resolutions=GRID, newline=True, max_crops=2)
FORMATS = {
    "crop": ImageFormat(size=8, grid=2, class_token=True),
    "squash": ImageFormat(size=8, grid=2, resize="squash", resample="bilinear"),
    "pad": ImageFormat(size=8, grid=2, resize="pad", newline=True),
    "anyres": ANYRES,
    "anyres-max": MAX2,
    "anyres-max-no-newline": ImageFormat(
        size=8, grid=2, resize="anyres", resolutions=((16, 16), (8, 24), (24, 8)), max_crops=1
    ),
}
SIZES = [
    (1, 1),
    (1, 20),
    (20, 1),
    (7, 9),
    (8, 8),
    (16, 16),
    (100, 5),
    (33, 660),
    (41, 40),
    (640, 479),
    (24, 25),
    (1500, 999),
]


def gradient(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards: each pixel tells where it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 77)], axis=-1).round().astype(np.uint8)


def gradient_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(gradient(width, height))


def embedded(prepared, features: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """The definition: sum_j weights[t, j] * features[places[t, j]], token by token."""
    weights = np.ones(prepared.places.shape) if prepared.weights is None else prepared.weights
    table = {NEWLINE: newline} | dict(enumerate(features))
    return np.stack(
        [
            sum(w * table[int(p)] for p, w in zip(*token, strict=True))
            for token in zip(prepared.places, weights, strict=True)
        ]
    )


# Formats


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width, height", SIZES)
def test_the_size_alone_tells_crops_and_tokens(name, width, height):
    format = FORMATS[name]
    crops, places, weights = prepare(gradient_picture(width, height), format)
    assert crops.shape == (format.crops_of(width, height), 8, 8, 3) and crops.dtype == np.uint8
    assert places.shape == (format.tokens_of(width, height), format.corners) and places.dtype == np.int32
    assert len(crops) <= format.most_crops and len(places) <= format.max_tokens
    assert places.min() >= NEWLINE and places.max() < len(crops) * format.features_per_crop
    assert set(places[places < 0]) <= ({NEWLINE} if format.newline else set())
    if format.corners == 1:
        assert weights is None
    else:
        assert weights.shape == places.shape and weights.dtype == np.float32 and weights.min() >= 0
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["anyres", "anyres-max", "anyres-max-no-newline"])
def test_the_most_tokens_and_crops_are_reached_and_not_passed(name):
    format = FORMATS[name]
    sizes = list(itertools.product(range(1, 28), repeat=2))
    assert max(format.tokens_of(*size) for size in sizes) == format.max_tokens
    assert max(format.crops_of(*size) for size in sizes) == format.most_crops


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"grid": 0}, r"grid=0 must be at least 1"),
        ({"resize": "squeeze"}, r"resize='squeeze' is unknown; choose of crop, squash, pad, anyres"),
        ({"resample": "nearest"}, r"resample='nearest' is unknown"),
        ({"resize": "anyres"}, r"resize='anyres' with 0 resolutions"),
        ({"resolutions": ((8, 8),)}, r"resize='crop' with 1 resolutions"),
        ({"resize": "anyres", "resolutions": ((8, 12),)}, r"side of 12 pixels, no multiple of size=8"),
        ({"max_crops": 2}, r"max_crops=2 belongs to 'anyres'"),
        ({"resize": "anyres", "resolutions": ((8, 8),), "max_crops": 0}, r"max_crops=0 must be at least 1"),
        ({"resize": "anyres", "resolutions": ((8, 8),), "class_token": True}, r"class_token does not go with"),
        ({"background": (0, 0, 256)}, r"background=\(0, 0, 256\) must be"),
    ],
)
def test_a_wrong_format_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        ImageFormat(**{"size": 8, "grid": 2} | fields)


@pytest.mark.parametrize(
    "name, size, said",
    [
        ("pad", (20_000, 10), r"20000 x 10 pixels has 400 million on its way through 'pad'"),
        ("crop", (1, 5_000_000), r"1 x 5000000 pixels has 320 million on its way through 'crop'"),
        ("squash", (0, 3), r"0 x 3 pixels has none"),
    ],
)
def test_pictures_that_cannot_be_prepared_are_told_by_their_size(name, size, said):
    format = FORMATS[name]
    for ask in (format.crops_of, format.tokens_of, lambda *size: prepare(Image.new("RGB", size), format)):
        with pytest.raises(ValueError, match=said):
            ask(*size)


def test_interpolation_to_nothing_is_refused():
    """One row of six features, to be as few as one crop's single feature: torch's `interpolate` refuses that as well."""
    format = ImageFormat(size=8, grid=1, resize="anyres", resolutions=((8, 48),), max_crops=1)
    with pytest.raises(ValueError, match=r"48 x 8 pixels is too narrow to leave a feature"):
        format.tokens_of(48, 8)


# Crops


def test_crop_squash_and_pad_of_a_gradient():
    """Twice as wide as high: the middle half, all of it, all of it between bars of the background."""
    picture = gradient_picture(64, 32)
    crop = prepare(picture, FORMATS["crop"]).crops[0].astype(int)
    squash = prepare(picture, FORMATS["squash"]).crops[0].astype(int)
    pad = prepare(picture, FORMATS["pad"]).crops[0].astype(int)
    middles = (np.arange(8) + 0.5) / 8 * 255  # of eight equal parts of the gradient
    assert np.abs(crop[..., 0] - (64 + middles / 2)).max() <= 3
    assert np.abs(squash[..., 0] - middles).max() <= 3
    assert np.abs(pad[2:6, :, 0] - middles).max() <= 9  # bars shine a little over the edge
    assert np.abs(crop[..., 1] - middles[:, None]).max() <= 3 and np.abs(squash[..., 1] - middles[:, None]).max() <= 3
    assert np.abs(pad[[0, 7]] - (122, 116, 104)).max() <= 3


def test_crops_reassemble_to_the_resized_picture():
    picture = gradient_picture(90, 60)  # 24 x 16 is its best resolution, and of its own shape
    crops = prepare(picture, ANYRES).crops
    whole = np.concatenate([np.concatenate(list(crops[1 + 3 * row : 4 + 3 * row]), axis=1) for row in range(2)])
    np.testing.assert_array_equal(whole, np.asarray(picture.resize((24, 16), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(crops[0], np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC)))
    assert (np.diff(whole[8, :, 0].astype(int)) > 0).all()  # red grows across all crops


def test_anyres_puts_black_around_a_picture_of_another_shape():
    crops = prepare(Image.new("RGB", (24, 10), "white"), ANYRES).crops  # in 24 x 16: 3 rows of black on either side
    assert len(crops) == 7 and (crops[0] == 255).all()
    for upper, lower in zip(crops[1:4], crops[4:7], strict=True):
        assert not upper[:3].any() and (upper[3:] == 255).all()
        assert not lower[5:].any() and (lower[:5] == 255).all()


def test_prepare_takes_rgb():
    with pytest.raises(ValueError, match=r"mode is L, not RGB; give what open_picture returns"):
        prepare(Image.new("L", (4, 4)), ANYRES)


# Places


def test_places_by_hand():
    """8 x 2 pixels in the resolution of 8 x 4: features of the first and the last row of 4 x 8 saw only black."""
    format = ImageFormat(size=4, grid=4, resize="anyres", resolutions=((4, 8), (8, 4), (8, 8)), newline=True)
    crops, places, weights = prepare(gradient_picture(8, 2), format)
    assert len(crops) == 3 and weights is None
    base = list(range(16))
    second_row = [20, 21, 22, 23, 36, 37, 38, 39, NEWLINE]
    third_row = [24, 25, 26, 27, 40, 41, 42, 43, NEWLINE]
    assert places[:, 0].tolist() == base + second_row + third_row


def test_places_of_one_crop():
    plain, ended, with_class = (
        ImageFormat(size=8, grid=2, resize="squash"),
        ImageFormat(size=8, grid=2, resize="squash", newline=True),
        ImageFormat(size=8, grid=2, class_token=True),
    )
    for format, expected in ((plain, [0, 1, 2, 3]), (ended, [0, 1, 2, 3, NEWLINE]), (with_class, [0, 1, 2, 3, 4])):
        assert prepare(gradient_picture(9, 5), format).places[:, 0].tolist() == expected


@pytest.mark.parametrize("width, height", [(24, 24), (24, 16), (16, 24), (90, 60), (100, 70), (40, 39)])
def test_interpolated_features_are_those_of_numpy(width, height):
    """The map put together crop by crop, its margins cut by hand, and each axis interpolated by `np.interp`."""
    rng = np.random.default_rng(0)
    prepared, grid = prepare(gradient_picture(width, height), MAX2), MAX2.grid
    plain = prepare(gradient_picture(width, height), ANYRES)
    features, newline = rng.normal(size=(len(prepared.crops) * 9, 4)), rng.normal(size=4)
    ours = embedded(prepared, features, newline)
    np.testing.assert_array_equal(ours[:9], features[:9])

    rows = int((plain.places[9:, 0] == NEWLINE).sum())
    whole = embedded(plain, features, newline)[9:].reshape(rows, -1, 4)[:, :-1]
    ratio = (whole.shape[0] * whole.shape[1] / (2 * grid**2)) ** 0.5
    assert ratio > 1.1  # else nothing is interpolated
    for axis in (0, 1):
        old = whole.shape[axis]
        new = int(old // ratio)
        at = (np.arange(new) + 0.5) * old / new - 0.5  # np.interp holds the ends, as bilinear interpolation does
        whole = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, whole)
    ours = ours[9:].reshape(whole.shape[0], whole.shape[1] + 1, 4)
    np.testing.assert_allclose(ours[:, :-1], whole, atol=1e-5)  # weights are float32
    np.testing.assert_array_equal(ours[:, -1], np.broadcast_to(newline, ours[:, -1].shape))


def test_few_features_are_not_interpolated():
    """Up to 1.1**2 * N * grid**2 they stay as they are, with all weight on one place."""
    prepared, plain = (prepare(gradient_picture(16, 8), format) for format in (MAX2, ANYRES))
    assert (prepared.weights == (1, 0, 0, 0)).all()
    np.testing.assert_array_equal(prepared.places[:, :1], plain.places)


# Rows of several pictures


@pytest.mark.parametrize("name", ["crop", "anyres", "anyres-max"])
def test_joined_pictures_take_their_own_features(name):
    format, rng = FORMATS[name], np.random.default_rng(1)
    several = [prepare(gradient_picture(*size), format) for size in ((30, 20), (8, 8), (9, 31))]
    several.append(prepare(gradient_picture(5, 9), format.one_crop))
    count = sum(len(one.crops) for one in several)
    pixels, places, weights = joined = join(several, format, count + 2)
    assert places.shape[1] == format.corners and (weights is None) == (format.corners == 1)
    assert places.dtype == np.int32 and pixels.dtype == np.uint8 and len(pixels) == count + 2
    np.testing.assert_array_equal(pixels[:count], np.concatenate([one.crops for one in several]))
    assert not pixels[count:].any()
    features = rng.normal(size=(count, format.features_per_crop, 3))
    newline, start, expected = rng.normal(size=3), 0, []
    for one in several:
        expected.append(embedded(one, features[start : start + len(one.crops)].reshape(-1, 3), newline))
        start += len(one.crops)
    np.testing.assert_array_equal(embedded(joined, features.reshape(-1, 3), newline), np.concatenate(expected))


def test_a_row_without_pictures_and_one_with_too_many():
    pixels, places, weights = join([], MAX2, 2)
    assert pixels.shape == (2, 8, 8, 3) and places.shape == weights.shape == (0, 4)
    one = prepare(gradient_picture(24, 16), MAX2)
    with pytest.raises(ValueError, match=r"2 pictures of a row make 14 crops, and the batch holds 13 a row"):
        join([one, one], MAX2, 13)


def test_threads_prepare_alike():
    picture = gradient_picture(120, 77)
    with ThreadPoolExecutor(4) as pool:
        for crops, places, weights in pool.map(lambda _: prepare(picture, MAX2), range(12)):
            for ours, first in zip((crops, places, weights), prepare(picture, MAX2), strict=True):
                np.testing.assert_array_equal(ours, first)


# Reading


def stored(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_all_sources_give_the_same_picture(tmp_path):
    pixels = gradient(7, 5)
    picture = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    path.write_bytes(stored(picture))
    both = {"bytes": stored(picture), "path": "gone.png"}
    for source in (path, str(path), stored(picture), both, {"bytes": None, "path": str(path)}, picture, pixels):
        opened = open_picture(source, WHERE)
        assert opened.mode == "RGB" and picture_size(source, WHERE) == (7, 5)
        np.testing.assert_array_equal(np.asarray(opened), pixels)
    grey = open_picture(pixels[..., 0], WHERE)
    np.testing.assert_array_equal(np.asarray(grey), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PPM", "TIFF", "WEBP"])
def test_other_formats(kind):
    data = stored(gradient_picture(24, 16), kind)
    assert picture_size(data, WHERE) == (24, 16)
    opened = np.asarray(open_picture(data, WHERE)).astype(int)
    assert np.abs(opened - gradient(24, 16)).mean() < 8  # GIF has 256 colours, JPEG and WebP lose some


def test_transparent_pictures_stand_on_white():
    red = np.zeros((1, 3, 4), np.uint8)
    red[..., 0], red[..., 3] = 200, (0, 51, 255)  # hidden, a fifth, all
    expected = [[255, 255, 255], [0.2 * 200 + 0.8 * 255, 0.8 * 255, 0.8 * 255], [200, 0, 0]]
    opened = np.asarray(open_picture(stored(Image.fromarray(red)), WHERE))[0]
    assert np.abs(opened - np.array(expected)).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_picture(stored(palette), WHERE)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    half = stored(palette, transparency=bytes([255, 0]))
    assert np.asarray(open_picture(half, WHERE)).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert np.asarray(open_picture(stored(grey, transparency=8), WHERE)).tolist() == [[[7] * 3, [255] * 3]]
    grey.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert np.asarray(open_picture(stored(grey), WHERE)).tolist() == [[[7] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_high_byte(kind):
    levels = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    opened = np.asarray(open_picture(stored(Image.fromarray(levels), kind), WHERE))
    assert opened[0].tolist() == [[level >> 8] * 3 for level in levels[0].tolist()]


TURNED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_stand_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(gradient_picture(9, 4), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = TURNED[orientation](gradient(9, 4))
    assert picture_size(data, WHERE) == upright.shape[1::-1]
    np.testing.assert_array_equal(np.asarray(open_picture(data, WHERE)), upright)
    np.testing.assert_array_equal(np.asarray(open_picture(Image.open(io.BytesIO(data)), WHERE)), upright)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_a_file_that_is_cut_short(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = stored(Image.fromarray(noise), kind)
    (tmp_path / "7").write_bytes(data[: len(data) // 2])
    assert picture_size(tmp_path / "7", WHERE) == (64, 64)  # the header is whole, and no pixel is read
    with pytest.raises(
        ValueError, match=r"^train.jsonl, line 3: picture \S+/7 is cut short \(.*\); replace it or.*\.$"
    ):
        open_picture(tmp_path / "7", WHERE)


def test_a_damaged_file():
    data = bytearray(stored(gradient_picture(30, 30)))
    data[60:70] = bytes(10)
    with pytest.raises(
        ValueError, match=r"^train.jsonl, line 3: picture b.png (cannot be read|is cut short) \(.*\)[^\n]*$"
    ):
        open_picture({"bytes": bytes(data), "path": "b.png"}, WHERE)


def test_what_is_no_picture(tmp_path):
    text = tmp_path / "a.png"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    floats = stored(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    script = stored(gradient_picture(3, 3), "EPS")  # Pillow would run Ghostscript
    for source, said in [
        (text, r"picture \S+a.png is none in a format read here \(JPEG, .*\): it begins with b'version https://git-'"),
        (b"", r"the picture is none in a format read here .* it is empty"),
        (script, r"the picture is none in a format read here .* it begins with b'%!PS"),
        (tmp_path, r"cannot be read \(.*directory"),
        (floats, r"the picture has grey levels of 32 bits \(mode F\)"),
        ({"bytes": None, "path": None}, r"a picture must be a path, .*; this one is NoneType 'None'"),
        ("", r"a picture must be a path, .*; this one is str ''"),
        (7, r"a picture must be a path, .*; this one is int '7'"),
        (
            np.zeros((2, 2, 3)),
            r"a picture as an array must be uint8 \[height, width, 3\] or \[height, width\]; this one is float64 \[2, 2, 3\]",
        ),
        (np.zeros((3, 2, 2), np.uint8), r"a picture as an array must be uint8 .* this one is uint8 \[3, 2, 2\]"),
        (Image.new("RGB", (0, 3)), r"the picture has 0 x 3 pixels"),
    ]:
        with pytest.raises(
            ValueError, match=rf"^train\.jsonl, line 3: {'.*' if source is tmp_path else ''}{said}[^\n]*$"
        ):
            open_picture(source, WHERE)


def test_a_missing_file_is_told_with_what_is_near(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0007.png").write_bytes(b"")
    for ask in (open_picture, picture_size):
        with pytest.raises(
            FileNotFoundError, match=r"^train.jsonl, line 3: picture \S+ does not exist; near it: 0007.png\.$"
        ):
            ask(tmp_path / "cats" / "007.png", WHERE)
        with pytest.raises(FileNotFoundError, match=r"does not exist, nor does its folder \S+dogs\.$"):
            ask(tmp_path / "dogs" / "007.png", WHERE)


def test_a_bomb_is_not_decoded(monkeypatch):
    """Few bytes may claim many pixels; Pillow's limit stands, and is told in our words."""
    data = stored(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for ask in (open_picture, picture_size):
        with pytest.raises(
            ValueError, match=r"^train.jsonl, line 3: the picture has more pixels than Pillow opens .*smaller\.$"
        ):
            ask(data, WHERE)


def test_importing_takes_no_framework():
    """Worker processes that only read pictures load neither JAX nor transformers."""
    heavy = "{'jax', 'flax', 'torch', 'transformers'}"
    code = (
        f"import sys, jaxmethods.images; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
