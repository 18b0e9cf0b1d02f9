"""A server's answers and faults, over a real connection to one on this machine."""

import os
import signal
import threading

import pytest
from serving import GOOD, Served, serving

from dpo.endpoint import Refused, Server

OPTIONS = {
    "key": None,
    "concurrency": 4,
    "timeout": 30.0,
    "retries": 2,
    "requests_per_minute": None,
    "prices": None,
}


@pytest.fixture
def echo():
    """A server that answers with the last word it was told."""
    return Served("m", lambda text, body: text.split()[-1])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def at(url, model="m", **changed):
    return Server(model, {**OPTIONS, "url": url, **changed}, "judge")


def test_an_answer_and_its_bill(echo):
    with serving(echo) as url:
        server = at(url, prices=[2.0, 10.0])
        assert server.chat("say yes", 9, 3, 0.5) == ("yes", False)
        assert server.chat("say no", 9, 3, 0.0) == ("no", False)
    first = echo.asked[0]
    assert first["messages"] == [{"role": "user", "content": "say yes"}]
    assert {key: first[key] for key in ("model", "max_tokens", "temperature", "seed")} == {
        **{"model": "m", "max_tokens": 9, "temperature": 0.5, "seed": 3}
    }
    bill = server.bill
    assert (bill.requests, bill.prompt_tokens, bill.tokens) == (2, 4, 2)
    assert bill.said(None) == "2 requests, 4 tokens in, 2 out"
    assert bill.said([2e5, 1e6]) == "2 requests, 4 tokens in, 2 out, 2.8000 at the given prices"


BROKEN = {
    "busy": 429,
    "broken": 500,
    "overloaded": 503,
    "a web page": "<html><body>gateway</body></html>",
    "an error with 200": '{"error": {"message": "later"}}',
    "nothing": "",
    "half a body": '{"id": "1", "choices": [{"mess',
    "null": "null",
    "a number": "7",
    "no choices": lambda body: {**body, "choices": []},
    "choices that are null": lambda body: {**body, "choices": None},
    "no text": lambda body: {**body, "choices": [{**body["choices"][0], "message": {"role": "a", "content": None}}]},
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
def test_a_fault_that_passes_is_asked_again(echo, fault):
    echo.faults += [fault, fault]
    with serving(echo) as url:
        server = at(url)
        assert server.chat("say yes", 9, 0, 0.0) == ("yes", False)
    assert len(echo.asked) == 3
    assert server.bill.requests == 1


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
def test_a_fault_that_stays_is_an_error(echo, fault):
    echo.stubborn = fault
    with serving(echo) as url, pytest.raises(RuntimeError, match=f"the server at {url} must answer"):
        at(url).chat("say yes", 9, 0, 0.0)
    assert len(echo.asked) == 3


def test_a_slow_server_is_not_waited_for(echo, monkeypatch):
    monkeypatch.undo()
    echo.slow = 1.0
    with serving(echo) as url, pytest.raises(RuntimeError, match="must answer, found APITimeoutError"):
        at(url, timeout=0.1, retries=0).chat("say yes", 9, 0, 0.0)


def test_who_does_not_answer_is_named(echo, monkeypatch):
    with pytest.raises(RuntimeError, match=r"at http://127\.0\.0\.1:1/v1 must answer, found APIConnectionError"):
        at("http://127.0.0.1:1/v1", retries=0).chat("say yes", 9, 0, 0.0)
    with serving(echo) as url:
        with pytest.raises(RuntimeError, match=r"must serve other: .*; it serves m"):
            at(url, "other").chat("say yes", 9, 0, 0.0)
        with pytest.raises(RuntimeError, match=r"nobody knows what: judge\.server\.url must be where its paths begin"):
            at(url.removesuffix("/v1"), "other").chat("say yes", 9, 0, 0.0)
        echo.key = "right"
        monkeypatch.setenv("MY_KEY", "wrong")
        with pytest.raises(RuntimeError, match=r"must take the key in MY_KEY: .*; judge\.server\.key names the env"):
            at(url, key="MY_KEY").chat("say yes", 9, 0, 0.0)
        with pytest.raises(RuntimeError, match=r"must take requests without a key: .*; judge\.server\.key names"):
            at(url).chat("say yes", 9, 0, 0.0)
        monkeypatch.setenv("MY_KEY", "right")
        assert at(url, key="MY_KEY").chat("say yes", 9, 0, 0.0) == ("yes", False)
        echo.faults += [403]
        with pytest.raises(RuntimeError, match=r"must take the key in MY_KEY: .* status 403"):
            at(url, key="MY_KEY").chat("say yes", 9, 0, 0.0)
        echo.faults += [lambda body: {**body, "model": "another"}]
        with pytest.raises(RuntimeError, match="must answer with m, found another; it serves m"):
            at(url, key="MY_KEY").chat("say yes", 9, 0, 0.0)


def test_a_family_answers_by_its_latest_model():
    served = Served("m-2024-08-06", lambda text, body: "yes")
    with serving(served) as url:
        assert at(url, "m").chat("say yes", 9, 0, 0.0) == ("yes", False)


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_cannot_be_is_refused_alone(echo, status):
    echo.faults += [status]
    with serving(echo) as url:
        server = at(url)
        with pytest.raises(Refused, match=f"status {status}"):
            server.chat("say yes", 9, 0, 0.0)
        assert server.chat("say yes", 9, 0, 0.0) == ("yes", False)
    assert len(echo.asked) == 2


def test_many_are_asked_at_once_and_no_more_than_that(echo):
    """Four wait for each other, so four are asked at once; a fifth would be seen."""
    waiting, most, lock = threading.Barrier(4, timeout=30), [0, 0], threading.Lock()

    def answer(question):
        with lock:
            most[0] += 1
            most[1] = max(most)
        waiting.wait()
        with lock:
            most[0] -= 1
        return 10 * question

    found = dict(at("http://nowhere").each(answer, range(12), ""))
    assert found == {place: 10 * place for place in range(12)}
    assert most == [0, 4]


def test_an_error_comes_when_what_is_under_way_has_come():
    """What was answered before it is not lost, and nothing is begun after it."""
    begun = []

    def answer(question):
        begun.append(question)
        if question == 1:
            raise RuntimeError("no")
        return question

    found = []
    with pytest.raises(RuntimeError, match="no"):
        found.extend(at("http://nowhere", concurrency=1).each(answer, range(5), ""))
    assert begun == [0, 1]


@pytest.fixture
def heard():
    """Who starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signals", [1, 2])
def test_what_is_under_way_comes_before_a_signal_stops(signals, capfd, heard, monkeypatch):
    """And nothing is begun after it. At a second one it is not waited for, nor when the process ends."""
    both, told, release, begun, ended, found = threading.Barrier(2), threading.Event(), threading.Event(), [], [], []
    write = os.write
    monkeypatch.setattr(os, "write", lambda *line: (write(*line), told.set()))  # the last thing done at a first signal

    def answer(question):
        begun.append(question)
        both.wait()
        for _ in range(signals if question == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread gets, as from a terminal
            assert told.wait(60)
        assert told.wait(60)
        assert signals == 1 or not release.wait(60)
        ended.append(threading.current_thread().daemon)
        return question

    with pytest.raises(KeyboardInterrupt):
        found.extend(at("http://a", concurrency=2).each(answer, range(9), ""))
    assert sorted(begun) == [0, 1]
    assert (sorted(found), ended) == (([(0, 0), (1, 1)], [True, True]) if signals == 1 else ([], []))
    release.set()
    assert "stopping: answers under way are kept" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_requests_keep_their_distance(echo, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    server = at("http://nowhere", requests_per_minute=30.0)
    for _ in range(3):
        server._wait_for_turn()
    assert waited == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"url": "localhost:8000"}, "judge.server.url must begin with http:// or https://, got localhost:8000"),
        ({"key": "sk-abc.def"}, "judge.server.key must name an environment variable, and not be the key itself"),
        ({"key": "NO_SUCH_KEY"}, "holds the key, NO_SUCH_KEY, found none; export it, or judge.server.key=null"),
        ({"concurrency": 0}, "judge.server.concurrency must be above 0, got 0"),
        ({"timeout": -1.0}, "judge.server.timeout must be above 0"),
        ({"requests_per_minute": 0.0}, "judge.server.requests_per_minute must be above 0"),
        ({"retries": -1}, "judge.server.retries must be at least 0"),
        ({"prices": [1.0]}, "judge.server.prices must be two, of a million tokens in and out"),
        ({"prices": [1.0, -1.0]}, "judge.server.prices must be two"),
        ({"model": None}, "judge.model must name a model that http://a serves, got None"),
    ],
)
def test_options_that_could_not_work_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        at(**{"url": "http://a", **changed})


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("dpo.endpoint.find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"judge needs the package openai, found none; pip install -e '.\[endpoint\]' -c constraints.txt",
    ):
        at("http://a")


def test_good_is_no_fault(echo):
    echo.faults += [GOOD]
    with serving(echo) as url:
        assert at(url).chat("say yes", 9, 0, 0.0) == ("yes", False)
