"""A server that speaks OpenAI's protocol over a real model, on a thread of this process; and faults of real ones."""

import hashlib
import json
import os
import signal
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GOOD = "good"
LONG = 400  # tokens that it takes


class Served:
    """What a server does: `answer` makes the text of a chat's answer, a model those of a folder.

    faults: of the requests to come, in their order: a status, a body as text, or a function of the body that would be
    sent; `GOOD` is none. asked: bodies of all requests. spent: of those answered well.
    """

    def __init__(self, name, answer=None, folder=None, key=None):
        self.name, self.answer, self.key = name, answer, key
        self.faults, self.asked, self.spent, self.stubborn = deque(), [], [], None
        self.slow = 0.0
        self.lock = threading.Lock()
        if folder is not None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def reply(self, path, body, authorization):
        """Status and body, a dictionary or text."""
        with self.lock:
            self.asked.append(body)
            fault = self.faults.popleft() if self.faults else GOOD if self.stubborn is None else self.stubborn
        time.sleep(self.slow)
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": "wrong key"}}
        if not path.startswith("/v1/"):
            return 404, {"error": {"message": f"no path {path}"}}
        if path.endswith("/models"):
            return 200, {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0}]}
        if isinstance(fault, int):
            return fault, {"error": {"message": f"status {fault}"}}
        if body["model"] != self.name and not self.name.startswith(body["model"]):
            return 404, {"error": {"message": f"no model {body['model']}"}}
        made = self.chat(body) if path.endswith("/chat/completions") else self.completion(body)
        if made is None:
            return 400, {"error": {"message": f"the prompt is longer than {LONG} tokens"}}
        if fault != GOOD:
            return 200, fault(made) if callable(fault) else fault
        with self.lock:
            self.spent.append(body)
        return 200, made

    def body(self, kind, choice, taken, given):
        usage = {"prompt_tokens": taken, "completion_tokens": given, "total_tokens": taken + given}
        return {"id": "1", "object": kind, "created": 0, "model": self.name, "usage": usage, "choices": [choice]}

    def chat(self, body):
        [message], end = body["messages"], "stop"
        if self.answer is None:
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
            tokens, _ = self.drawn(ids, body, [])
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            end = "stop" if tokens[-1] == self.tokenizer.eos_token_id else "length"
        else:
            text = self.answer(message["content"], body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
        return self.body("chat.completion", choice, len(message["content"].split()), len(text.split()))

    def completion(self, body):
        if len(body["prompt"]) > LONG:
            return None
        tokens, logps = self.drawn(body["prompt"], body, body.get("stop_token_ids", []))
        ended = tokens[-1] in body.get("stop_token_ids", [])
        choice = {"index": 0, "text": "", "finish_reason": "stop" if ended else "length", "token_ids": tokens}
        choice["logprobs"] = {"token_logprobs": logps, "tokens": [], "top_logprobs": [], "text_offset": []}
        return self.body("text_completion", choice, len(body["prompt"]), len(tokens))

    @torch.no_grad()
    def drawn(self, ids, body, stops):
        """Tokens one by one: softmax at the temperature, top-p by sorting."""
        seed = hashlib.sha256(json.dumps([ids, body.get("seed")]).encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed))
        tokens, logps, fed, past = [], [], list(ids), None
        for _ in range(body["max_tokens"]):
            made = self.model(torch.tensor([fed]), past_key_values=past, use_cache=True)
            logits, past = made.logits[0, -1].double(), made.past_key_values
            raw = logits.log_softmax(-1)
            for row, bias in body.get("logit_bias", {}).items():
                logits[int(row)] += bias
            if (temperature := body.get("temperature", 1.0)) == 0:
                token = int(logits.argmax())
            else:
                chances, order = (logits / temperature).softmax(-1).sort(descending=True)
                chances[chances.cumsum(0) - chances >= body.get("top_p", 1.0)] = 0
                token = int(order[torch.multinomial(chances, 1, generator=generator)])
            tokens.append(token)
            fed = [token]
            logps.append(float(raw[token]))
            if token in stops or token == self.tokenizer.eos_token_id:
                break
        return tokens, logps


def kill(process):
    """End a command and what it has started, runs in sessions of their own too, by a signal that none of them sees."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # no process, or one that has ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = [process.pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    for one in family:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@contextmanager
def serving(served):
    """The URL of a server that runs while the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(*served.reply(self.path, {}, self.headers["Authorization"]))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*served.reply(self.path, body, self.headers["Authorization"]))

        def send(self, status, body):
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            try:
                self.send_response(status)
                html = isinstance(body, str) and body.startswith("<")
                self.send_header("Content-Type", "text/html" if html else "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except OSError:  # who asked has gone
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # seconds until it hears of its end
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
