"""Heat maps: read as what they are, and laid on pictures where they fit."""

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data import heat_maps

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "fits"), [((14, 14), False), ((14, 10), True), ((7, 5), True), ((300, 224), True), ((600, 448), False)]
)
def test_heat_maps_of_a_coarser_grid_fit_by_their_proportions(shape, fits):
    heat = RNG.random(shape).astype(np.float32)
    if not fits:
        with pytest.raises(
            ValueError, match=r"row 3: the heat map has .* which do not fit; resize the map to 224 x 300"
        ):
            heat_maps.fitted(heat, (300, 224, 3), "row 3")
        return
    found = heat_maps.fitted(heat, (300, 224, 3), "row 3")
    assert found.shape == (300, 224) and heat.min() <= found.min() and found.max() <= heat.max()
    np.testing.assert_allclose(found.mean(), heat.mean(), atol=0.05)


def test_heat_maps_are_read_as_what_they_are(tmp_path):
    def read(content, name="heat.npy"):
        np.save(tmp_path / name, content) if isinstance(content, np.ndarray) else (tmp_path / name).write_bytes(content)
        return heat_maps.read_heat_map(str(tmp_path / name), "row 3")

    np.testing.assert_array_equal(read(np.array([[0, 255]], np.uint8)), [[0, 1]])
    np.testing.assert_array_equal(read(np.array([[0.25, 1.0]])), [[0.25, 1.0]])
    for content, said in (
        (np.array([[0, 2.0]]), r"goes from 0 to 2; it must lie in \[0, 1\]"), (np.array([[np.nan]]), "must lie in"),
        (np.zeros((2, 2, 3)), r"float64 \[2, 2, 3\]; it must be"), (np.array([[1, 2]]), r"int64 \[1, 2\]"),
        (np.array([["a"]], object), "cannot be read"), (b"", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"row 3: heat map .*{said}"):
            read(content)
    coloured = tmp_path / "heat.png"
    Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)).save(coloured)
    with pytest.raises(ValueError, match="is coloured; give grey levels"):
        heat_maps.read_heat_map(str(coloured), "row 3")
    for name in ("none.npy", "none.png"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            heat_maps.read_heat_map(str(tmp_path / name), "row 3")
