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

import jax
import numpy as np

from jaxmethods import data, generation
from jaxmethods.models import pictures
from jaxmethods.objectives import Supervised
from jaxmethods.tree import Mean, Tree


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
    exact = [plain(answer) == plain(row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    return Completion(nll, float(np.mean(overlap)), float(np.mean(exact)), tuple(answers))


def plain(text: str) -> str:
    """The words of a text, in lower case, with one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


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
    total = sum(
        (_batch_nll(module, params, batch) for batch in data.evaluation_batches(laid_out, batch_size)),
        start=Mean(np.float32(0), np.float32(0)),  # type: ignore[arg-type]
    )
    return float(total.value())


@functools.partial(jax.jit, static_argnums=0)
def _batch_nll(module: Any, params: Tree, batch: dict[str, Any]) -> Mean:
    return Supervised().loss_fn(module)(params, batch, None)[0]


def complete(
    module: Any,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    images: Sequence[Any] | None = None,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts; one compiled program.

    Args:
        prompts: texts, or lists of messages.
        images: the pictures of each prompt (a path, an array, a list of these, or None), at its markers.
    """
    sight = getattr(module, "sight", None)
    renderer = data.Renderer(tokenizer, sight=sight)
    seen = [None] * len(prompts) if images is None else images
    asked = [renderer.prompt(*one, f"prompt {i}") for i, one in enumerate(zip(prompts, seen, strict=True), 1)]
    width = max(len(example.tokens) for example in asked)
    crops = max(sum(picture.crops for picture in example.pictures) for example in asked)
    answers: list[str] = []
    for start in range(0, len(asked), batch_size):
        progress(f"answering {start + 1} to {min(start + batch_size, len(asked))} of {len(asked)}")
        rows = asked[start : start + batch_size]
        rows = rows + rows[-1:] * (batch_size - len(rows))  # the last batch has the others' shape
        batch = data.prompt_batch(rows, length=width, crops=max(crops, 1), sight=sight)
        made = generation.generate(
            module, params, batch["tokens"], batch["mask"], images=pictures(batch).get("images"),
            max_new_tokens=max_new_tokens, temperature=0.0, eos_id=module.config.eos_ids or None,
        )  # fmt: skip
        new, kept = np.asarray(made.tokens), np.asarray(made.mask)
        answers += [tokenizer.decode(t[m], skip_special_tokens=True).strip() for t, m in zip(new, kept, strict=True)]
    return answers[: len(asked)]


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
