"""Programs for TPUs that are not here: what their compiler reports (pip install 'jaxmethods[aot]')."""

import importlib.util
from typing import NamedTuple

import pytest

from jaxmethods.launch import hlo, targets


def needs_compiler(test):
    """Marks a test that takes the TPU's compiler; `pytest -m tpu_compiler` runs them all."""
    skip = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
    return pytest.mark.tpu_compiler(skip(test))


TOPOLOGIES = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")


def needs_cuda_compiler(test):
    """Marks a test that takes JAX's CUDA plugin (pip install 'jaxmethods[aot-cuda]')."""
    return pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin")(
        test
    )


class Report(NamedTuple):
    traffic: int
    temporaries: int
    text: str


def report(topology, function, *shapes):
    """`function` compiled for one device of a topology."""
    compiled, text = targets.compile_on_one(topology, function, *shapes)
    return Report(hlo.memory_traffic(hlo.parse(text)), compiled.memory_analysis().temp_size_in_bytes, text)
