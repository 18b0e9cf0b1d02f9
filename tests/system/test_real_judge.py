"""A real language model as judge of summaries by itself: SmolLM2, cut to two layers, behind a server. Its judgement is
worth nothing; its text is real: in no form, repeated, cut. The server turns most of it into answers, as a better judge
would give them, and leaves the rest as it is.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from serving import Served, kill, serving
from smol import smollm2
from test_served_stages import chance
from whole_runs import ROOT

pytestmark = pytest.mark.long
TEXTS = ROOT.parent / "shared" / "data" / "alpaca-eval-OpenHermes-2.5-Mistral-7B.annotations.json.gz"
INVENTED = [  # articles, for where these are not
    f"{town} closed {n} of its bridges on Monday. Engineers had found cracks in the steel of the oldest, built in "
    f"{1890 + n}, and the mayor said that repairs would take until autumn. Ferries cross the river every {n} minutes."
    for n, town in enumerate(("Oslo", "Rome", "Bonn", "Kiel", "Cork"), 5)
]
ARTICLES, MESSY, KILLED = 5, 3, 10
PRICES = 2.0, 10.0


def articles() -> list[str]:
    """Texts that people and models wrote, of some hundred words."""
    if not TEXTS.exists():
        return INVENTED[:ARTICLES]
    with gzip.open(TEXTS) as rows:
        texts = [row["output_1"] for row in json.load(rows)]
    return [text for text in texts if 500 < len(text) < 700 and text.isascii() and text.count("\n") < 4][:ARTICLES]


class Judge(Served):
    """What the model says, then in the asked form what `form` makes of the question; the first `MESSY` questions of a
    run get the model's words alone, whenever they are asked. answered: question and seed of each answer.
    """

    def __init__(self, folder: str, form=None) -> None:
        super().__init__("smol", folder=folder)
        self.form, self.messy, self.answered, self.killed = form, {}, [], lambda: None

    def chat(self, body):
        made = super().chat(body)
        text, [choice] = body["messages"][0]["content"], made["choices"]
        with self.lock:
            self.answered.append((text, body["seed"]))
            shaking = "Say hello." in text or "Anna lives in Oslo." in text
            if not shaking and "[Article]" not in text and len(self.messy) < MESSY:
                self.messy.setdefault(text)
            if text in self.messy:
                self.messy[text] = choice["message"]["content"]
            elif self.form is not None:
                said = "" if "[Questions]" in text or "[Article]" in text else choice["message"]["content"]
                choice["message"]["content"] = f"{re.sub('(?i)verdict', '', said)}\n\n{self.form(text, body)}"
                choice["finish_reason"] = "stop"
            if len(self.answered) == KILLED:
                self.killed()
        return made


def larger(text, body):
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nDo not", text, re.DOTALL).groups()
    return "Verdict: A" if first > second else "Verdict: B"


def answering(text, body):
    return "Q1) B\nQ2) C" if "Anna lives in Oslo." in text else chance(text, body)


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> str:
    return smollm2(tmp_path_factory.mktemp("smollm2"), layers=2)


@pytest.fixture(scope="module")
def given(smol, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts = [f"Sum up this article in two sentences.\n\n{text}" for text in articles()]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return [
        *("data=prompts", f"data.path={file}", "data.validation=2", "data.test=1", f"policy.path={smol}"),
        *("max_length=400", "max_new_tokens=12", "threads=1", "device=cpu"),
        *("judge.model=smol", "judge.max_tokens=16", "judge.attempts=2", "judge.server.concurrency=2"),
        *(f"judge.server.prices=[{PRICES[0]},{PRICES[1]}]", "wandb.mode=disabled"),
    ]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dpo.judge", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("which,form,samples", [("pairwise", larger, 3), ("questions", answering, 4)])
def test_what_a_real_model_says(smol, given, tmp_path, which, form, samples):
    """Killed on the way, it asks for nothing twice; what has no form is counted, by what is wrong with it."""
    served = Judge(smol, form)
    with serving(served) as url:
        asked = [*given, f"judge={which}", f"judge.server.url={url}", f"generation.samples_per_prompt={samples}"]
        first = started(tmp_path, *asked)
        served.killed = lambda: kill(first)
        assert first.wait() == -signal.SIGKILL, first.stdout.read()
        paid = len(served.answered)
        again = started(tmp_path, *asked)
        text = again.communicate()[0]
    assert again.returncode == 0, text
    assert "0 finished, 1 to do" in text
    twice = {one: count - 1 for one, count in Counter(served.answered).items() if count > 1}
    assert sum(twice.values()) <= 1 + 2 * 2, twice  # the handshake, and both attempts of what was under way
    assert paid < len(served.answered)
    [kept] = (tmp_path / "cache" / "answers").glob("*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    missed = [one["answer"] for one in lines if "missed" in one["answer"]]
    assert len(missed) == MESSY
    assert {one["said"] for one in missed} == {said[:200] for said in served.messy.values()}
    whys = Counter(one["missed"] for one in missed)
    said = ", ".join(f"{count} {why}" for why, count in whys.most_common())
    assert f"answers have not the asked form: {said}; one begins " in text
    assert whys["cut at judge.max_tokens"]
    assert re.search(r"\d+ requests, \d+ tokens in, \d+ out, \d\.\d{4} at the given prices", text)
    [manifest] = (tmp_path / "runs").glob("*/*/manifest.json")
    assert json.loads(manifest.read_text())["train candidates"] == samples * (ARTICLES - 3)
    rows = [json.loads(line) for line in (manifest.parent / "train.judged.jsonl").read_text().splitlines()]
    assert all(0 <= row["correct"] <= 5 for row in rows) if which == "questions" else "score" not in rows[0]


@pytest.mark.parametrize("which", ["pairwise", "questions"])
def test_a_judge_that_never_answers_in_form_ends_the_run_and_is_quoted(smol, given, tmp_path, which):
    served = Judge(smol)
    with serving(served) as url:
        run = started(tmp_path, *given, f"judge={which}", f"judge.server.url={url}")
        text = run.communicate()[0]
    assert run.returncode == 1
    assert len(served.answered) == 2  # attempts at the handshake
    last = {"model": "smol", "messages": [{"role": "user", "content": served.answered[1][0]}]}
    asked = {**last, "max_tokens": 16, "seed": 1, "temperature": 1.0}
    with torch.no_grad():
        words = Served.chat(served, asked)["choices"][0]["message"]["content"]
    assert f"the judge smol must answer in the asked form, found {words[:200]!r} in 2 attempts" in text
    assert not list((tmp_path / "cache").glob("answers/*"))
