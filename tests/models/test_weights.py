"""Safetensors files by slices: the same bytes as the reference implementation, and clear words about broken files."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxmethods.models import weights

RNG = np.random.default_rng(0)
ARRAYS = {
    "f32": RNG.normal(size=(5, 7)).astype(np.float32),
    "f16": RNG.normal(size=(3, 2, 2)).astype(np.float16),
    "bf16": RNG.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
    "f64": RNG.normal(size=(9,)),
    "empty": np.zeros((0, 3), np.float32),
}


def planned(arrays):
    return [weights.Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]


def test_reads_what_the_reference_writes(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(ARRAYS, file, metadata={"format": "np"})
    tensors, metadata = weights.read_header(file)
    assert metadata == {"format": "np"} and tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = weights.read_slice(name, tensors[name], (slice(None),))
        assert read.dtype == array.dtype and np.array_equal(read, array), name
    assert np.array_equal(
        weights.read_slice("bf16", tensors["bf16"], (slice(1, 5), slice(2, 3))), ARRAYS["bf16"][1:5, 2:3]
    )


def test_the_reference_reads_what_we_write(tmp_path):
    file = tmp_path / "x.safetensors"
    weights.write(file, planned(ARRAYS), {"format": "pt"})
    read = load_file(file)
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype and np.array_equal(read[name], array), name
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_hold_all_tensors_in_order_within_the_size():
    tensors = planned({str(i): np.zeros(n, np.float32) for i, n in enumerate([2, 2, 1, 9, 1, 1, 1, 1, 3])})
    shards = weights.in_shards(tensors, 16)
    assert [[tensor.name for tensor in shard] for shard in shards] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5", "6", "7"],
        ["8"],
    ]


def test_quantised_numbers_are_refused_by_name(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"w": np.zeros((2, 2), np.int8)}, file)
    tensors, _ = weights.read_header(file)
    with pytest.raises(ValueError, match=r"'w' is stored as I8"):
        weights.read_slice("w", tensors["w"], (slice(None),))


def written(tmp_path, header: bytes, data: bytes):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


def entry(begin: int, end: int, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_cut_short_tells_both_sizes(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"w": np.zeros((8, 8), np.float32)}, file)
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) - 200, 40, 9):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"x.safetensors is cut short: .* {length};") as error:
            weights.read_header(file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"bytes beyond its tensors"):
        weights.read_header(file)


@pytest.mark.parametrize(
    "header, data",
    [
        (b"not json", b""),
        (b"[]", b""),
        (b'{"w": 3}', b""),
        (b'{"w": {"dtype": "F32"}}', b""),
        (json.dumps({"w": entry(0, 4)}).encode(), b"1234"),  # shape [2] takes 8 bytes
        (json.dumps({"w": entry(-8, 0)}).encode(), b""),
        (json.dumps({"w": entry(0, 8, shape=(-2,))}).encode(), b"12345678"),
        (json.dumps({"a": entry(0, 8), "b": entry(0, 8)}).encode(), b"12345678"),  # overlap
        (json.dumps({"a": entry(8, 16)}).encode(), bytes(16)),  # a hole
        (b"[" * 100_000, b""),
    ],
)
def test_a_broken_header_is_one_clear_line(tmp_path, header, data):
    with pytest.raises(ValueError, match=r"x.safetensors") as error:
        weights.read_header(written(tmp_path, header, data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x00" * 8, b"\xff" * 64, b"<html>not found</html>"])
def test_what_is_no_safetensors_file_is_said_so(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a safetensors file|cut short"):
        weights.read_header(file)
