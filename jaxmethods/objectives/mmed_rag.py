"""MMed-RAG: how many retrieved reports to keep, how they are shown, and which failures make the preference pairs of RAG-PT.

https://arxiv.org/abs/2410.13085. Its loss is DPO (`losses.dpo_loss`, `objectives.Preference`) on rows whose rejected answer may be
given to another picture (`rejected_images`): the prompt, with the retrieved reports in it, is the same on both sides.
Retrievers and the choice of a domain are in `jaxmethods.retrieval`.

Where paper and released code differ: the paper's second picture is an unrelated one under diffusion noise (`noised_other`), the
code's is noise alone (`noise_picture`); `keep_contexts` has a mode for each; the code's reference drifts with the projector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num, UInt8

from jaxmethods import tree
from jaxmethods.data.pictures import MARKER
from jaxmethods.objectives.mmedpo import STEPS, signal_rates

MODES = ("consecutive", "top1")
DOMAINS: Mapping[str, str] = MappingProxyType(
    {
        "radiology": "You are an experienced radiologist, and the picture is a radiograph of a patient.",
        "ophthalmology": "You are an experienced ophthalmologist, and the picture is a fundus photograph of a patient.",
        "pathology": "You are an experienced pathologist, and the picture is of a patient's stained tissue.",
    }
)
"""Whose part the model plays, by domain. The words are ours."""


def keep_contexts(
    similarities: Num[Array | np.ndarray, "*batch contexts"], *, threshold: float, mode: str = "consecutive"
) -> Int[Array, "*batch"]:
    """How many of the reports, the most similar first, to keep: at least one, and none behind a similarity that is not positive.

    "consecutive" (the paper): up to the first i with log(S_i / S_{i+1}) > threshold, all where there is none.
    "top1" (the released code): while S_1 / S_i < threshold; its example is 1.5.

    Args:
        similarities: [..., K], sorted descending; -inf where there is no report, as `retrieval.find` has it.
        threshold: positive; for "consecutive" on the log ratio, for "top1" on the ratio.

    Raises:
        ValueError: an unknown mode, a threshold that is not positive, similarities that do not descend (where values are known).
    """
    tree.require_one_of("mode", mode, MODES)
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive.")
    found = jnp.asarray(similarities).astype(jnp.float32)
    if isinstance(similarities, np.ndarray) and (similarities[..., 1:] > similarities[..., :-1]).any():
        raise ValueError("similarities must be sorted, the largest first.")
    positive = found > 0
    safe = jnp.where(positive, found, 1.0)
    if mode == "consecutive":
        gap = jnp.where(positive[..., 1:], jnp.log(safe[..., :-1]) - jnp.log(safe[..., 1:]), math.inf)
        goes_on = ~(gap > threshold)
    else:
        goes_on = positive[..., 1:] & (safe[..., :1] / safe[..., 1:] < threshold)
    return 1 + jnp.cumprod(goes_on.astype(jnp.int32), axis=-1).sum(axis=-1)


class Subsets(NamedTuple):
    """Which of the three kinds of pairs each case gives; one case may give two."""

    cross_modal: Bool[Array, "cases"]
    """Right with the report even when the picture is noise: prefer the answer to the real picture, reject that to the noise."""
    use_reports: Bool[Array, "cases"]
    """Right with the report and wrong without: prefer the answer with it."""
    resist_reports: Bool[Array, "cases"]
    """Right without the report and wrong with it: prefer the answer without."""


def preference_subsets(
    alone: Bool[Array | np.ndarray, "cases"],
    with_reports: Bool[Array | np.ndarray, "cases"],
    noised: Bool[Array | np.ndarray, "cases"],
) -> Subsets:
    """The subsets of cases by which answers were right: without reports, with reports, and with reports and a noise picture."""
    alone, with_reports, noised = (jnp.asarray(x, bool) for x in (alone, with_reports, noised))
    return Subsets(with_reports & noised, with_reports & ~alone, alone & ~with_reports)


def prompt(
    question: str,
    reports: Sequence[str],
    *,
    domain: str,
    options: Sequence[str] | None = None,
    domains: Mapping[str, str] = DOMAINS,
    limit: int | None = None,
    length: Callable[[str], int] | None = None,
) -> str:
    """A picture, whose part to play, the numbered reports with a warning, and what is asked: as the authors' data, in our words.

    Where it is longer than `limit`, reports are left out from the last on, then the tail of the one that is left is cut, word by
    word. The rest stands as it is. Without reports it is what the model is asked alone.

    Args:
        question: what is asked; with `options` of which one is the answer, otherwise a report is asked for.
        reports: those kept of the retrieved ones, the most similar first.
        domain: of `domains`.
        options: such as ("yes", "no").
        domains: name -> a sentence or two on the part to play.
        limit: the longest prompt, in what `length` counts.
        length: of a text, such as `lambda text: len(tokenizer(text)["input_ids"])`; it must not fall as words are added.

    Raises:
        ValueError: an unknown domain, `limit` without `length` or the reverse, or a prompt that is too long without reports.
    """
    tree.require_one_of("domain", domain, tuple(domains))
    if (limit is None) != (length is None):
        raise ValueError(f"limit={limit} with length={length}: a limit needs what counts, and nothing else does.")
    asked = (
        f"Question: {question}\nAnswer with one of these: {', '.join(options)}."
        if options is not None
        else f"{question}\nGive the report alone, and nothing before or after it."
    )

    def shown(kept: Sequence[str]) -> str:
        return f"{MARKER}\n{domains[domain]}\n\n{_references(kept)}{asked}"

    if limit is None or length is None or length(shown(reports)) <= limit:
        return shown(reports)
    for count in range(len(reports) - 1, 0, -1):
        if length(shown(reports[:count])) <= limit:
            return shown(reports[:count])
    words = reports[0].split() if reports else []
    fits, too_many = 0, len(words)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if length(shown([" ".join(words[:middle])])) <= limit else (fits, middle)
    if fits:
        return shown([" ".join(words[:fits])])
    if (bare := length(shown([]))) <= limit:
        return shown([])
    raise ValueError(
        f"without any report the prompt has length {bare}, and limit={limit}; raise it, or shorten the question."
    )


def _references(reports: Sequence[str]) -> str:
    if not reports:
        return ""
    listed = "\n".join(f"{number}. {report}" for number, report in enumerate(reports, 1))
    of = f"{len(reports)} reference report{'s' * (len(reports) > 1)}"
    return (
        f"Here {'are' if len(reports) > 1 else 'is'} {of} of other patients:\n{listed}\n"
        "They are for comparison only and are no basis for a diagnosis: judge by the picture.\n\n"
    )


def noise_picture(shape: Sequence[int], key: Array) -> UInt8[np.ndarray, "..."]:
    """A picture of noise, as the released code draws it: N(0, 1) clipped to [0, 1], times 255; half of it black, a sixth saturated.

    Args:
        shape: (height, width, 3), that of the picture it stands for.
    """
    noise = jax.random.normal(key, tuple(shape))
    return np.asarray(255 * jnp.clip(noise, 0.0, 1.0)).astype(np.uint8)


def noised_other(
    picture: UInt8[Array | np.ndarray, "height width channels"], step: int, key: Array
) -> UInt8[np.ndarray, "height width channels"]:
    """An unrelated picture under diffusion noise, as the paper has it: a x + sqrt(1 - a^2) eps, x in [-1, 1], a of `signal_rates`.

    The paper takes a picture that is least similar to the query's: `retrieval.top_k(-queries, pictures, 1)`. It gives no schedule;
    this is MMedPO's. What goes beyond black or white is clipped.

    Args:
        picture: of whole numbers 0..255.
        step: 0 (nearly no noise) to 999.

    Raises:
        ValueError: a step outside its range.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"step={step} must be between 0 and {STEPS - 1}.")
    signal = signal_rates()[step]
    x = jnp.asarray(picture).astype(jnp.float32) / 127.5 - 1
    noisy = signal * x + math.sqrt(1 - signal**2) * jax.random.normal(key, x.shape)
    return np.asarray(jnp.clip(jnp.round(127.5 * (noisy + 1)), 0, 255)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A picture with a question, and what the model answered three times.

    Args:
        prompt: with the retrieved reports, as `prompt` makes it: what both sides of each pair are given.
        images: the picture.
        noise: the picture that the third answer was given to (`noise_picture`, `noised_other`).
        alone: the answer to the picture and the question without reports.
        with_reports: the answer to the picture and `prompt`.
        noised: the answer to `noise` and `prompt`.
        truth: where reports are written, the true one: it is preferred to each of the model's own. None for questions.
    """

    prompt: str
    images: Any
    noise: Any
    alone: str
    with_reports: str
    noised: str
    truth: str | None = None


def preference_rows(
    cases: Sequence[Case], right: Mapping[str, Bool[Array | np.ndarray, "cases"]]
) -> list[dict[str, Any]]:
    """Rows {"prompt", "images", "chosen", "rejected", "subset"} for `Preference`; of "cross_modal" also "rejected_images".

    | subset | chosen | rejected |
    | --- | --- | --- |
    | cross_modal | with reports | with reports and noise, given the noise |
    | use_reports | with reports | alone |
    | resist_reports | alone | with reports |

    The prompt has the reports on both sides, whichever answer was made without them. In place of the chosen answer stands the truth
    of a case that has one. Both texts of a cross-modal pair may be equal: the pictures are not.

    Args:
        right: which of the answers "alone", "with_reports" and "noised" are right, [N] each. For reports the paper takes a
            threshold on a metric such as BLEU.

    Returns:
        By case, and of a case in the order above. A case may give two rows or none.

    Raises:
        ValueError: other names in `right`, or another number of cases.
    """
    names = ("alone", "with_reports", "noised")
    if set(right) != set(names):
        raise ValueError(f"right has {', '.join(map(str, right)) or 'nothing'}; give {', '.join(names)}.")
    if any(len(right[name]) != len(cases) for name in names):
        counts = ", ".join(f"{len(right[name])} of {name!r}" for name in names)
        raise ValueError(f"there are {len(cases)} cases, and right has {counts}; give one for each case.")
    subsets = preference_subsets(*(right[name] for name in names))
    answers = {
        "cross_modal": names[1:],
        "use_reports": ("with_reports", "alone"),
        "resist_reports": ("alone", "with_reports"),
    }
    kinds = {subset: np.asarray(getattr(subsets, subset)) for subset in answers}
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        for subset, (chosen, rejected) in answers.items():
            if kinds[subset][i]:
                preferred = getattr(case, chosen) if case.truth is None else case.truth
                row = {
                    "prompt": case.prompt,
                    "images": case.images,
                    "chosen": preferred,
                    "rejected": getattr(case, rejected),
                }
                other = {"rejected_images": case.noise} if subset == "cross_modal" else {}
                rows.append(row | other | {"subset": subset})
    return rows
