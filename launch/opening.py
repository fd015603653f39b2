"""Opens what the other programs work on: a run's work folder, or any model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from jaxmethods import adapters, models, sharding, training, tree
from jaxmethods.evals.sentences import Embedder, sentence_embedder
from jaxmethods.launch import config as run_config
from jaxmethods.launch.assembly import assemble, load_model, model_shapes


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that is ready to be asked."""

    module: Any
    params: tree.Tree
    tokenizer: Any
    run: run_config.Run | None
    """The run it comes from; None for a plain model."""
    step: int = 0

    def base(self) -> Opened:
        """The model before training: adapters off. A run that trained the base itself is opened anew."""
        if self.run is None:
            return self
        if self.run.trained is not None or not self.run.adapters:
            return Opened(*load_model(self.run), self.tokenizer, None)
        module, params = adapters.detach(self.module, self.params)
        return dataclasses.replace(self, module=module, params=params, run=None)


def is_run(path: str) -> bool:
    """Whether a folder is a run's work folder."""
    folder = epath.Path(path)
    return (folder / "checkpoints").is_dir() and (folder / "config.json").is_file()


def open_model(path: str, *, best: bool = False) -> Opened:
    """Opens a work folder at its latest (or best) checkpoint, or a model as `models.load` does.

    Raises:
        ValueError: a work folder without a checkpoint that can be read.
        FileNotFoundError: no such folder or model.
    """
    if not is_run(path):
        module, params = models.load(path)
        return Opened(module, params, models.load_tokenizer(path), None)
    workdir = epath.Path(path)
    run = run_config.read_json(workdir / "config.json")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    run = dataclasses.replace(run, mesh=run_config.Mesh(1, 1, 1))
    assembly = assemble(run, *model_shapes(run), mesh)
    checkpoints = training.Checkpoints(workdir / "checkpoints", keep_latest=run.keep_latest, keep_best=run.keep_best)
    restored = checkpoints.restore(assembly.state, assembly.fixed, step=checkpoints.best() if best else None)
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{path} holds no checkpoint yet; train first.")
    state, fixed = restored
    _, base = load_model(_as_left(run, state.trained))
    flat = tree.flatten(base) | tree.flatten(fixed) | tree.flatten(state.trained)
    # The kernel that training chose fits its rows; those to come may be packed, or padded on the left.
    module = assembly.module.clone(attention=None)
    return Opened(module, tree.unflatten(flat), models.load_tokenizer(run.model), run, int(state.step))


def open_encoder(path: str, *, truncate: str = "right", batch_size: int = 64) -> Embedder:
    """Texts to vectors, by the sentence encoder in a folder, of a package (package:DIST/FOLDER) or by a hub name.

    Args:
        truncate, batch_size: as of `sentence_embedder`.

    Raises:
        ValueError: another kind of model.
        FileNotFoundError: no such folder or package.
    """
    module, params = models.load(path)
    if not isinstance(module, models.TextEncoder):
        raise ValueError(f"{path} holds a {type(module).__name__}; give a sentence encoder, such as MiniLM.")
    return sentence_embedder(module, params, models.load_tokenizer(path), truncate=truncate, batch_size=batch_size)


def _as_left(run: run_config.Run, trained: tree.Tree) -> run_config.Run:
    """The run without what only a start needs: a projector that was trained is not whitened once more."""
    if run.vision is None or "projector" not in trained:
        return run
    return dataclasses.replace(run, vision=dataclasses.replace(run.vision, whiten=None))
