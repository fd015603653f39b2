"""A model behind a server that speaks OpenAI's chat protocol: vLLM, llama.cpp, `transformers serve`, OpenAI itself.

    ask = Endpoint("http://localhost:8000/v1", "my-model")
    ask(["What is 1 + 1?", [{"role": "user", "content": "And 1 + 2?"}]])     # a text or a `Failed` for each

Needs the package openai: pip install 'jaxmethods[endpoint]'.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmethods import images
from jaxmethods.data import MARKER
from jaxmethods.evals.answers import Failed, Prompt, taken_apart

_HOPELESS = (401, 403, 404)  # what one prompt is told, all others would be told too


def is_address(name: str) -> bool:
    """Whether a model's name is that of an endpoint, URL#MODEL, and not a folder's or a hub's."""
    return name.startswith(("http://", "https://"))


def named(name: str, *, flag: str = "", **options: Any) -> Endpoint:
    """The endpoint that URL#MODEL names.

    Args:
        flag: of the command line that the name was given with, for the error.
        options: as of `Endpoint`.

    Raises:
        ValueError: there is no MODEL; and as `Endpoint`.
    """
    url, _, model = name.rpartition("#")
    if not (url and model):
        told = f"{flag} {name}".strip()
        raise ValueError(f"{told} names no model; give URL#MODEL, as http://localhost:8000/v1#my-model.")
    return Endpoint(url, model, **options)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind a chat endpoint, as an `Answerer`.

    Time-outs, lost connections, 429 and errors of the server (500 and above) are tried again, with growing pauses or after the time
    that the server asks for; what fails still is a `Failed`. Where nobody listens, the key is refused or the model is unknown, the
    rest of the prompts is not sent and has the same reason.

    Args:
        url: where the protocol begins; it mostly ends in /v1.
        model: its name there.
        api_key: None takes the environment's OPENAI_API_KEY, or "none" where there is none.
        timeout: seconds without a byte before a call is given up.
        retries: how often a call is tried again.
        max_new_tokens: of each answer.
        temperature: of sampling; None leaves it to the server.
        parallel: calls at a time.
        limit: by what name the server takes `max_new_tokens`. OpenAI's newer models want "max_completion_tokens" (and
            temperature=None).
    """

    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 4
    max_new_tokens: int = 256
    temperature: float | None = 0.0
    parallel: int = 4
    limit: str = "max_tokens"

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} must begin with http:// or https://, as http://localhost:8000/v1 does.")
        if not self.model:
            raise ValueError(f"{self.url}: the name of the model is empty; ask the server's /models for its names.")
        for name in ("timeout", "max_new_tokens", "parallel"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.retries < 0 or (self.temperature or 0) < 0:
            raise ValueError(f"retries={self.retries} and temperature={self.temperature} must not be negative.")

    def __call__(self, prompts: Sequence[Prompt]) -> list[str | Failed]:
        """An answer to each prompt, in their order.

        Raises:
            ImportError: openai is not installed.
        """
        openai = _openai()
        if not prompts:
            return []
        hopeless: list[Failed] = []
        key = self.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)
        pool = concurrent.futures.ThreadPoolExecutor(self.parallel)
        try:
            asked = [pool.submit(self._answer, openai, client, prompt, hopeless) for prompt in prompts]
            return [answer.result() for answer in asked]
        finally:
            pool.shutdown(cancel_futures=True)
            client.close()

    def _answer(self, openai: Any, client: Any, prompt: Prompt, hopeless: list[Failed]) -> str | Failed:
        if hopeless:
            return hopeless[0]
        try:
            messages = _sent(prompt)
        except (ValueError, TypeError, LookupError, OSError) as error:
            return Failed(_line(error))
        settings: dict[str, Any] = {self.limit: self.max_new_tokens}
        if self.temperature is not None:
            settings["temperature"] = self.temperature
        try:
            reply = client.chat.completions.create(model=self.model, messages=messages, **settings)
            choice = reply.choices[0]
            text, reason = choice.message.content, choice.finish_reason
        except openai.APITimeoutError:
            return Failed(f"{self.url} was silent for {self.timeout:g} s, in {self.retries + 1} calls")
        except openai.APIConnectionError as error:
            failed = Failed(f"{self.url} cannot be reached ({_line(error.__cause__ or error)})")
            if type(error.__cause__).__name__ == "ConnectError":  # nobody listens there
                hopeless.append(failed)
            return failed
        except openai.APIStatusError as error:
            way_out = {
                401: "; set OPENAI_API_KEY",
                404: f"; it has no model {self.model!r}, or the URL is not where the protocol begins (/v1)",
            }.get(error.status_code, "")
            failed = Failed(f"{self.url} answers {error.status_code} ({_line(_told(error))}){way_out}")
            if error.status_code in _HOPELESS:
                hopeless.append(failed)
            return failed
        except Exception as error:  # a server may send anything, and a client fail on it in any way
            return Failed(f"{self.url} answers what is no chat completion ({type(error).__name__}: {_line(error)})")
        if not isinstance(text, str):
            return Failed(f"{self.url} answers without a text (finish_reason {reason!r})")
        return text


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ImportError("asking an endpoint needs the package openai: pip install 'jaxmethods[endpoint]'") from None
    return openai


def _sent(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a prompt as the protocol has them, pictures at their markers.

    Raises:
        ValueError, FileNotFoundError: a picture that cannot be read, or another number of markers than of pictures.
    """
    asked, given = taken_apart(prompt)
    turns: Sequence[Mapping[str, Any]] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    messages = [dict(turn) for turn in turns]
    listed = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not listed:
        return messages
    marks = sum(message["content"].count(MARKER) for message in messages)
    if marks != len(listed):
        raise ValueError(
            f"the prompt has {marks} {MARKER} markers and {len(listed)} pictures; give one marker for each."
        )
    urls = iter([data_url(picture) for picture in listed])
    for message in messages:
        first, *others = message["content"].split(MARKER)
        if others:
            parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
            for text in others:
                parts += [{"type": "image_url", "image_url": {"url": next(urls)}}, {"type": "text", "text": text}]
            message["content"] = [part for part in parts if part.get("text", "...").strip()]
    return messages


def data_url(picture: Any) -> str:
    """A picture as a data URL, in PNG; one that is a data URL already stays as it is.

    Raises:
        ValueError, FileNotFoundError: it cannot be read.
    """
    if isinstance(picture, str) and picture.startswith("data:"):
        return picture
    held = io.BytesIO()
    images.open_picture(picture, "a prompt").save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _told(error: Any) -> Any:
    """What a server says of an error, in whichever of the usual places."""
    body = error.body
    for name in ("message", "detail", "error"):
        if isinstance(body, Mapping) and isinstance(body.get(name), str):
            return body[name]
    return body if isinstance(body, str) and body.strip() else error


def _line(what: object) -> str:
    """One line of a message, of no more than 300 characters."""
    return (" ".join(str(what).split()) or type(what).__name__)[:300]
