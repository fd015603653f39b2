"""`jaxmethods generate`: answer a prompt."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxmethods import data, generation, models
from jaxmethods.launch.opening import open_model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer a prompt with a run's model, or any other."""

    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What is asked; it is put into the model's chat template where it has one."""
    image: tuple[str, ...] = ()
    """Pictures, for models that see. They stand at the marks `<image>` in the prompt, or before it where it has none."""
    max_new_tokens: int = 128
    """At most so many tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this probability together."""
    seed: int = 0
    """Of sampling."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    raw: bool = False
    """Continue the prompt as it stands, without chat template."""


def generate(options: Generate) -> None:
    """Prints the answer."""
    opened = open_model(options.model, best=options.best)
    sight = getattr(opened.module, "sight", None)
    if options.raw:
        if options.image:
            raise ValueError("--raw continues text alone; leave --image out, or --raw.")
        asked = np.array([opened.tokenizer(options.prompt)["input_ids"]], np.int32)
        batch = {"tokens": asked, "mask": np.ones_like(asked, bool)}
    else:
        marks = "" if data.MARKER in options.prompt else f"{data.MARKER}\n" * len(options.image)
        renderer = data.Renderer(opened.tokenizer, sight=sight)
        batch = data.prompt_batch([renderer.prompt(marks + options.prompt, list(options.image) or None)], sight=sight)
    answer = generation.generate(
        opened.module, opened.params, batch["tokens"], batch["mask"], images=models.pictures(batch).get("images"),
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        eos_id=opened.module.config.eos_ids or None, key=jax.random.key(options.seed),
    )  # fmt: skip
    kept = np.asarray(answer.tokens[0])[np.asarray(answer.mask[0])]
    print(opened.tokenizer.decode(kept, skip_special_tokens=True).strip())
