"""A server that speaks OpenAI's protocol: asked by many threads, its answers checked, its bill counted.

The `openai` package (the extra `endpoint`) waits and tries again where the server is busy, slow or broken. It takes any
body for an answer, so bodies are checked here.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from typing_extensions import TypedDict

from dpo.bill import Bill, enter
from dpo.training.log import progress

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class ServerOptions(TypedDict):
    """Where a server is and how it is asked, which decides no answer: `conf/server/local.yaml` says what each means."""

    url: str | None
    key: str | None
    concurrency: int
    timeout: float
    retries: int
    requests_per_minute: float | None
    prices: list[float] | None


class Refused(RuntimeError):
    """The server does not take this one request, and says why: it is too long, say. Others may do."""


class Server:
    """A model behind an OpenAI-compatible server.

    Raises: ValueError if the options are none that could work. No request is made before the first question.
    """

    def __init__(self, model: str | None, options: ServerOptions, group: str, key: str = "model") -> None:
        self.model, self.options, self.group, self.bill = model, options, group, Bill()
        self._lock, self._next = threading.Lock(), 0.0
        if find_spec("openai") is None:
            raise ValueError(
                f"{group} needs the package openai, found none; pip install -e '.[endpoint]' -c constraints.txt"
            )
        if not model:
            raise ValueError(f"{group}.{key} must name a model that {options['url']} serves, got {model!r}")
        if options["url"] is not None and not options["url"].startswith(("http://", "https://")):
            raise ValueError(f"{group}.server.url must begin with http:// or https://, got {options['url']}")
        if (name := options["key"]) is not None and not name.replace("_", "").isalnum():
            raise ValueError(f"{group}.server.key must name an environment variable, and not be the key itself")
        if name is not None and not os.environ.get(name):
            raise ValueError(
                f"{group}.server.key names the environment variable that holds the key, {name}, found none; export it, "
                f"or {group}.server.key=null for a server that wants none"
            )
        for key in ("concurrency", "timeout", "requests_per_minute"):
            if (value := options[key]) is not None and value <= 0:  # type: ignore[literal-required]
                raise ValueError(f"{group}.server.{key} must be above 0, got {value}")
        if options["retries"] < 0:
            raise ValueError(f"{group}.server.retries must be at least 0, got {options['retries']}")
        if (prices := options["prices"]) is not None and (len(prices) != 2 or min(prices) < 0):
            raise ValueError(f"{group}.server.prices must be two, of a million tokens in and out, got {prices}")

    @cached_property
    def client(self) -> Any:
        import openai

        asked = self.options
        key = os.environ[asked["key"]] if asked["key"] else "none"
        return openai.OpenAI(base_url=asked["url"], api_key=key, timeout=asked["timeout"], max_retries=asked["retries"])

    def chat(self, text: str, max_tokens: int, seed: int, temperature: float) -> tuple[str, bool]:
        """What the model answers to a user's turn, and whether it was cut at `max_tokens`.

        Raises: Refused, or RuntimeError where no request could do: no server, a wrong key, another model.
        """

        def read(body: Any) -> tuple[str, bool]:
            said, cut = body.choices[0].message.content, body.choices[0].finish_reason == "length"
            if cut and said is None:  # while it was thinking
                return "", True
            if not isinstance(said, str):
                raise TypeError(f"found the content {said!r}")
            return said, cut

        return self.asked(
            "chat completion",
            read,
            self.client.chat.completions.create,
            messages=[{"role": "user", "content": text}],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )

    def asked(self, what: str, read: Callable[[Any], Answer], create: Callable[..., Any], **request: Any) -> Answer:
        """What `read` finds in the body that the server answers with; asked again where it is none, as `chat` says."""
        import openai

        if self.options["url"] is None:
            raise RuntimeError(
                f"{self.group}.server.url must be that of a server where something is to be asked, found null and a "
                "question that no run has had answered; give the url, or the settings of those that have"
            )
        for attempt in range(self.options["retries"] + 1):
            self._wait_for_turn()
            try:
                body = create(model=self.model, **request)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                raise Refused(f"{self._here} refused a request: {error}") from None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                ours = f"the key in {self.options['key']}" if self.options["key"] else "requests without a key"
                raise RuntimeError(
                    f"{self._here} must take {ours}: {error}; {self.group}.server.key names the environment variable "
                    "that holds another"
                ) from None
            except openai.NotFoundError as error:
                raise RuntimeError(
                    f"{self._here} must serve {self.model}: {error}; it serves {self._served()}"
                ) from None
            except openai.OpenAIError as error:
                why = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
                raise RuntimeError(
                    f"{self._here} must answer, found {why}, {self.options['retries']} retries; what was answered is "
                    "kept: start it and run again"
                ) from None
            except ValueError as error:  # a body that is no JSON
                fault = f"{error}"
            else:
                try:
                    found = read(body)
                except (AttributeError, LookupError, TypeError) as error:
                    fault = f"{error}; the body begins {str(body)[:200]!r}"
                else:
                    self._same_model(body.model)
                    self._count(body)
                    return found
            time.sleep(min(8.0, 0.5 * 2**attempt))
        raise RuntimeError(
            f"{self._here} must answer with a {what}, found none in {self.options['retries'] + 1} answers: {fault}"
        )

    def each(
        self, answer: Callable[[Question], Answer], questions: Sequence[Question], title: str
    ) -> Iterator[tuple[int, Answer]]:
        """The place of each question and what `answer` says to it, `concurrency` at once, as they come; a
        progress bar shows the bill. An error, or a first signal to stop, is raised when what is under way has come.
        """
        came: SimpleQueue[tuple[int, Answer] | None] = SimpleQueue()
        places = iter(range(len(questions)))
        stopped: list[BaseException] = []  # why nothing more is asked

        def work() -> None:
            try:
                while not stopped:
                    with self._lock:
                        place = next(places, None)
                    if place is None:
                        break
                    came.put((place, answer(questions[place])))
            except BaseException as error:
                stopped.append(error)
            came.put(None)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(self.options["concurrency"])]
        try:
            with _signals(stopped), progress(total=len(questions), name=title) as bar:
                for one in workers:
                    one.start()
                for _ in workers:
                    for place, said in iter(partial(_next, came), None):
                        bar.set_postfix_str(self.bill.said(self.options["prices"]), refresh=False)
                        bar.update()
                        yield place, said
            if stopped:
                raise stopped[0]
        finally:
            stopped.append(GeneratorExit())  # who asked has gone

    @property
    def _here(self) -> str:
        return f"the server at {self.options['url']}"

    def _served(self) -> str:
        import openai

        try:
            return ", ".join(sorted(one.id for one in self.client.models.list())) or "none"
        except (openai.OpenAIError, AttributeError, TypeError):
            return f"nobody knows what: {self.group}.server.url must be where its paths begin, mostly .../v1"

    def _same_model(self, found: Any) -> None:
        """A name may be that of a family, of which the server answers with a dated one."""
        if not str(found).startswith(str(self.model)):
            raise RuntimeError(f"{self._here} must answer with {self.model}, found {found}; it serves {self._served()}")

    def _count(self, body: Any) -> None:
        usage, prices = getattr(body, "usage", None), self.options["prices"]
        one = Bill(1, usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage is not None else Bill(1)
        with self._lock:
            self.bill += one
            enter(self.group, **vars(one), **({} if prices is None else {"money": one.money(prices)}))

    def _wait_for_turn(self) -> None:
        if (rate := self.options["requests_per_minute"]) is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + 60 / rate
            wait = self._next - 60 / rate - now
        time.sleep(wait)


def _next(came: SimpleQueue[Answer]) -> Answer:
    while True:
        with suppress(Empty):
            return came.get(timeout=1)  # a signal that comes just before a wait does not end it


@contextmanager
def _signals(stopped: list[BaseException]) -> Iterator[None]:
    """A first signal to stop is put in the list, and a second one raised, where the first would be without this."""

    def receive(number: int, frame: Any) -> None:
        if any(isinstance(one, KeyboardInterrupt) for one in stopped):
            signal.default_int_handler(number, frame)
        stopped.append(KeyboardInterrupt())
        os.write(2, b"\nstopping: answers under way are kept when they come; a second signal ends at once\n")

    ours = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        if ours and signal.getsignal(number) is signal.default_int_handler
    ]
    for number in numbers:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
