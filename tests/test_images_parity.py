# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""The same crops as transformers' image processors, and the same image tokens as its LLaVA-OneVision."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image, ImageDraw
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxmethods.images import NEWLINE, ImageFormat, open_picture, prepare

SIDE = 28
RAW = {"do_rescale": False, "do_normalize": False}  # what is compared is grey levels
SQUARE = {"height": SIDE, "width": SIDE}
SHORTEST = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
GRID = tuple(itertools.product((SIDE, 2 * SIDE, 3 * SIDE), repeat=2))
PINPOINTS = [list(one) for one in GRID]
MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's

CASES = {
    "clip": (CLIPImageProcessorPil(**SHORTEST, **RAW), ImageFormat(SIDE, 2)),
    "clip-bilinear": (CLIPImageProcessorPil(**SHORTEST, resample=2, **RAW), ImageFormat(SIDE, 2, resample="bilinear")),
    "siglip": (SiglipImageProcessorPil(size=SQUARE, **RAW), ImageFormat(SIDE, 2, resize="squash")),
    "llava": (LlavaImageProcessorPil(**SHORTEST, **RAW), ImageFormat(SIDE, 2)),
    "llava-pad": (
        LlavaImageProcessorPil(**SHORTEST, do_pad=True, image_mean=MEAN, **RAW), ImageFormat(SIDE, 2, resize="pad"),
    ),
    "llava-onevision": (
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS, **RAW),
        ImageFormat(SIDE, 2, resize="anyres", resolutions=GRID),
    ),
}  # fmt: skip
SIZES = [(1, 1), (SIDE, SIDE), (29, 27), (90, 61), (61, 90), (200, 10), (11, 220), (1, 999), (333, 250)]


def noise(width: int, height: int) -> Image.Image:
    """Saturated noise: the hardest for two ways of rounding to agree on."""
    return Image.fromarray(np.random.default_rng(0).choice([0, 255], (height, width, 3)).astype(np.uint8))


def drawing(width: int, height: int) -> Image.Image:
    """Shapes with sharp edges over a gradient."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 5, height // 5, width // 2, height // 2), fill="white", outline="red")
    draw.line((0, height, width, 0), fill="black", width=3)
    return picture


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width, height", SIZES)
def test_crops_parity(name, width, height):
    processor, format = CASES[name]
    for picture in (noise(width, height), drawing(width, height)):
        theirs = np.asarray(processor(picture)["pixel_values"][0])
        theirs = theirs.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(prepare(picture, format).crops, theirs)


def test_several_pictures_of_an_example_parity():
    """LLaVA-OneVision makes one crop of each."""
    processor, format = CASES["llava-onevision"]
    processor = type(processor)(size=SQUARE, image_grid_pinpoints=PINPOINTS, image_mean=MEAN, **RAW)
    pictures = [drawing(90, 61), noise(30, 100)]
    theirs = processor([pictures])["pixel_values"]
    for picture, other in zip(pictures, theirs, strict=True):
        np.testing.assert_array_equal(prepare(picture, format.one_crop).crops, np.asarray(other).transpose(0, 2, 3, 1))


def onevision(size: int, grid: int, largest: int, max_crops: int | None, newline: bool = True) -> ImageFormat:
    sides = range(size, largest * size + 1, size)
    resolutions = tuple(itertools.product(sides, repeat=2))
    return ImageFormat(size, grid, "anyres", resolutions=resolutions, max_crops=max_crops, newline=newline)


FEW = [(8, 8), (24, 24), (12, 40), (23, 31), (9, 64)]
FULL = onevision(384, 27, 6, 9)  # the published models
SMALL = onevision(9, 3, 3, 2)
NEAR = [(1308, 1152), (1422, 1152)]  # a little less and a little more than what is interpolated
LARGE = [(384, 384), (1000, 700), (2304, 2304), (3000, 150), (1, 1), (150, 3000), (1919, 1080), (1, 5000), (5000, 2)]
PACKED = {
    "full": (FULL, LARGE + NEAR),
    "small": (SMALL, [*itertools.product((2, 3, 5, 8, 13, 21, 34), repeat=2), (100, 71), (20, 1), (33, 660), (999, 1)]),
    "even": (onevision(8, 4, 3, 2), [(8, 8), (24, 24), (40, 3), (3, 40), (23, 31), (64, 9), (20, 1), (20, 8)]),
    "one": (onevision(9, 3, 3, 1), FEW),
    "no-newline": (onevision(9, 3, 3, 2, newline=False), FEW),
    "all": (onevision(9, 3, 3, None), FEW),
}


def their_tokens(features: np.ndarray, newline: np.ndarray, format: ImageFormat, width: int, height: int) -> np.ndarray:
    vision = SimpleNamespace(image_size=format.size, patch_size=format.size // format.grid)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(one) for one in format.resolutions])
    packed, lengths = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.tensor(features)],
        torch.tensor([[height, width]]),
        image_newline=torch.tensor(newline) if format.newline else None,
        vision_aspect_ratio=f"anyres_max_{format.max_crops or 1000}",
    )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0].numpy()


def our_tokens(features: np.ndarray, newline: np.ndarray, prepared) -> np.ndarray:
    table = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None], newline[None]])
    assert NEWLINE == -2  # so it indexes the last but one
    taken = table[prepared.places]
    return taken[:, 0] if prepared.weights is None else (taken * prepared.weights[..., None]).sum(axis=1)


@pytest.mark.parametrize("name", PACKED)
def test_tokens_parity(name):
    """In float64, where torch's interpolation has its own formula's weights: in float32 it is off by 1e-5 of a step."""
    format, sizes = PACKED[name]
    rng = np.random.default_rng(0)
    newline = rng.normal(size=5)
    for width, height in sizes:
        prepared = prepare(Image.new("RGB", (width, height)), format)
        features = rng.normal(size=(len(prepared.crops), format.grid**2, 5))
        theirs = their_tokens(features, newline, format, width, height)
        assert format.tokens_of(width, height) == len(theirs)
        np.testing.assert_allclose(
            our_tokens(features, newline, prepared), theirs, atol=1e-6, err_msg=f"{width}x{height}"
        )


def test_tokens_of_one_crop_parity():
    format, rng = SMALL.one_crop, np.random.default_rng(0)
    prepared = prepare(Image.new("RGB", (10, 20)), format)
    features, newline = rng.normal(size=(1, 9, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    theirs = their_tokens(features, newline, format, 10, 20)
    np.testing.assert_array_equal(our_tokens(features, newline, prepared), theirs)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA", "LA", "turned"])
def test_reading_parity(mode):
    picture = drawing(20, 13)
    exif = Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    elif "A" in mode:
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(np.arange(260, dtype=np.uint8).reshape(13, 20)))
    else:
        picture = picture.convert(mode)
    file = io.BytesIO()
    picture.save(file, "TIFF" if mode == "CMYK" else "PNG", exif=exif)
    theirs = Image.open(io.BytesIO(file.getvalue()))
    theirs = convert_to_rgb(theirs, return_numpy=True) if "A" in mode else np.asarray(load_image(theirs))
    np.testing.assert_array_equal(np.asarray(open_picture(file.getvalue(), "a picture")), theirs)
