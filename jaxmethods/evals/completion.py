"""How well a model completes prompts whose answers are known: likelihood of the answers, and agreement of its own with them.

Rows may have pictures, for models that see: {"prompt": "<image>\\nWhat is this?", "answer": ..., "images": PATH}.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Int64

from jaxmethods import data, generation
from jaxmethods.models import pictures
from jaxmethods.models.functional import target_logps
from jaxmethods.tree import Tree


@dataclasses.dataclass(frozen=True)
class Completion:
    """Means over rows, and what the model answered.

    nll: nats an answer token, the closing token included. perplexity: exp(nll). rouge_l: F-measure of the longest common
    subsequence of words, 0..1. exact: share of answers that are the given ones, but for case, punctuation and white space.
    """

    nll: float
    rouge_l: float
    exact: float
    answers: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


def evaluate(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    sequence_length: int = 512,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    system: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Completion:
    """Scores the rows' answers and compares the model's greedy ones with them.

    Args:
        rows: {"prompt", "answer"} and perhaps "images"; put into the tokenizer's chat template as in training.
        sequence_length: tokens a row of the scoring batches; longer rows are cut as in training.
        system: what a message of the system says first; None leaves that to the template.
    """
    progress("scoring the given answers")
    first = [] if system is None else [{"role": "system", "content": system}]
    asked = (
        [[*first, {"role": "user", "content": row["prompt"]}] for row in rows] if first else [r["prompt"] for r in rows]
    )
    scored = rows
    if first:
        answer = lambda row: {"role": "assistant", "content": row["answer"]}
        scored = [
            {"messages": [*ask, answer(row)], "images": row.get("images")} for ask, row in zip(asked, rows, strict=True)
        ]
    nll = answer_nll(module, params, tokenizer, scored, sequence_length=sequence_length, batch_size=batch_size)
    answers = complete(
        module, params, tokenizer, asked, images=[row.get("images") for row in rows],
        max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    overlap = [rouge_l(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    exact = [same(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    return Completion(nll, float(np.mean(overlap)), float(np.mean(exact)), tuple(answers))


def plain(text: str) -> str:
    """The words of a text, in lower case, with one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def jaccard(first: str, second: str) -> float:
    """|A and B| / |A or B| of the sets of words of two texts, in any case; 1 where neither has one."""
    a, b = (set(plain(text).split()) for text in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


def same(said: str, answer: str) -> bool:
    """Whether an answer is the given one, but for case, punctuation and white space."""
    return plain(said) == plain(answer)


def majority(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The most frequent answer, and how often it is right."""
    (answer, count), *_ = collections.Counter(plain(row["answer"]) for row in rows).most_common(1)
    return answer, count / len(rows)


def answer_nll(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    sequence_length: int,
    batch_size: int,
) -> float:
    """Mean of -log p over all answer tokens of all rows, nats."""
    config = data.Data(sequence_length=sequence_length)
    laid_out, _ = data.build(config, tokenizer, rows=rows, sight=getattr(module, "sight", None))
    sums, lengths = _scored(module, params, laid_out, batch_size)
    return float(-sums.sum(dtype=np.float64) / max(lengths.sum(), 1))


def answer_logps(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    sequence_length: int,
    batch_size: int,
) -> tuple[Float32[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
    """(log p of each row's last answer, summed over its tokens; how many these are), the closing token included.

    Nothing is cut: a row of more than `sequence_length` tokens has the sum nan, and its length. One compiled program.

    Args:
        rows: {"prompt", "answer"} or {"messages"}, all of one form, and perhaps "images".

    Raises:
        ValueError: an answer that is empty; and what `data.Renderer` raises.
    """
    sight = getattr(module, "sight", None)
    placed = data.records_in_memory(rows).placed()
    examples = [example for _, example in data.Renderer(tokenizer, sight=sight, marks="last").many(placed)]
    fits = np.array([len(example.tokens) <= sequence_length for example in examples])
    sums, lengths = np.full(len(rows), np.nan, np.float32), np.array([e.target_mask.sum() for e in examples], np.int64)
    if fits.any():
        fitting = data.Examples.of(example for example, fit in zip(examples, fits, strict=True) if fit)
        packed = data.PackedRows(fitting, data.one_each(len(fitting)), sequence_length, sight, None)
        sums[fits] = _scored(module, params, grain.MapDataset.source(packed), batch_size)[0]
    return sums, lengths


def _scored(
    module: Any, params: Tree, rows: Any, batch_size: int
) -> tuple[Float32[np.ndarray, "rows"], Int32[np.ndarray, "rows"]]:
    """(summed log-probabilities of the targets, how many these are) of each laid out row."""
    made = [_batch_logps(module, params, batch) for batch in data.evaluation_batches(rows, batch_size)]
    sums, lengths = (np.concatenate(part)[: len(rows)] for part in zip(*jax.device_get(made), strict=True))
    return sums, lengths


@functools.partial(jax.jit, static_argnums=0)
def _batch_logps(module: Any, params: Tree, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    logps, _ = target_logps(
        module, params, batch["tokens"], batch["target_mask"], batch["segment_ids"] > 0, key=None,
        segment_ids=batch["segment_ids"], positions=batch["positions"], **pictures(batch),
    )  # fmt: skip
    return logps.sum(axis=1), batch["target_mask"].sum(axis=1, dtype=jnp.int32)


def complete(
    module: Any,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    images: Sequence[Any] | None = None,
    max_new_tokens: int,
    batch_size: int = 16,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Any = None,
    length: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Any]:
    """Answers in the order of the prompts, greedy or drawn: a text each, or a list of texts with `samples` above 1.

    One compiled program. What is drawn for a prompt depends on its key (number i has fold_in(key, i)) and on how many samples
    came before, not on the batch size, nor, with a key for each prompt, on the other prompts; but for rounding, which other
    shapes may change.

    Args:
        prompts: texts, or lists of messages.
        images: the pictures of each prompt (a path, an array, a list of these, or None), at its markers.
        batch_size: answers made at once.
        samples: answers to each prompt; they may repeat.
        temperature, top_k, top_p: as of `generation.generate`; 0 is greedy and needs no key.
        key: one, or one for each prompt.
        length: tokens that a prompt has room for, so that other calls run the same program; None: those of the longest.

    Raises:
        ValueError: several samples that would all be the same; a key that is missing, or not as many as prompts.
    """
    if samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(
            f"samples={samples} with temperature={temperature}: give at least one, and for several a temperature above 0."
        )
    keys = _keys(key, len(prompts), samples) if temperature else None
    sight = getattr(module, "sight", None)
    renderer = data.Renderer(tokenizer, sight=sight)
    seen = [None] * len(prompts) if images is None else images
    asked = [renderer.prompt(*one, f"prompt {i}") for i, one in enumerate(zip(prompts, seen, strict=True), 1)]
    width = length or max(len(example.tokens) for example in asked)
    crops = max(sum(picture.crops for picture in example.pictures) for example in asked)
    wanted = np.repeat(np.arange(len(asked)), samples)
    answers: list[str] = []
    for start in range(0, len(wanted), batch_size):
        progress(f"answering {start + 1} to {min(start + batch_size, len(wanted))} of {len(wanted)}")
        # The last batch has the others' shape.
        places = np.minimum(np.arange(start, start + batch_size), len(wanted) - 1)
        batch = data.prompt_batch([asked[i] for i in wanted[places]], length=width, crops=max(crops, 1), sight=sight)
        made = generation.generate(
            module, params, batch["tokens"], batch["mask"], images=pictures(batch).get("images"),
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            eos_id=module.config.eos_ids or None, key=None if keys is None else keys[places],
        )  # fmt: skip
        new, kept = np.asarray(made.tokens), np.asarray(made.mask)
        answers += [tokenizer.decode(t[m], skip_special_tokens=True).strip() for t, m in zip(new, kept, strict=True)]
    answers = answers[: len(wanted)]
    return answers if samples == 1 else [answers[i : i + samples] for i in range(0, len(answers), samples)]


def _keys(key: Any, prompts: int, samples: int) -> Any:
    """A key for each answer, [prompts x samples]."""
    if key is None:
        raise ValueError("key is missing: answers at temperature > 0 need one, such as jax.random.key(0).")
    if key.shape not in ((), (prompts,)):
        raise ValueError(f"key has shape {key.shape}; give one key, or one for each of the {prompts} prompts.")
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(prompts))
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(of_prompt, (0, None))(key, jnp.arange(samples)).reshape(-1)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure of two texts, 0..1 (https://aclanthology.org/W04-1013, by the rouge-score package, no stemming).

    Raises:
        ImportError: the package is missing.
    """
    return _scorer().score(reference, prediction)["rougeL"].fmeasure


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("ROUGE-L needs a package: pip install 'jaxmethods[demo]'") from None
    return RougeScorer(["rougeL"])
