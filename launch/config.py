"""The config of a run: a frozen dataclass of plain values that round-trips through JSON.

A recipe is a Python file that defines `config() -> Run`. The command line overrides its fields by name. What is said here of a
`Run` serves any other frozen dataclass of plain values, such as that of a loop of runs: it is passed as `kind`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxmethods import tree
from jaxmethods.adapters import S2FT, DoRA, LoRA, SMoRE
from jaxmethods.data import Data
from jaxmethods.objectives import CREAM, KTO, CAFe, MMedPO, Preference, Supervised
from jaxmethods.training import Optimizer

AnyAdapter = LoRA | DoRA | SMoRE | S2FT
AnyObjective = Supervised | CAFe | Preference | MMedPO | CREAM | KTO


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 once: all that are left.

    Batch rows lie over data and fsdp, parameters over fsdp and tensor, the tokens of long rows over sequence.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class Vision:
    """Eyes for a language model: a vision tower, and a projector that starts at random (`models.with_eyes`)."""

    tower: str
    """A folder or hub name of a CLIP or SigLIP model, or of an EfficientNet-Lite0 that was converted here."""
    image_token_id: int
    """Of a token that the tokenizer knows and texts do not use; stands once for each feature of a picture."""
    pool: int | None = None
    """For EfficientNet: average its 7 x 7 features to this many a side."""
    whiten: str | None = None
    """Rows with `images`: the projector starts behind the whitening of features of 256 of their pictures, and learns faster."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    A checkpoint belongs to the run that made it: fields that change the result must be the same to resume.
    """

    model: str
    """A folder in Hugging Face layout, a .gguf file, `package:DIST/FILE`, or a hub name."""
    data: Data
    """Where rows come from and how they become batches."""
    workdir: str
    """Where metrics, checkpoints and the picture go."""
    vision: Vision | None = None
    """Eyes for a model that has none; None for a model that reads text alone, or that has its own."""
    adapters: dict[str, AnyAdapter] = dataclasses.field(default_factory=dict)
    """Regex of layers -> adapter. Empty: every parameter is trained, or those that `trained` names."""
    trained: str | None = None
    """Regex of the parameters to train; by default the adapters' leaves, or all where there are no adapters."""
    objective: AnyObjective = dataclasses.field(default_factory=Supervised)
    """The loss."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    """AdamW with its schedule."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    batch_size: int = 8
    """Rows a step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is cut into, to hold fewer activations."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """How devices are arranged."""
    seed: int = 0
    """Of the adapters' start, dropout, and the order of the data."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of frozen parameters; trained ones are float32."""
    quantize: Literal["int8", "int4"] | None = None
    """Hold the frozen linear layers in 8.5 (int8) or 5 (int4) bits a weight, as GGUF's Q8_0 and Q4_1 do; None: in `param_dtype`."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass computes again instead of keeping it: dots keeps linear layers and attention."""
    unroll: int = 1
    """Layers a step of the layer scan."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: int = 2
    """Checkpoints kept: the latest ones."""
    keep_best: int = 1
    """Checkpoints kept besides: those with the lowest evaluation loss."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out rows; 0: none but at the end."""
    evaluation_batch_size: int | None = None
    """Rows a batch of the evaluation; by default `batch_size`."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: ends the run, or skips the update and goes on."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl (needs the tensorboardX package)."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace, written to the work folder."""
    compilation_cache: str | None = "~/.cache/jaxmethods/compiled"
    """Where compiled programs are kept between runs."""

    command: ClassVar[str] = "train"
    """Which command takes it."""
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"workdir", "checkpoint_every", "keep_latest", "keep_best", "evaluate_every", "evaluation_batch_size", "tensorboard",
         "profile", "compilation_cache", "unroll", "remat", "mesh"}
    )  # fmt: skip
    """Fields that may differ when it is resumed: they change what is recorded or where it is computed, not what."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep_latest", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("evaluate_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}.")
        for name, choices in (("compute_dtype", _DTYPES), ("param_dtype", _DTYPES), ("remat", ("none", "dots", "full")),
                              ("on_nonfinite", ("stop", "skip"))):  # fmt: skip
            tree.require_one_of(name, getattr(self, name), choices)
        if self.quantize is not None:
            tree.require_one_of("quantize", self.quantize, ("int8", "int4"))
            if not self.adapters and self.trained is None:
                raise ValueError(
                    f"quantize={self.quantize!r} freezes the linear layers; name `adapters` to train, or leave it None."
                )
        for pattern in (*self.adapters, *([self.trained] if self.trained else [])):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None


_DTYPES = ("float32", "bfloat16")


def load_config(path: str, kind: Any = Run) -> Any:
    """What a recipe's `config()` returns: a Run, or one of another kind.

    Raises:
        FileNotFoundError: no such file; names the nearest one.
        ValueError: the file does not define `config()`, or it returns something else, or a field is unknown or wrong.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else [], 1, 0.5
        )
        hint = f"; did you mean {file.parent / near[0]}?" if near else "."
        raise FileNotFoundError(f"config {path} does not exist{hint}")
    spec = importlib.util.spec_from_file_location("jaxmethods_config", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"config {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a recipe is read, and leaves nothing behind
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise ValueError("it defines no function config()")
        run = module.config()
    except (FileNotFoundError, KeyboardInterrupt):
        raise
    except TypeError as error:
        raise ValueError(f"config {path}: {_explain_field(str(error), kind)}") from error
    except Exception as error:
        raise ValueError(f"config {path}: {error}") from error
    finally:
        sys.dont_write_bytecode = written
    if not isinstance(run, kind):
        raise ValueError(
            f"config {path}: config() returned {type(run).__name__}, and this command takes {kind.__name__}; "
            + (f"give it to `jaxmethods {command}`." if (command := getattr(run, "command", None)) else "return that.")
        )
    return run


def _explain_field(text: str, kind: Any) -> str:
    """Turns Python's complaint about a keyword into one that suggests the nearest field."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if not match:
        return text
    name, field = match.groups()
    named = next((c for c in _classes(kind) if c.__name__ == name), None)
    return text if named is None else _unknown(named, field)


def _unknown(kind: Any, field: str) -> str:
    """Says that a dataclass has no such field, and which is nearest."""
    known = [f.name for f in dataclasses.fields(kind)]
    near = difflib.get_close_matches(field, known, 1)
    return f"{kind.__name__} has no field {field!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}."
    )


def _classes(kind: Any, seen: frozenset[Any] = frozenset()) -> list[Any]:
    """A dataclass and all dataclasses that its fields may hold."""
    if dataclasses.is_dataclass(kind):
        if kind in seen:
            return []
        found, seen = [kind], seen | {kind}
        for hint in typing.get_type_hints(kind).values():
            found += _classes(hint, seen)
        return found
    return [c for part in typing.get_args(kind) for c in _classes(part, seen)]


def to_json(value: Any, *, whole: bool = True) -> Any:
    """Plain JSON values; a dataclass becomes an object with its class under "kind". Not `whole`: without what is free on resume."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        left_out = () if whole else getattr(value, "free_on_resume", ())
        fields = {name: to_json(getattr(value, name), whole=whole) for name in names if name not in left_out}
        return {"kind": type(value).__name__} | fields
    if isinstance(value, dict):
        return {str(k): to_json(v, whole=whole) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v, whole=whole) for v in value]
    return value


def from_json(value: Any, of: Any = Run) -> Any:
    """Undoes `to_json`, of a Run or of another kind.

    Raises:
        ValueError: an unknown kind or field; names the nearest.
    """
    if isinstance(value, list):
        return tuple(from_json(v, of) for v in value)
    if not isinstance(value, dict):
        return value
    fields = {k: from_json(v, of) for k, v in value.items() if k != "kind"}
    if "kind" not in value:
        return fields
    known = {c.__name__: c for c in _classes(of)}
    tree.require_one_of("kind", value["kind"], tuple(known))
    kind = known[value["kind"]]
    for field in fields:
        if field not in {f.name for f in dataclasses.fields(kind)}:
            raise ValueError(_unknown(kind, field))
    try:
        return kind(**fields)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(str(error)) from error


def read_json(path: Any, kind: Any = Run) -> Any:
    """The config in a work folder's config.json."""
    return from_json(json.loads(path.read_text()), kind)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{field: (old, new)} of the fields that matter to resuming and differ, nested ones by dotted names."""
    one, two = (_flat(to_json(run, whole=False)) for run in (old, new))
    return {n: (one.get(n), two.get(n)) for n in one | two if one.get(n) != two.get(n)}


def check_folder(workdir: Any, run: Any, flag: str = "--workdir") -> None:
    """Refuses a work folder that holds another run, or anything else; `flag` names it on the command line."""
    file = workdir / "config.json"
    if file.exists():
        try:
            different = differences(read_json(file, type(run)), run)
        except ValueError as error:
            raise ValueError(f"{file} is not a config of this version ({error}); choose another {flag}.") from error
        if different:
            shown = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in different.items())
            raise ValueError(
                f"work folder {workdir} belongs to another run ({shown}); choose another {flag} or make them equal."
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"work folder {workdir} is not empty and holds no config.json; choose another {flag}.")


def claim(workdir: Any, run: Any) -> None:
    """Makes the work folder and writes the run into it."""
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.json.partial"
    partial.write_text(json.dumps(to_json(run), indent=2) + "\n")
    partial.replace(workdir / "config.json")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }
