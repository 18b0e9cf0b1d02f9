"""Whole runs whose judge and engine stand behind a server: what comes of its answers, and what a kill costs."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from serving import Served, kill, serving
from whole_runs import ROOT, SMALL, frozen

from dpo import evaluate, generate, judge, train
from dpo.data.records import read
from dpo.sweep.rehearse import Rehearsal

SECRET = "sk-of-this-test-alone"


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def reader(text, body):
    """Asks for five words of the article, of all that it names, and finds them in a summary."""
    if "[Article]" in text:
        words = sorted({*re.findall(r"\w{4,}", text.split("[Article]\n")[1])})[:5]
        blocks = []
        for nth, word in enumerate(words, 1):
            choices = [word, *(f"none{nth}{letter}" for letter in "bcde")]
            said = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCDE", choices, strict=True))
            blocks.append(f"Q{nth}) Which of group {nth}?\n{said}\nAnswer: A")
        return "\n\n".join(blocks)
    summary, asked = re.search(r"\[Text\]\n(.*)\n\n\[Questions\]\n(.*)", text, re.DOTALL).groups()
    said = []
    for block in re.split(r"\n(?=Q)", asked):
        found = [letter for letter, choice in re.findall(r"([A-E])\) (\S+)", block) if choice in summary.split()]
        said.append(f"{block.split(')')[0]}) {found[0] if found else 'Unsure'}")
    return "\n".join(said)


def right(article: str, summary: str) -> int:
    words = sorted({*re.findall(r"\w{4,}", article)})[:5]
    return sum(word in summary.split() for word in words)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Candidates, pairs by answered questions and the rule, a policy trained on them, and its evaluation."""
    folder, served = tmp_path_factory.mktemp("served"), Served("m", reader)
    with serving(served) as url:
        asked = ["judge=questions", "judge.model=m", f"judge.server.url={url}", "rule=accurate_then_short"]
        asked += ["rule.threshold=1", "judge.server.retries=0"]
        for verb, command, given in (
            ("generate", generate, []),
            ("judge", judge, asked),
            ("train", train, [*asked, "rule@evaluation.rule=accurate_then_short", "evaluation.rule.min_length_diff=1"]),
        ):
            (folder / verb).mkdir()
            config = frozen(folder / verb, *SMALL, "seed=3", *given, verb=verb)
            command.run(config, folder / verb)
        policy = f"policy.path={folder / 'train' / 'policy'}"
        for name, changed in (("again", []), ("by another rule", ["rule.tie_below_threshold=shorter"])):
            (folder / name).mkdir()
            paid = len(served.spent)
            given = [policy, "against=initial"]
            config = frozen(folder / name, *SMALL, "seed=3", *given, *asked, *changed, verb="evaluate")
            evaluate.run(config, folder / name)
            (folder / name / "paid").write_text(str(len(served.spent) - paid))
        from omegaconf import OmegaConf

        assert Rehearsal().of(OmegaConf.to_container(config))["problems"] == []
    return folder


def test_pairs_are_those_of_the_answers_and_the_rule(made):
    for split in ("train", "validation"):
        rows = lines(made / "judge" / f"{split}.judged.jsonl")
        for row in rows:
            assert row["correct"] == row["score"] == right(row["prompt"], row["response"])
        pairs = read(made / "judge" / f"{split}.jsonl")
        assert pairs
        for pair in pairs:
            one, other = right(pair.prompt, pair.chosen), right(pair.prompt, pair.rejected)
            fewer = len(pair.rejected.split()) - len(pair.chosen.split())
            assert (fewer >= 3) if min(one, other) >= 1 else one > other


def test_an_evaluation_goes_by_its_own_rule(made):
    rows, found = (
        lines(made / "train" / "responses.jsonl"),
        json.loads((made / "train" / "evaluation.json").read_text()),
    )
    for row in rows:
        one, other = (right(row["prompt"], row[side]) for side in ("response", "baseline"))
        fewer = len(row["baseline"].split()) - len(row["response"].split())
        expected = (fewer > 0) - (fewer < 0) if min(one, other) >= 3 else (one > other) - (one < other)
        assert row["win"] == 0.5 + expected / 2
    assert found["win_rate"] == pytest.approx(sum(row["win"] for row in rows) / len(rows))
    assert found["correct"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows))


def test_another_rule_asks_nothing_again(made):
    """The articles of the tests have their questions, and what was judged once is known: but for a handshake."""
    assert (made / "by another rule" / "paid").read_text() == "1"
    wins = [[row["win"] for row in lines(made / name / "responses.jsonl")] for name in ("again", "by another rule")]
    assert len(wins[0]) == len(wins[1]) == 10


def test_the_case_study_at_three_articles(tmp_path, tiny_model):
    """Its recipe end to end, with a tiny policy, articles in the form in which they are published, and this judge."""
    towns = ("Oslo", "Rome", "Bonn", "Kiel", "Cork", "Lyon")
    articles = [
        {"article": f"({town}) The mayor of {town} said on Monday that {3 * n} bridges had closed.", "id": str(n)}
        for n, town in enumerate(towns)
    ]
    rows = [json.dumps({**one, "highlights": f"{one['article'].split()[0]} closes bridges ."}) for one in articles]
    (tmp_path / "articles.jsonl").write_text("\n".join(rows))
    given = ["table=paper_summarization", "beta=0.03", f"data.path={tmp_path / 'articles.jsonl'}", "data.train=3"]
    given += ["data.validation=1", "data.test=2", f"policy.path={tiny_model('qwen2')}", "max_length=400", "epochs=1"]
    given += ["max_new_tokens=12", "processes=1", "threads=1", "batch_size=4", "evaluation.log_samples=1"]
    served = Served("meta-llama/Llama-3.1-70B-Instruct", chance)
    with serving(served) as url:
        directory = tmp_path / "run"
        directory.mkdir()
        train.run(frozen(directory, *given, f"judge.server.url={url}"), directory)
    found = json.loads((directory / "evaluation.json").read_text())
    assert found["n"] == 2
    assert 0 <= found["correct"] <= 5
    assert math.isfinite(found["kl"])
    asked = [one["messages"][0]["content"] for one in served.asked]
    assert sum("[Article]" in text for text in asked) == 6
    assert (
        sum("Anna lives in Oslo." in text for text in asked) == 1
    )  # one handshake: pairs and evaluation have one judge
    assert all("Sum up this article" in text for text in asked if "[Article]" in text)
    losses = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in losses if row["split"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-3)  # bf16


def chance(text, body):
    """Five questions to every article, and answers that a digest of the summary decides."""
    if "[Article]" in text:
        return reader(text + " alpha bravo charlie delta ether", body)
    summary = re.search(r"\[Text\]\n(.*)\n\n\[Questions\]", text, re.DOTALL)[1]
    digest = hashlib.sha256(summary.encode()).digest()
    return "\n".join(f"Q{nth}) {'ABCDE'[digest[nth] % 5]}" for nth in range(1, 6))


def larger(text, body):
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nDo not", text, re.DOTALL).groups()
    return "Verdict: A" if first > second else "Verdict: B"


@pytest.mark.long
@pytest.mark.parametrize("verb", ["judge", "generate", "evaluate"])
def test_a_stage_that_is_killed_pays_for_no_answer_twice(tmp_path, tiny_model, verb):
    """Killed by a signal that it cannot see, while the server answers; the same command goes on from there. The key is
    in no file and in nothing that is said.
    """
    process, answered, most = [], [], 20

    class Deadly(Served):
        def reply(self, path, body, authorization):
            said = super().reply(path, body, authorization)
            answered.append(json.dumps(body, sort_keys=True))
            if len(answered) == most:
                kill(process[0])
            return said

    pairs = tmp_path / "prompts.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(8)))
    model = tiny_model("llama")
    served = Deadly("m", None if verb == "generate" else larger, folder=model, key=SECRET)
    with serving(served) as url:
        command = [sys.executable, "-m", f"dpo.{verb}", "data=prompts", f"data.path={pairs}", f"policy.path={model}"]
        command += ["max_length=60", "max_new_tokens=6", "wandb.mode=disabled", "device=cpu", "threads=1"]
        command += ["generation.samples_per_prompt=4"]
        command += ["data.validation=1", "data.test=6"] if verb == "evaluate" else ["data.validation=2", "data.test=1"]
        judged = ["judge=pairwise", "judge.model=m", f"judge.server.url={url}", "judge.server.concurrency=2"]
        judged += ["judge.server.key=SERVERS_KEY"]
        if verb == "judge":
            command += judged
        elif verb == "evaluate":  # against another sample of the policy
            most = 7
            command += [*judged, f"against={model}"]
        else:
            command += ["engine=endpoint", "engine.served=m", f"engine.server.url={url}", "engine.server.concurrency=2"]
            command += ["engine.server.key=SERVERS_KEY"]
        runs = []
        for _ in range(2):
            process[:] = [
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "SERVERS_KEY": SECRET},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            ]
            runs.append((process[0].communicate()[0], process[0].returncode))
    assert runs[0][1] == -signal.SIGKILL, runs[0][0]
    assert runs[1][1] == 0, runs[1][0]
    assert "0 finished, 1 to do" in runs[1][0]
    asked = Counter(answered)
    shaking = 7 if verb == "generate" else 1
    twice = [text for text, count in asked.items() if count > 1]
    assert sum(asked[text] - 1 for text in twice) <= 2 * shaking + 2  # the handshakes, and what was under way
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert SECRET not in runs[0][0] + runs[1][0]
    if verb == "evaluate":
        [last] = (tmp_path / "runs").glob("*/*/evaluation.json")
        assert json.loads(last.read_text())["n"] == 6
    else:
        [last] = (tmp_path / "runs").glob("*/*/manifest.json")
        assert json.loads(last.read_text())["train candidates"] > 0
    told, who = json.loads(last.read_text()), "engine" if verb == "generate" else "judge"
    assert len(served.spent) - 2 <= told[f"{who}/requests"] <= len(served.spent)  # but for what the kill came before
    assert told["kept/responses" if verb == "generate" else "kept/answers"] >= most - shaking - 2
