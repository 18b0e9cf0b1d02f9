"""The server that transformers brings: it does as a judge, and is refused as an engine, for it takes no token ids."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from dpo.endpoint import Server
from dpo.engines import Endpoint
from dpo.policy import model as models
from dpo.policy.sampling import Sampling

pytestmark = pytest.mark.long
OPTIONS = {"key": None, "concurrency": 2, "timeout": 120.0, "retries": 0, "requests_per_minute": None, "prices": None}


@pytest.fixture(scope="module")
def server(tiny_model):
    folder = tiny_model("qwen2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        assert process.poll() is None, process.stdout.read().decode()
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()


def test_it_answers_greedily_as_a_judge(server):
    folder, url = server
    asked = Server(folder, {**OPTIONS, "url": url}, "judge")
    said = {asked.chat("Tell me about cats and dogs.", 8, seed, 1.0) for seed in range(3)}
    assert len(said) == 1
    assert asked.bill.requests == 3
    assert 0 < asked.bill.tokens <= 24


def test_it_is_refused_as_an_engine(server, tmp_path):
    folder, url = server
    model, tokenizer = models.load(folder)
    engine = Endpoint(folder, 0.1, str(tmp_path), {**OPTIONS, "url": url})
    with pytest.raises(RuntimeError, match="must complete token ids"):
        engine(model, tokenizer, [tokenizer("hello there")["input_ids"]], [0], Sampling(4, 1.0, 1.0, 8), 0, "")
