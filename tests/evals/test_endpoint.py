"""Asking models: a server on this machine that answers, fails and misbehaves, and a model of this library."""

import base64
import io
import socket
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxmethods.evals.answers import Failed, Local, Pictured
from jaxmethods.evals.completion import complete
from jaxmethods.evals.endpoint import Endpoint, data_url
from tests import tiny
from tests.chat_server import CLOSE, HANG, ChatServer, asked, completion
from tests.launch.conftest import chatml_tokenizer


def test_answers_come_in_the_order_of_the_prompts():
    def slow_at_first(request):
        if asked(request) == "0":
            time.sleep(0.1)
        return f"to {asked(request)}"

    with ChatServer(slow_at_first) as server:
        ask = Endpoint(server.url, "m", api_key="secret", max_new_tokens=7, temperature=0.5, parallel=3)
        assert ask([str(i) for i in range(8)]) == [f"to {i}" for i in range(8)]
        dialogue = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]
        assert ask([dialogue]) == ["to hello"] and ask([]) == []
    expected = {"model": "m", "messages": dialogue, "max_tokens": 7, "temperature": 0.5, "key": "Bearer secret"}
    assert server.requests[-1] == expected and len(server.requests) == 9
    assert "secret" not in repr(ask)


def test_the_limit_has_the_name_that_the_server_wants_and_the_key_is_the_environments(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of the house")
    with ChatServer(lambda request: "x") as server:
        Endpoint(server.url, "m", temperature=None, limit="max_completion_tokens")(["y"])
        monkeypatch.delenv("OPENAI_API_KEY")
        Endpoint(server.url, "m")(["y"])
    first, second = server.requests
    assert first["max_completion_tokens"] == 256 and not {"max_tokens", "temperature"} & set(first)
    assert (first["key"], second["key"]) == ("Bearer of the house", "Bearer none")


def test_pictures_stand_at_their_markers_as_data_urls(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    given = "data:image/png;base64,AAAA"
    prompts = [
        Pictured("<image>\nand <image> differ how?", [pixels, given]),
        Pictured("no marker", pixels),
        Pictured("<image>", str(tmp_path / "missing.png")),
        "<image> is only a word",
    ]
    with ChatServer(lambda request: "seen") as server:
        answers = Endpoint(server.url, "m", parallel=1)(prompts)
    assert answers[0] == answers[3] == "seen" and len(server.requests) == 2
    assert "0 <image> markers and 1 pictures" in answers[1].reason and "does not exist" in answers[2].reason
    first, words, second, rest = server.requests[0]["messages"][0]["content"]
    assert (words["text"], rest["text"], second["image_url"]["url"]) == ("\nand ", " differ how?", given)
    sent = first["image_url"]["url"].removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(sent))), pixels)
    assert data_url(pixels) == first["image_url"]["url"]
    assert server.requests[1]["messages"][0]["content"] == "<image> is only a word"


@pytest.mark.parametrize("trouble", [(500, "oh"), (429, "slowly"), (503, "soon"), CLOSE, HANG])
def test_what_passes_is_tried_again(trouble):
    troubles = [trouble]
    with ChatServer(lambda request: troubles.pop() if troubles else "at last") as server:
        assert Endpoint(server.url, "m", timeout=0.3, retries=1)(["x"]) == ["at last"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("trouble", "tries", "said"),
    [
        ((500, "the disk is full"), 2, "answers 500 (the disk is full)"),
        ((429, "not so fast"), 2, "answers 429 (not so fast)"),
        ((400, "too long"), 1, "answers 400 (too long)"),
        (HANG, 2, "was silent for 0.3 s, in 2 calls"),
        (CLOSE, 2, "cannot be reached (Server disconnected"),
        (b"<html>a page</html>", 1, "answers what is no chat completion"),
        (b'{"choices": [', 1, "answers what is no chat completion"),
        (b'{"something": "else"}', 1, "answers what is no chat completion"),
        (b'{"choices": []}', 1, "answers what is no chat completion"),
        (completion(None, "content_filter"), 1, "answers without a text (finish_reason 'content_filter')"),
    ],
)
def test_what_does_not_pass_is_told_and_the_others_are_answered(trouble, tries, said):
    with ChatServer(lambda request: trouble if asked(request) == "bad" else "good") as server:
        first, failed, last = Endpoint(server.url, "m", timeout=0.3, retries=1)(["a", "bad", "b"])
    assert first == last == "good" and isinstance(failed, Failed)
    assert failed.reason.startswith(server.url) and said in failed.reason and "\n" not in failed.reason
    assert len(server.requests) == 2 + tries


@pytest.mark.parametrize(
    ("trouble", "said"), [((401, "wrong key"), "set OPENAI_API_KEY"), ((404, "no such model"), "it has no model 'm'")]
)
def test_what_is_hopeless_is_asked_once(trouble, said):
    with ChatServer(lambda request: trouble) as server:
        answers = Endpoint(server.url, "m", parallel=1)(["x"] * 20)
    assert len(server.requests) == 1 and len(set(answers)) == 1
    assert said in answers[0].reason and trouble[1] in answers[0].reason


def test_where_nobody_listens_there_is_one_reason():
    with socket.socket() as held:  # bound, and not listening
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        answers = Endpoint(url, "m", retries=0, parallel=2)(["x"] * 20)
    assert len(set(answers)) == 1 and answers[0].reason.startswith(f"{url} cannot be reached (")


def test_refused_before_anything_is_asked(monkeypatch):
    for changes, said in (
        ({"url": "localhost:8000"}, "must begin with http"), ({"model": ""}, "name of the model is empty"),
        ({"parallel": 0}, "parallel=0 must be positive"), ({"retries": -1}, "must not be negative"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Endpoint(**({"url": "http://x/v1", "model": "m"} | changes))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxmethods\[endpoint\]'"):
        Endpoint("http://x/v1", "m")(["x"])


def test_a_model_of_this_library_answers_as_complete_does():
    tokenizer = chatml_tokenizer("<image>")
    module, params = tiny.vlm(
        num_layers=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vocab_size=len(tokenizer),
        rope_scaling=None, eos_ids=(2,),
    )  # fmt: skip
    grey = np.full((8, 8, 3), 99, np.uint8)
    dialogue = [{"role": "user", "content": "a longer question than that"}]
    local = Local(module, params, tokenizer, max_new_tokens=6, batch_size=3)
    answers = local([Pictured("<image> what?", grey), "why?", dialogue])
    alone = complete(
        module,
        params,
        tokenizer,
        ["<image> what?", "why?", dialogue],
        images=[grey, None, None],
        max_new_tokens=6,
        batch_size=3,
    )
    assert answers == alone and len(set(answers)) == 3 and local([]) == []
    drawn = Local(module, params, tokenizer, max_new_tokens=6, batch_size=3, temperature=1.0, seed=3)
    assert drawn(["why?", "why?"]) == drawn(["why?", "why?"]) != local(["why?", "why?"])
