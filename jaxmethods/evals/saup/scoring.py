"""What a model makes of trajectories: log-probabilities of each step's thought and action, from one forward pass of the whole.

The trajectory is laid out as a chat, the agent's turns being the assistant's. Tokens of the question, of observations, of the
template and of the labels "Thought:" and "Action:" count nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int32

from jaxmethods import data
from jaxmethods.data import trajectories
from jaxmethods.evals.saup.uncertainty import StepLogps, sum_by_step
from jaxmethods.models.functional import target_logps
from jaxmethods.tree import Tree

_ROOM = 128  # tokens: widths are multiples of it, so that batches share their compiled programs


class Scored(NamedTuple):
    """Trajectories as arrays."""

    logps: StepLogps
    """[B, N], numpy; 0 at padding."""
    mask: Bool[np.ndarray, "batch steps"]
    """True at steps."""
    tokens: Int32[np.ndarray, "batch"]
    """Of the whole trajectory."""


class Laid(NamedTuple):
    """A trajectory as tokens: [T] each; `part` is 0, or 1 for a thought's tokens and 2 for an action's, of step `step`."""

    tokens: np.ndarray
    step: np.ndarray
    part: np.ndarray


def checked(row: Mapping[str, Any], where: str) -> None:
    """Checks one trajectory.

    Raises:
        ValueError: names the row, and what is missing or empty.
    """
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ValueError(f"{where}: field 'question' must be text that is not empty; the fields are {', '.join(row)}.")
    steps = row.get("steps")
    if not isinstance(steps, list | tuple) or not steps:
        raise ValueError(f"{where}: field 'steps' must be a list with one step at least; leave empty trajectories out.")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, Mapping) or not all(isinstance(step.get(name), str) for name in ("thought", "action")):
            raise ValueError(
                f"{where}, step {number}: a step must be {{'thought', 'action', 'observation'}}, all text."
            )
        if not isinstance(step.get("observation", ""), str | None):
            raise ValueError(f"{where}, step {number}: 'observation' must be text; the last step's may be ''.")
        if not (step["thought"] + step["action"]).strip():
            raise ValueError(f"{where}, step {number}: neither a thought nor an action, so nothing has a probability.")


def lay_out(renderer: data.Renderer, row: Mapping[str, Any], where: str) -> Laid:
    """A trajectory as tokens with the steps that they are of.

    Raises:
        ValueError: a row that is no trajectory, what `data.Renderer` raises, or a tokenizer whose tokens of an answer depend on
            what stands around it.
    """
    checked(row, where)
    example = renderer({"messages": trajectories.conversation(row)}, where)
    tokens, target = np.asarray(example.tokens), np.asarray(example.target_mask)
    starts = np.flatnonzero(target & ~np.concatenate([[False], target[:-1]]))
    step, part = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
    if len(starts) != len(row["steps"]):
        raise ValueError(f"{where}: the chat template does not part the agent's turns, so steps cannot be told apart.")
    for number, (start, said) in enumerate(zip(starts, row["steps"], strict=True)):
        ids, of = _parts(renderer.tokenizer, said)
        place = slice(start, start + len(ids))
        if not np.array_equal(tokens[place], ids) or not target[place].all():
            raise ValueError(
                f"{where}, step {number + 1}: this tokenizer writes the words of a turn otherwise within the chat."
            )
        step[place], part[place] = number, of
        if not of.any():
            raise ValueError(f"{where}, step {number + 1}: neither thought nor action has a token of its own.")
    return Laid(tokens, step, part)


def _parts(tokenizer: Any, step: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(ids of what is said in a step, part of each): a token is of the text that it has a character of."""
    text = trajectories.spoken(step)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    thought = len("Thought: ")
    bounds = ((thought, thought + len(step["thought"]), 1), (len(text) - len(step["action"]), len(text), 2))
    of = lambda start, end: next((part for low, high, part in bounds if start < high and end > low), 0)
    return np.array(encoded["input_ids"], np.int32), np.array(
        [of(*ends) for ends in encoded["offset_mapping"]], np.int32
    )


def score(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int = 2048,
    batch_size: int = 8,
    places: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Scored:
    """Log-probabilities of all steps of all trajectories. No step is ever left out.

    Args:
        rows: trajectories, as in `data.trajectories`; "observation" may be missing in the last step.
        max_tokens: of a trajectory; a longer one is an error, since without it the means would be of other steps.
        batch_size: trajectories at a time, those of like length together.
        places: where each row stands, for errors.

    Raises:
        ValueError: no trajectory, one that is empty, malformed or too long, or a log-probability that is not finite; names it.
    """
    if not len(rows):
        raise ValueError("there is no trajectory to score; give at least one.")
    names = places or [f"trajectory {i}" for i in range(1, len(rows) + 1)]
    renderer = data.Renderer(tokenizer)
    laid = [lay_out(renderer, row, name) for row, name in zip(rows, names, strict=True)]
    lengths = np.array([len(one.tokens) for one in laid], np.int32)
    if lengths.max() > max_tokens:
        i = int(lengths.argmax())
        raise ValueError(
            f"{names[i]} has {lengths[i]} tokens, and max_tokens is {max_tokens}; raise it, or shorten observations in the data."
        )
    steps = max(len(row["steps"]) for row in rows)
    sums = [np.zeros((len(rows), steps), kind) for kind in (np.float32, np.float32, np.int32, np.int32)]
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        progress(f"{start + 1} to {min(start + batch_size, len(order))} of {len(order)} trajectories")
        some = order[start : start + batch_size]
        width = -(-int(lengths[some[-1]]) // _ROOM) * _ROOM
        arrays = _padded([laid[i] for i in some], batch_size, width)
        for total, part in zip(sums, jax.device_get(_sums(module, params, *arrays, steps)), strict=True):
            total[some] = part[: len(some)]
    mask = np.arange(steps) < np.array([[len(row["steps"])] for row in rows])
    if not (sound := np.isfinite(sums[0] + sums[1])).all():
        row, step = np.argwhere(~sound)[0]
        raise ValueError(
            f"{names[row]}, step {step + 1}: its log-probability is not finite; the model is broken, or overflows."
        )
    return Scored(StepLogps(*sums), mask, lengths)


def _padded(laid: Sequence[Laid], rows: int, width: int) -> list[np.ndarray]:
    """tokens, step, part and mask, [rows, width], padded behind."""
    arrays = [np.zeros((rows, width), np.int32) for _ in range(3)]
    mask = np.zeros((rows, width), bool)
    for i, one in enumerate(laid):
        for array, values in zip(arrays, one, strict=True):
            array[i, : len(values)] = values
        mask[i, : len(one.tokens)] = True
    return [*arrays, mask]


@functools.partial(jax.jit, static_argnums=(0, 6))
def _sums(module: Any, params: Tree, tokens: Any, step: Any, part: Any, mask: Any, steps: int) -> StepLogps:
    logps, _ = target_logps(module, params, tokens, part > 0, mask)
    return sum_by_step(logps, step, part, steps)
