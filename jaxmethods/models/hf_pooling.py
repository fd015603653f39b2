"""How a sentence encoder makes one vector of a text: modules.json and a folder, as sentence-transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmethods.models import files

_MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}
"""What they are called there -> `TextEncoderConfig.pooling`."""
_KEYS = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token"}


def read_pooling(folder: Path) -> str | None:
    """The pooling that a model's folder names; None where it names none.

    Raises:
        ValueError: another kind of pooling, several at once, or modules that change the vector, such as a linear layer.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in _modules(file)}
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"{file} has a {unknown[0]} behind the encoder, which is not supported.")
    if "Pooling" not in kinds:
        return None
    told = files.read_json(folder / kinds["Pooling"] / "config.json")
    chosen = [key.removeprefix("pooling_mode_") for key, on in told.items() if key.startswith("pooling_mode_") and on]
    chosen = chosen or [str(told.get("pooling_mode"))]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ValueError(
            f"{folder / kinds['Pooling']} pools {' and '.join(chosen)}; supported are mean_tokens and cls_token."
        )
    return _MODES[chosen[0]]


def write_pooling(folder: Path, pooling: str, width: int) -> None:
    """Writes what `read_pooling` reads, and sentence-transformers."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    files.write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    modes = {key: pooling == mode for mode, key in _KEYS.items()}
    files.write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | modes)


def _modules(file: Path) -> list[dict[str, Any]]:
    told = files.parsed(file)
    if not isinstance(told, list) or not all(isinstance(one, dict) and {"type", "path"} <= one.keys() for one in told):
        raise ValueError(f"{file} must hold a list of modules with type and path.")
    return told
