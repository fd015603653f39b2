"""Models of this library in EleutherAI's lm-evaluation-harness: all its tasks, by the engine of `evals.scoring`.

    import lm_eval
    from jaxmethods.evals.harness import HarnessLM

    lm = HarnessLM(module, params, tokenizer)
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

Contexts and continuations become tokens as in the harness' own `hf` model (https://github.com/EleutherAI/lm-evaluation-harness,
version 0.4.13), so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmethods.evals.scoring import Pair, Prompt, Work, continuations, log_likelihoods
from jaxmethods.evals.scoring.likelihoods import BATCH_TOKENS
from jaxmethods.tree import Tree

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM, hash_args
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:  # the module can be read without the extra; its model cannot be made
    TemplateLM = object

_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A model as the harness asks it. One process; `module` and `params` may lie on a mesh.

    Args:
        max_length: tokens that the model reads; by default its configuration's `max_position_embeddings`.
        max_gen_toks: new tokens where a task does not say how many.
        add_bos_token: whether text begins with the BOS token; None leaves that to the tokenizer.
        prefix_token_id: stands before text without context; by default BOS, or EOS where there is none.
        seed: of what is drawn.
        batch_tokens: places of a batch, about.
        done: answers by the hash of their requests; those in it are not asked for again, and new ones are put there as they come.
            Drawn texts are not kept.
        name: of the model, in the results.
        progress: called with the kind of request, how many are done, and how many there are.

    Attributes:
        work: what the engine did, compiled programs included.

    Raises:
        ImportError: lm-evaluation-harness is missing.
    """

    def __init__(
        self,
        module: Any,
        params: Tree,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        batch_tokens: int = BATCH_TOKENS,
        mesh: Mesh | None = None,
        done: MutableMapping[str, Any] | None = None,
        name: str = "jaxmethods",
        progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
    ):
        if TemplateLM is object:
            raise ImportError("lm-evaluation-harness is missing: pip install 'jaxmethods[harness]'")
        super().__init__()
        self.tokenizer, self.work = tokenizer, Work()
        self.max_length = max_length or module.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self.add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._module, self._params, self._name = module, params, name
        self._engine = {"limit": self.max_length, "batch_tokens": batch_tokens, "mesh": mesh, "work": self.work}
        self._seed, self._done, self._progress = seed, done, progress

    # What the harness asks of the tokenizer.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        given, bos = self._prefix_token_id, self.tokenizer.bos_token_id
        return given if given is not None else bos if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return (self.tokenizer.name_or_path or self._name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; where nothing else is said, text that begins with the prefix token gets no second one."""
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begun else self.add_bos_token
        told = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **told)

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """Messages as a prompt; without a generation prompt the last one is left open.

        Raises:
            ValueError: the template refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from None

    # Requests.

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding says the same) of each (context, continuation).

        Raises:
            ValueError: an empty continuation, or one that the model cannot read whole.
        """
        for number, request in enumerate(requests, 1):
            if not request.args[1]:
                raise ValueError(
                    f"request {number} of {len(requests)} has an empty continuation, after {_end(request)}."
                )
        return self._in_order("loglikelihood", requests, lambda left: super(HarnessLM, self).loglikelihood(left, True))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> Iterator[tuple[float, bool]]:
        pairs = (Pair(context, continuation) for _, context, continuation in requests)
        told = self._told("loglikelihood", len(requests))
        for found in log_likelihoods(self._module, self._params, pairs, **told):
            yield found.logp, bool(found.greedy)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of each text, in disjoint windows as long as the model reads, each after the token before it."""
        return self._in_order("loglikelihood_rolling", requests, self._rolling)

    def _rolling(self, requests: Sequence[Any]) -> Iterator[float]:
        counts: list[int] = []

        def pairs() -> Iterator[Pair]:
            for (text,) in (request.args for request in requests):
                found = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )  # fmt: skip
                made = [Pair(*utils.make_disjoint_window(window)) for window in found]
                counts.append(len(made))
                yield from made

        scored = log_likelihoods(
            self._module, self._params, pairs(), greedy=False, **self._told("loglikelihood_rolling", None)
        )
        total, seen, text = 0.0, 0, 0
        for found in scored:
            while seen == counts[text]:  # this text is whole; one without tokens always is
                yield total
                total, seen, text = 0.0, 0, text + 1
            total, seen = total + found.logp, seen + 1
        while text < len(requests):
            yield total
            total, text = 0.0, text + 1

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """A text for each (context, options).

        Raises:
            ValueError: options that are not known here.
        """
        return self._in_order("generate_until", requests, self._texts)

    def _texts(self, requests: Sequence[Any]) -> Iterator[str]:
        prompts = (self._prompt(*request.args) for request in requests)
        told = self._told("generate_until", len(requests)) | {"seed": self._seed}
        for found in continuations(self._module, self._params, self.tokenizer, prompts, **told):
            yield found.text

    def _prompt(self, context: str, given: dict[str, Any]) -> Prompt:
        told = normalize_gen_kwargs(given, self.max_gen_toks)
        if unknown := sorted(told.keys() - set(_OPTIONS)):
            raise ValueError(f"generation option {unknown[0]!r} is not supported; supported are {', '.join(_OPTIONS)}.")
        temperature = float(told.get("temperature", 0.0)) if told["do_sample"] else 0.0
        if told["do_sample"] and not temperature:
            raise ValueError(
                "do_sample with temperature 0 draws nothing; give a temperature above 0, or do_sample=False."
            )
        return Prompt(
            self.tok_encode(context), told["max_gen_toks"], tuple(told["until"]), temperature, told.get("top_k"), told.get("top_p")
        )  # fmt: skip

    # What all of them share.

    def _told(self, kind: str, total: int | None) -> dict[str, Any]:
        said = (lambda done: self._progress(kind, done, total)) if total else (lambda done: None)
        return self._engine | {"progress": said}

    def _in_order(self, kind: str, requests: Sequence[Any], answer: Callable[[list[Any]], Iterator[Any]]) -> list[Any]:
        """Answers to the requests, those that are known and new ones, which are put by as they come."""
        drawn = lambda request: kind == "generate_until" and normalize_gen_kwargs(request.args[1])["do_sample"]
        kept = lambda request: self._done is not None and not drawn(request)
        keys = [hash_args(kind, request.args) if kept(request) else None for request in requests]
        there = {} if self._done is None else self._done
        known = {key: _as_answer(there[key]) for key in keys if key is not None and key in there}
        left = [i for i, key in enumerate(keys) if key not in known]
        found = {i: known[key] for i, key in enumerate(keys) if key in known}
        for i, new in zip(left, answer([requests[i] for i in left]) if left else (), strict=True):
            found[i], key = new, keys[i]
            if key is not None:
                there[key] = new
            self.cache_hook.add_partial(kind, requests[i].args, new)
        return [found[i] for i in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about the model beside its results."""
        leaves = jax.tree.leaves(self._params)
        return {
            "model_name": self._name,
            "model_num_parameters": int(sum(x.size for x in leaves)),
            "model_dtype": str(leaves[0].dtype),
        }


def _end(request: Any) -> str:
    return repr(request.args[0][-40:])


def _as_answer(kept: Any) -> Any:
    """An answer as it is given: JSON makes lists of pairs."""
    return tuple(kept) if isinstance(kept, list) else kept
