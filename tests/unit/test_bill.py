"""What a run paid adds up over its parts, and stands beside its figures."""

import json

from serving import Served, serving

from dpo.bill import enter, paid_by, total
from dpo.cache import remember_each
from dpo.endpoint import Server
from dpo.sweep.directory import evaluation, finish

OPTIONS = {"key": None, "concurrency": 2, "timeout": 30.0, "retries": 0, "requests_per_minute": None}


def test_parts_of_a_run_add_up(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    with serving(Served("m", lambda text, body: "one two")) as url:

        def part(questions, prices=None):
            server = Server("m", {**OPTIONS, "url": url, "prices": prices}, "judge")

            def answer(some):
                return server.each(lambda text: server.chat(text, 9, 0, 0.0)[0], some, "")

            remember_each(tmp_path / "cache", "answers", {}, questions, answer)

        part(["nobody's"])
        with paid_by(run):
            part(["nobody's", "of three words"], [1e6, 1e5])
            with open(run / "bill.jsonl", "a") as file:
                file.write('\n{"judge": {"requ')  # a disk was full
        with paid_by(other):
            part(["nobody's"])
        with paid_by(run):
            part(["of three words", "of three more words"])
            enter("judge", requests=0)
    assert total(run) == {
        **{"kept/answers": 2, "judge/requests": 2, "judge/prompt_tokens": 7, "judge/tokens": 4},
        "judge/money": 3 * 1.0 + 2 * 0.1,  # of the part with prices
    }
    assert total(other) == {"kept/answers": 1}
    finish(run, "evaluation.json", {"n": 3})
    assert evaluation(run) == json.loads((run / "evaluation.json").read_text()) == {"n": 3, **total(run)}
    assert "judge/requests 2, judge/prompt_tokens 7" in capsys.readouterr().out


def test_a_run_that_asked_nobody_has_no_bill(tmp_path):
    with paid_by(tmp_path):
        finish(tmp_path, "manifest.json", {"seconds": 1.0})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"seconds": 1.0}
    assert not (tmp_path / "bill.jsonl").exists()
