"""Where a model is: a folder, a .gguf file, a file inside an installed package, or a name on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local folder or .gguf file that `path` means.

    Args:
        path: a folder or a .gguf file; "package:NAME/FILE", a file that the installed package NAME brings along; or
            "organisation/name" on the hub, fetched into its cache (JSON, safetensors and tokenizer files, no pickles).
        weights: false fetches a hub model's configuration and tokenizer only.

    Raises:
        FileNotFoundError: nothing is there; the message names what looks similar.
        ConnectionError: a hub name, and the hub does not answer.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        return _in_package(text)
    if not text:
        raise FileNotFoundError("the path of the model is empty: no such folder or .gguf file.")
    local = Path(text).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.is_file():
        raise FileNotFoundError(f"{local} is a file; give the folder it is in (with config.json), or a .gguf file.")
    if HUB_NAME.fullmatch(text) and local.suffix != ".gguf" and not local.parent.is_dir():
        return _from_hub(text, weights)
    raise FileNotFoundError(f"{text}: no such folder or .gguf file{_similar(local)}.")


def first_installed(path: str, otherwise: str) -> str:
    """`path` ("package:NAME/FILE") where its package is installed, else `otherwise`, such as a hub name: for recipes."""
    try:
        metadata.distribution(path.removeprefix("package:").partition("/")[0])
    except metadata.PackageNotFoundError:
        return otherwise
    return path


def revision(path: str | os.PathLike[str]) -> str | None:
    """What pins a model beyond its name: the commit of a hub model, the version of a package; None for files and folders.

    Raises:
        FileNotFoundError, ConnectionError: as `resolve`.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        return metadata.version(text.removeprefix("package:").split("/")[0])
    found = resolve(path, weights=False)
    return found.name if found.parent.name == "snapshots" else None


def _similar(path: Path) -> str:
    """The names near `path` in the deepest folder of it that exists."""
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    try:
        near = difflib.get_close_matches(name, [entry.name for entry in parent.iterdir()], n=3)
    except OSError:
        return ""
    return f"; near it: {', '.join(str(parent / other) for other in near)}" if near else ""


def _in_package(text: str) -> Path:
    package, _, inside = text.removeprefix("package:").partition("/")
    if not package or not inside:
        raise ValueError(f"{text!r} must be package:NAME/FILE, with a file that the package NAME installs.")
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{text}: {package} is not installed; run: pip install --no-deps {package}") from None
    found = Path(str(distribution.locate_file(inside)))
    if not found.exists():
        raise FileNotFoundError(f"{text}: {package} {distribution.version} has no {inside}{_similar(found)}.")
    return found


def _from_hub(name: str, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    wanted = [*_TOKENIZER, *(["*.safetensors"] if weights else [])]
    unwanted = [*_PICKLES, "*/*", "consolidated*"]  # no subfolders, and no second copy in Mistral's own layout
    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
        if (found / "modules.json").is_file():  # a sentence encoder, which says in a folder how it pools
            huggingface_hub.snapshot_download(name, revision=found.name, allow_patterns=["*_Pooling/config.json"])
        return found
    except errors.GatedRepoError:
        raise PermissionError(
            f"{name} asks its readers to agree to its terms: do so on its page, then log in (hf auth login)."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub has no public model of this name (for a private one: hf auth login)."
        ) from None
    except (
        Exception
    ) as error:  # offline mode, no network, time-outs, server errors: of several libraries, no common base
        reason = str(error).strip().splitlines() or [""]
        raise ConnectionError(
            f"{name}: no such folder, and the hub does not answer ({type(error).__name__}: {reason[0][:150]}); "
            "download the model where there is a network and give its folder."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    content = parsed(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def parsed(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{file} is no valid JSON ({error}).") from None


def write_json(file: Path, content: dict[str, Any] | list[Any]) -> None:
    """Writes JSON to be read by people too."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = folder / "config.json"
    if file.is_file():
        return read_json(file)
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter, not a model; load its base model, then the adapter (load_peft)."
        )
    raise FileNotFoundError(f"{folder} has no config.json; a model folder holds config.json and .safetensors files.")


def weight_files(folder: Path) -> dict[str, Path] | Path:
    """Where the weights of a model folder are: one file, or tensor name -> file as the index tells.

    Raises:
        FileNotFoundError: no weights, or a file that the index names is missing.
        ValueError: pickled weights only, or an index that points outside its folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and not index.is_file():
        return single
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index} must map tensor names to files under 'weight_map'.")
        files = {name: _inside(folder, name, index) for name in sorted(set(listed.values()))}
        return {tensor: files[name] for tensor, name in listed.items()}
    if pickles := sorted(file.name for kind in _PICKLES for file in folder.glob(kind)):
        raise ValueError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run any code and is not opened; "
            "convert it once with transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)."
        )
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds {others[0]} but neither model.safetensors nor model.safetensors.index.json; "
            "rename a single file, or fetch the index of several."
        )
    raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json.")


def _inside(folder: Path, name: str, index: Path) -> Path:
    file = folder / name
    real, homes = file.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # the hub's cache links a snapshot's files to its blobs
        homes.append(folder.resolve().parent.parent / "blobs")
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"{index} points outside its folder ({name!r}); such an index is not followed.")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {name}, which {index.name} lists; fetch the missing file.")
    return file
