"""MMedPO: clinical relevance as the weight of each pair's DPO loss. https://arxiv.org/abs/2412.06141.

Two kinds of pairs: a hallucinated answer to the same picture, and the same answer to a picture whose lesion was made invisible
(`noise_lesion`). Both are rows of `chosen` and `rejected` (with `rejected_images` for the second kind) and a `relevance`.

Where paper and released code differ: taken literally, the paper's normalisation gives every score in [0, 1] the weight 0.75, and
the code multiplies by the raw scores, so that those of 0 teach nothing. `relevance_weights` has both, and by default the reading
under which the paper's four numbers make sense. The released code's reference shares the trained projector:
`reference="drifting"`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num, UInt8

from jaxmethods import losses, tree
from jaxmethods.data.views import Number
from jaxmethods.losses import PairLogps
from jaxmethods.objectives.preference import Preference

MODES = ("target_moments", "literal", "raw")
STEPS = 1000
LEAST_WEIGHT, MOST_WEIGHT, MEAN, VARIANCE = 0.75, 1.25, 1.0, 0.1


def relevance_weights(
    scores: Num[Array | np.ndarray, "pairs"], *, mode: str = "target_moments"
) -> Float[Array, "pairs"]:
    """The weights of pairs, from how relevant a judge or tool finds them; float32.

    Args:
        scores: [N], those of one source: text and visual scores have scales of their own.
        mode: "target_moments": clip(1 + sqrt(0.1) (s - mean s) / std s, 0.75, 1.25), the moments over `scores`; 1 where all are
            equal. "literal": clip((s - 1) / sqrt(0.1), 0.75, 1.25), as the paper has it. "raw": the scores, as the code has it.
    """
    tree.require_one_of("mode", mode, MODES)
    scores = jnp.asarray(scores).astype(jnp.float32)
    if mode == "raw":
        return scores
    if mode == "literal":
        return jnp.clip((scores - MEAN) / np.sqrt(VARIANCE), LEAST_WEIGHT, MOST_WEIGHT)
    spread = scores.std()
    equal = spread <= 1e-6 * jnp.abs(scores).max()  # but for rounding
    z = jnp.where(equal, 0.0, (scores - scores.mean()) / jnp.where(equal, 1.0, spread))
    return jnp.clip(MEAN + np.sqrt(VARIANCE) * z, LEAST_WEIGHT, MOST_WEIGHT)


Judge = Callable[[str, float | None], float | None]
"""(answer, the score so far or None) -> a score in [0, 1]: the given one to agree, another to differ, None where it has none."""


class Debate(NamedTuple):
    """What several judges came to."""

    score: float | None
    """None where no judge had any."""
    agreed: bool
    history: tuple[float, ...]
    """Every score that was given, in order."""


def debate(judges: Sequence[Judge], answer: str, *, rounds: int = 5) -> Debate:
    """The relevance of an answer by judges who hear the score before theirs, in turn, until a whole round holds the same one.

    Without consensus it is the mean of all that was said (section 3.3 of the paper; 3 judges and 5 rounds there). A judge that has
    no score is passed over.

    Raises:
        ValueError: no judges, no rounds, or a score that is no number in [0, 1].
    """
    if not judges or rounds < 1:
        raise ValueError(
            f"a debate of {len(judges)} judges in {rounds} rounds has nothing to say; give at least one of each."
        )
    history: list[float] = []
    for _ in range(rounds):
        said = []
        for number, judge in enumerate(judges):
            score = judge(answer, history[-1] if history else None)
            if score is None:
                continue
            if not 0 <= score <= 1:
                raise ValueError(
                    f"judge {number + 1} gave the score {score!r}; it must be a number in [0, 1], or None."
                )
            said.append(score)
            history.append(score)
        if said and len(set(said)) == 1:
            return Debate(said[0], True, tuple(history))
    return Debate(sum(history) / len(history) if history else None, False, tuple(history))


def signal_rates() -> np.ndarray:
    """sqrt of the cumulative product of the noise schedule, float64 [1000]: how much of a picture is left after each step.

    The paper gives no schedule; this is the released trainer's: of 1 - b_k, b from 1e-5 to 0.005 along sigmoid(-6 .. 6).
    """
    rates = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    return np.sqrt(np.cumprod(1 - rates))


def noise_lesion(
    image: Num[Array | np.ndarray, "height width channels"],
    heat_map: Num[Array | np.ndarray, "rows columns"],
    step: Any,
    key: Array,
) -> Float[Array, "height width channels"]:
    """The picture with diffusion noise where the heat map is: h (a x + sqrt(1 - a^2) eps) + (1 - h) x, a of `signal_rates`.

    Where the map is 0 the picture stays as it is, bit by bit; a map of ones is the "global noise" of the paper's ablation.

    Args:
        image: floats about 0 and of about unit spread, as a vision tower reads them.
        heat_map: [H, W] in [0, 1], soft or of zeros and ones.
        step: 0 (nearly no noise) to 999; may be traced.
        key: of the noise.

    Raises:
        ValueError: whole numbers as an image, a map of another size or outside [0, 1], a step outside its range (where
            values are known).
    """
    image, heat = jnp.asarray(image), jnp.asarray(heat_map)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"image has dtype {image.dtype}; noise needs floats, as a vision tower reads them.")
    if heat.shape != image.shape[:2]:
        raise ValueError(
            f"heat_map has shape {heat.shape} and the image {image.shape[:2]}; resize the map to the image."
        )
    if not isinstance(heat, jax.core.Tracer) and not bool(((heat >= 0) & (heat <= 1)).all()):
        raise ValueError(f"heat_map goes from {float(heat.min()):g} to {float(heat.max()):g}; it must lie in [0, 1].")
    if not isinstance(step, jax.core.Tracer) and not 0 <= int(step) < STEPS:
        raise ValueError(f"step={step} must be between 0 and {STEPS - 1}.")
    signal = jnp.asarray(signal_rates(), jnp.float32)[step]
    heat = heat.astype(jnp.float32)[:, :, None]
    x = image.astype(jnp.float32)
    noisy = signal * x + jnp.sqrt(1 - signal**2) * jax.random.normal(key, x.shape)
    return (heat * noisy + (1 - heat) * x).astype(image.dtype)


def noised_pixels(
    pixels: UInt8[np.ndarray, "height width 3"],
    heat: Float32[np.ndarray, "height width"],
    step: int,
    key: Any,
    *,
    mean: Any,
    std: Any,
) -> UInt8[np.ndarray, "height width 3"]:
    """`noise_lesion` of a picture's grey levels: normalised as a tower does, noised, rounded and clipped.

    Where the map is 0 pixels are those of the picture, bit by bit.

    Args:
        heat: in [0, 1].
        mean, std: the tower's, three numbers each, of colours in 0..1.
    """
    centre, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    x = (pixels.astype(np.float32) / 255 - centre) / spread
    noised = (np.asarray(noise_lesion(x, heat, step, key)) * spread + centre) * 255
    return np.where(heat[..., None] > 0, np.clip(np.rint(noised), 0, 255).astype(np.uint8), pixels)


def loss(
    policy: PairLogps, reference: PairLogps, *, relevance: Num[Array | np.ndarray, "pairs"], beta: float = 0.1
) -> Float[Array, "pairs"]:
    """relevance x DPO loss; the weight stands outside the log-sigmoid and carries no gradient. Its mean is over pairs.

    Both sides are scored with their own picture: log p(rejected) given the noised one, for visual pairs.

    Args:
        relevance: [B], of `relevance_weights`.
    """
    weight = jax.lax.stop_gradient(jnp.asarray(relevance).astype(jnp.float32))
    return weight * losses.dpo_loss(policy, reference, beta=beta)


@dataclasses.dataclass(frozen=True)
class MMedPO(Preference):
    """`Preference` with DPO weighted by clinical relevance, normalised over the rows of each source.

    Args:
        weight: the field of the rows with the raw relevance.
        mode: of `relevance_weights`.
    """

    weight: str | None = "relevance"
    mode: str = "target_moments"

    takes: ClassVar[tuple[str, ...]] = ("dpo",)

    def __post_init__(self) -> None:
        super().__post_init__()
        tree.require_one_of("mode", self.mode, MODES)
        if self.weight is None:
            raise ValueError(
                "weight=None: MMedPO needs the field with each pair's relevance; without one use Preference."
            )

    def numbers(self) -> dict[str, Number]:
        """The weight of each pair."""
        plain = super().numbers()["weight"]
        return {"weight": dataclasses.replace(plain, of_all=self._weights)}

    def _weights(self, scores: np.ndarray) -> np.ndarray:
        if self.mode == "raw" and not scores.any():
            raise ValueError("every relevance is 0, so nothing would be learnt; choose mode='target_moments'.")
        return np.asarray(relevance_weights(scores, mode=self.mode))
