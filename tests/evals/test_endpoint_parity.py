"""The endpoint against a server that others wrote: `transformers serve`, with a tiny random model."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from jaxmethods import models
from jaxmethods.evals.answers import Failed, Local
from jaxmethods.evals.endpoint import Endpoint
from tests import tiny
from tests.launch.conftest import chatml_tokenizer

pytestmark = pytest.mark.slow
for package in ("torch", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason="needs a server: pip install 'transformers[serving]' torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random model, its module, parameters and tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    models.save(folder, module, params, tokenizer=tokenizer)
    return folder, module, params, tokenizer


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    told = tmp_path_factory.mktemp("log") / "server"
    with told.open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "serve", str(model[0]), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except urllib.error.HTTPError as error:
                error.close()
                break
            except OSError:
                assert server.poll() is None, told.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_served_model_answers_as_it_does_here(model, url):
    folder, module, params, tokenizer = model
    prompts = ["how many cats?", [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}]]
    ask = Endpoint(url, str(folder), max_new_tokens=8)
    there = ask(prompts)
    assert all(there) and there == Local(module, params, tokenizer, max_new_tokens=8)(prompts)


def test_a_served_model_that_is_not_there_is_a_failure(model, url):
    (answer,) = Endpoint(url, "no/such-model", retries=0)(["x"])
    assert isinstance(answer, Failed) and answer.reason.startswith(url)
