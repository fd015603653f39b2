"""From a config and the shapes of a model to compiled functions: what `train` runs and what `plan` looks at.

Nothing here reads weights or holds an array.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmethods import adapters, data, models, quantization, sharding, training, tree
from jaxmethods.kernels.attention import cudnn, splash
from jaxmethods.launch.config import Run
from jaxmethods.objectives import preference
from jaxmethods.tree import Tree

RULES = (*adapters.RULES, *models.RULES)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A run before it holds an array. Trees are of ShapeDtypeStructs with shardings."""

    run: Run
    mesh: Mesh
    module: Any
    tx: optax.GradientTransformation
    base: Tree
    """The model's own parameters."""
    state: training.State
    fixed: Tree
    """Adapters' leaves that are not trained."""
    step: Any
    """Jitted `step(state, frozen, batch) -> (state, metrics)`; the state is donated."""
    evaluate: Any
    """Jitted `evaluate(trained, frozen, batch) -> {name: Mean}`."""

    @property
    def frozen(self) -> Tree:
        """What the step reads and never changes: the untrained part of the base, `fixed`, and the start of a reference."""
        kept = {p: x for p, x in tree.flatten(self.base).items() if p not in tree.flatten(self.state.trained)}
        return tree.unflatten(kept | tree.flatten(self.fixed) | self.start_of(tree.flatten(self.base)))

    def start_of(self, flat: dict[str, Any]) -> dict[str, Any]:
        """Of a flat base, the leaves that are trained, by the paths of the copies that the objective keeps of them."""
        if not getattr(self.run.objective, "keeps_start", False):
            return {}
        trained = tree.flatten(self.state.trained)
        return {f"{preference.START}/{path}": x for path, x in flat.items() if path in trained}

    def batch(self, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch."""
        shapes = data.batch_shapes(self.run.data, rows or self.run.batch_size, sight=self.sight, views=self.views)
        more = getattr(self.run.objective, "precomputed", ())
        shapes |= dict.fromkeys(more, ((rows or self.run.batch_size,), jnp.float32))
        place = lambda name, shape: sharding.batch_sharding(self.mesh, name, len(shape))
        return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=place(n, shape)) for n, (shape, dtype) in shapes.items()}

    @property
    def sight(self) -> Any:
        """How the model sees; None where it reads text alone."""
        return getattr(self.module, "sight", None)

    @property
    def views(self) -> Any:
        """The views that the objective takes of each row; None where it takes rows as they are."""
        return views_of(self.run)

    def initial_own(self) -> Tree:
        """The objective's parameters before the first step."""
        return jax.device_put(_own_leaves(self.run, self.module), sharding.replicated(self.mesh))

    def initial_adapters(self, base: Tree, key: jax.Array, scores: Tree) -> Tree:
        """Fresh adapter leaves over the base's parameters, created where they belong; `scores` as `adapters.init` takes them."""
        if not self.run.adapters:
            return {}
        make = lambda base, key, scores: _adapter_leaves(adapters.init(self.module, base, key, scores=scores))
        placements = sharding.shardings_for(jax.eval_shape(make, base, key, scores), self.mesh, RULES)
        return jax.jit(make, out_shardings=placements)(base, key, scores)

    def initial_state(self, trained: Tree, key: jax.Array) -> training.State:
        """The state before the first step, created where it belongs; `trained` is given away."""
        placements = jax.tree.map(lambda x: x.sharding, self.state)
        make = functools.partial(training.init_state, tx=self.tx, key=key)
        return jax.jit(make, out_shardings=placements)(trained)


def views_of(run: Run) -> Any:
    """The views that a run's objective takes of each row, or None."""
    views = getattr(run.objective, "views", None)
    return None if views is None else views()


def whole_batches(run: Run) -> bool:
    """Whether the objective's batch cannot be cut into parts whose losses add up."""
    return getattr(run.objective, "whole_batches", False)


def model_shapes(run: Run) -> tuple[Any, Tree]:
    """(module, shapes of its parameters) of the run's base model."""
    module, params = models.shapes(run.model, dtype=jnp.dtype(run.param_dtype), quantize=run.quantize)
    if run.vision is None:
        return module, params
    return models.with_eyes_shapes(module, run.vision.tower, **_eyes(run))


def load_model(run: Run, mesh: Mesh | None = None) -> tuple[Any, Tree]:
    """(module, parameters) of the run's base model."""
    module, params = models.load(run.model, dtype=jnp.dtype(run.param_dtype), mesh=mesh, quantize=run.quantize)
    if run.vision is None:
        return module, params
    told = _eyes(run) | {"pictures": _pictures(run.vision.whiten) if run.vision.whiten else ()}
    return models.with_eyes(module, params, run.vision.tower, key=jax.random.key(run.seed), mesh=mesh, **told)


def _pictures(path: str, most: int = 256) -> list[Any]:
    """Pictures of rows from all over a file.

    Raises:
        ValueError: none of these rows has one.
    """
    records = data.open_records(path)
    rows = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, most).astype(int)).tolist()]
    shown = [data.located(row.get("images"), path) for row in rows]
    found = [one for given in shown if given is not None for one in (given if isinstance(given, list) else [given])]
    if not found:
        raise ValueError(f"vision.whiten={path!r}: none of {len(rows)} rows has a field 'images'.")
    return found


def _eyes(run: Run) -> dict[str, Any]:
    assert run.vision is not None
    return {"image_token_id": run.vision.image_token_id, "pool": run.vision.pool}


def assemble(run: Run, module: Any, base: Tree, mesh: Mesh) -> Assembly:
    """Puts module, adapters, optimiser, objective and mesh together.

    Args:
        base: shapes of the base model's parameters.

    Raises:
        ValueError: a regex that matches nothing or a quantised kernel, or sizes that the mesh does not divide.
    """
    least = getattr(run.objective, "least_rows", 1)
    for name, parts in (("batch_size", run.accumulate), ("evaluation_batch_size", 1)):
        if (rows := getattr(run, name)) is not None and rows // parts < least:
            raise ValueError(
                f"{name}={rows} {f'in {parts} parts ' if parts > 1 else ''}leaves a row alone, and this objective compares rows of "
                f"a batch with each other; take {least * parts} or more."
            )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.batch_size % (ways * run.accumulate):
        least = ways * run.accumulate
        raise ValueError(
            f"batch_size={run.batch_size} must be a multiple of data x fsdp x accumulate = {least}; "
            f"try batch_size={-(-run.batch_size // least) * least}."
        )
    if (run.evaluation_batch_size or run.batch_size) % ways:
        raise ValueError(
            f"evaluation_batch_size={run.evaluation_batch_size} must be a multiple of data x fsdp = {ways}; "
            f"try evaluation_batch_size={-(-(run.evaluation_batch_size or 1) // ways) * ways}."
        )
    if run.accumulate > 1 and whole_batches(run):
        raise ValueError(
            f"accumulate={run.accumulate} would cut the batch, and a pair would have fewer negatives; leave it at 1 and set "
            "objective.chunk, which holds as little."
        )
    views = (views_of(run) or {"": data.View()}).values()
    lengths = {view.length or run.data.sequence_length for view in views if isinstance(view, data.View)}
    if uneven := sorted(length for length in lengths if length % mesh.shape["sequence"]):
        name = "data.sequence_length" if uneven[0] == run.data.sequence_length else "objective.embedding_length"
        raise ValueError(f"{name}={uneven[0]} must be a multiple of mesh.sequence={mesh.shape['sequence']}.")
    module = module.clone(
        dtype=jnp.dtype(run.compute_dtype), remat=run.remat, unroll=run.unroll, mesh=mesh,
        attention=_attention(run, module.config, mesh, lengths),
    )  # fmt: skip
    params = base
    if run.adapters:
        module = adapters.attach(module, run.adapters)
        params = adapters.init_shapes(module, base)
    params = params | jax.eval_shape(lambda: _own_leaves(run, module))
    trained, frozen = adapters.partition(params, _chosen(run, params))
    if not jax.tree.leaves(trained):
        raise ValueError(f"trained={run.trained!r} matches no parameter; nothing would be trained.")
    flat = tree.flatten(params)
    if codes := next((path for path in tree.flatten(trained) if quantization.is_part(flat, path)), None):
        raise ValueError(
            f"trained={run.trained!r} names {codes!r}, which quantize={run.quantize!r} freezes; name other parameters, or "
            "train with quantize=None."
        )
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    place = functools.partial(_placed, mesh=mesh)

    tx = run.optimizer.transformation(run.steps)
    trained = place(trained)
    opt = optax.tree.map_params(
        tx,
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(tx.init, trained),
        trained,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)),
    )
    whole = sharding.replicated(mesh)
    shape: Any = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = training.State(shape((), jnp.int32), trained, opt, shape(key.shape, key.dtype))

    loss_fn = run.objective.loss_fn(module)
    placements = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        _counting_tokens(training.make_train_step(loss_fn, tx, accumulate=run.accumulate)),
        donate_argnums=0,
        out_shardings=(placements, whole),
    )
    evaluate = jax.jit(training.make_evaluation_step(loss_fn), out_shardings=whole)
    return Assembly(run, mesh, module, tx, place(base), state, place(_adapter_leaves(frozen)), step, evaluate)


def _attention(run: Run, config: Any, mesh: Mesh, lengths: set[int]) -> str | None:
    """The device's own kernel where the rows fit it; the data room numbers positions as these need them.

    For a GPU that is not there cuDNN cannot be asked, and a plan is made with the form that XLA compiles.
    """
    platform, parts = mesh.devices.flat[0].platform, mesh.shape["sequence"]
    if platform == "tpu" and config.window_layers is None and all(splash.supports(n, parts) for n in lengths):
        return "splash"
    alone = not run.data.pack and parts == 1 and config.window_layers is None
    fits = alone and cudnn.supports(run.compute_dtype, config.head_dim, config.attention_softcap)
    return "cudnn" if fits and platform == jax.default_backend() == "gpu" else None


def _chosen(run: Run, params: Tree) -> Any:
    """Path -> whether it is trained."""
    if run.trained is not None:
        pattern = re.compile(run.trained)
        return lambda path: path.startswith(_OWN) or pattern.search(path) is not None
    if not run.adapters:
        return lambda path: True
    flat = tree.flatten(params)
    floats = lambda path: jnp.issubdtype(flat[path].dtype, jnp.floating)
    return lambda path: path.startswith(_OWN) or (adapters.is_adapter(path) and floats(path))


_OWN = "objective/"


def _own_leaves(run: Run, module: Any) -> Tree:
    """{"objective": the objective's own parameters}, or {} where it has none."""
    init = getattr(run.objective, "init", None)
    own = {} if init is None else init(module.config.hidden_size)
    return {"objective": own} if own else {}


def _adapter_leaves(params: Tree) -> Tree:
    return tree.partition(params, adapters.is_adapter)[0]


def _placed(shapes: Tree, mesh: Mesh) -> Tree:
    placements = sharding.shardings_for(shapes, mesh, RULES)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placements)


def _counting_tokens(step: training.step.Step) -> training.step.Step:
    """Adds to the metrics how many real tokens the batch had."""

    def counted(state: training.State, frozen: Tree, batch: Any) -> Any:
        state, metrics = step(state, frozen, batch)
        segments = [x for name, x in batch.items() if name.rpartition("/")[2] == "segment_ids"]
        return state, metrics | {"tokens": sum((x > 0).sum() for x in segments)}

    return counted
