"""A pool of Ray actors that each hold a model: they score beside training (the design of Anyscale's llmforge), sample
responses, or judge them.

Shares go through Ray Data in their order. Each is the very pass that `scoring.score` would make, the batch that
`sampling.sample` would draw, or the response that `dpo.judges.RewardModel` would judge, so nothing depends on the
actor, on how many there are, or on one that died.
"""

import json
import logging
import math
import os
import secrets
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from dpo.cache import digest
from dpo.data.batches import Tokens
from dpo.data.records import listed
from dpo.policy import model as models
from dpo.policy.logps import forward_tokens
from dpo.policy.model import ModelSpec
from dpo.policy.sampling import Sampling, sample
from dpo.policy.scoring import Passes, Scoring, forward, items_of, parted, shares
from dpo.training.log import progress

logger = logging.getLogger(__name__)
STARTS = 3  # of a Ray of one's own: on a busy machine it may end before it has begun
TURN = threading.Lock()  # held by the pool whose Ray this process has: another's actors would find no room there


class PoolOptions(TypedDict):
    """Of a pool, which decides no number: `conf/engine/ray.yaml` says what each means."""

    concurrency: int
    batch_size: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float] | None
    max_restarts: int
    max_task_retries: int
    address: str | None


class Task(Protocol):
    """What an actor makes of a share."""

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase, share: list[Any]) -> bytes: ...

    @staticmethod
    def alone(share: list[Any]) -> list[Any]:
        """The share of each row by itself; none of a share of one row."""
        ...


class Pool:
    """Actors that score. Each takes `num_cpus`, `num_gpus` and `resources` of what Ray has, and runs on a GPU if given.

    batch_size: shares that an actor is handed at once. max_restarts: of an actor that died. max_task_retries: of what
    it was handed then. address: of a running Ray; None: one of this machine, until `close`.
    """

    group, actors, without = "scorer", "scoring actors", "scorer=ray"  # for messages, as
    advice = "What was scored is kept. Give an actor more memory, lower micro_batch_tokens, or leave out the response"

    def __init__(
        self,
        concurrency: int,
        batch_size: int,
        num_cpus: float,
        num_gpus: float,
        resources: dict[str, float] | None,
        max_restarts: int,
        max_task_retries: int,
        address: str | None,
    ) -> None:
        least: dict[str, tuple[float, int]] = {"concurrency": (concurrency, 1), "batch_size": (batch_size, 1)}
        least |= {"max_restarts": (max_restarts, 0), "max_task_retries": (max_task_retries, 0)}
        least |= {"num_cpus": (num_cpus, 0), "num_gpus": (num_gpus, 0)}
        least |= {f"resources.{name}": (amount, 0) for name, amount in (resources or {}).items()}
        for name, (value, minimum) in least.items():
            if not minimum <= value < math.inf:
                raise ValueError(f"{self.group}.{name} must be at least {minimum}, got {value}")
        if num_gpus > 1 and num_gpus % 1:
            raise ValueError(f"{self.group}.num_gpus must be a part of one GPU, or whole ones, got {num_gpus}")
        if ours := {"CPU", "GPU"} & (resources or {}).keys():
            raise ValueError(
                f"{self.group}.resources must not name {min(ours)}; give {self.group}.num_{min(ours).lower()}s"
            )
        if find_spec("ray") is None:
            raise ValueError(
                f"{self.without} needs the package ray, found none; pip install -e '.[ray]' -c constraints.txt"
            )
        self.concurrency, self.batch_size, self.address = concurrency, batch_size, address
        self.said = f"a pool of {concurrency}"  # for messages
        self._started = False
        self.needs = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}  # of one actor
        self.options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
        self.lives = {"max_restarts": max_restarts, "max_task_retries": max_task_retries}

    def check(self) -> None:
        """Refuse a pool that could not start, before any model is loaded. Raises: ValueError."""
        if self.address is None:
            own = {name: self.concurrency * amount for name, amount in self.needs.items()}
            self._check_room([own | {"GPU": torch.cuda.device_count()}])
            return
        try:
            if self.address != "auto":  # Ray itself would ask for minutes, and end the process
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            self._start()
            machines = [one["Resources"] for one in _ray().nodes() if one["Alive"]]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.group}.address must be host:port of a running Ray, or auto, got {self.address}: {error}; "
                "null starts one here"
            ) from error
        finally:
            self.close()
        self._check_room(machines)

    def _check_room(self, machines: list[dict[str, float]]) -> None:
        """machines: what each has. An actor lives on one of them."""
        on = f" on {len(machines)} machines" if len(machines) > 1 else ""
        for name, amount in self.needs.items():
            if amount and sum(int(has.get(name, 0) / amount + 1e-9) for has in machines) < self.concurrency:
                raise ValueError(
                    f"{self.concurrency} {self.actors} must find {amount:g} {name} each, found "
                    f"{sum(has.get(name, 0) for has in machines):g} in all{on}; lower "
                    f"{self.group}.concurrency, or what each takes"
                )

    def passes(
        self,
        which: ModelSpec,
        weights: str,
        packed: bool,
        settings: Scoring,
        name: str,
        first: Sequence[bytes],
        sources: dict[bytes, str],
        found: Callable[[bytes, Tensor], None],
    ) -> Passes:
        """What `scoring.score` calls in place of the model `which`, whose fingerprint is `weights`.

        first: digests of all sequences, as they will be read. sources: where each came from, for messages. found: told
        of each as it comes: the log-probs of its tokens, (tokens,) float32.
        """

        def run(contents: Sequence[bytes], sequences: Sequence[Tokens], folder: Path) -> list[Tensor]:
            turn = {content: number for number, content in reversed([*enumerate(first)])}
            passes = shares(sequences, forward_tokens(settings.micro_batch_tokens, packed))
            passes.sort(key=lambda share: min(turn[contents[row]] for rows in share for row in rows))
            task = Score(settings.precision, packed)

            def rows(place: int) -> list[str]:
                return [sources[contents[row]] for rows in passes[place] for row in rows]

            def made(left: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
                asked = {place: items_of(passes[place], sequences) for place in left}
                for place, said in self.stream(asked, task, partial(models.load, anywhere(which)), weights, rows):
                    yield place, torch.from_numpy(np.frombuffer(said, dtype=np.float32).copy())

            try:
                return each_kept(passes, packed, contents, sequences, folder, name, found, made)
            finally:
                self.close()

        return run

    def stream(
        self,
        asked: dict[int, Any],
        task: Task,
        load: Callable[[str], tuple[Any, Any]],
        weights: str | None,
        rows: Callable[[int], list[str]],
    ) -> Iterator[tuple[int, bytes]]:
        """Places of the shares that are asked, in their order, with what the task makes of each.

        load: the model and its tokenizer, onto a device, by a process of any machine. weights: its fingerprint; None:
        of a copy that nobody else writes. rows: what a share is made of, for messages.
        """
        if not asked:
            return
        ray = _ray()
        self._start()
        begun = ray.remote(num_cpus=0)(Begun).remote()
        data = ray.data.DataContext.get_current()
        data.execution_options.preserve_order = True
        data.enable_progress_bars = data.print_on_execution_start = False
        data.max_errored_blocks = 0
        lines = [{"place": place, "share": json.dumps(share).encode()} for place, share in asked.items()]
        blocks = -(-len(lines) // self.batch_size)
        made = ray.data.from_items(lines, override_num_blocks=blocks).map_batches(
            Worker,
            fn_constructor_args=(load, weights, task, torch.get_num_threads(), self.needs["GPU"] > 0, begun),
            batch_size=self.batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(self.concurrency, blocks)),
            **self.options,
            **self.lives,
        )
        try:
            for line in made.iter_rows():
                yield line["place"], line["made"]
        except Exception as error:
            raise self._named(error, ray.get(begun.left.remote()), rows) from error

    def close(self) -> None:
        """End what was started, or leave what was joined."""
        if self._started:
            _ray().shutdown()
            self._started = False
            TURN.release()

    def _start(self) -> None:
        """Start Ray, or join it, when no other pool has one here. Raises: RuntimeError if it does not start."""
        ray = _ray()
        if self._started:
            return
        TURN.acquire()
        self._started = True
        if self.address is not None:
            ray.init(address=self.address, **QUIET)
            return
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # nobody else joins what is started here
        own = {name: self.concurrency * amount for name, amount in (self.options["resources"] or {}).items()}
        for start in range(1, STARTS + 1):
            try:
                cpus = 1 + math.ceil(self.concurrency * self.needs["CPU"])
                ray.init(num_cpus=cpus, resources=own, include_dashboard=False, **QUIET)
                return
            except Exception as error:
                ray.shutdown()
                if start == STARTS:
                    raise RuntimeError(
                        f"Ray must start on this machine, found that it does not, {STARTS} times: {error}; leave out "
                        f"{self.without}, or set {self.group}.address to one that runs"
                    ) from error
                logger.warning(f"ray: did not start ({error}), it is started again: {start + 1} of {STARTS}")

    def _named(self, error: Exception, left: dict[str, int], rows: Callable[[int], list[str]]) -> RuntimeError:
        """Which responses actors were at when they died, and what they died of."""
        times = Counter({place: count for place, count in left.items() if "/" not in place})
        most = max(times.values(), default=0)
        names = []
        for place in (place for place, count in times.items() if count == most):
            within = [int(part) for whole, _, part in (one.partition("/") for one in left) if whole == place and part]
            names += [rows(int(place))[row] for row in within] or rows(int(place))
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if not names:
            return RuntimeError(f"{self.actors} must start, found that they do not: {cause}")
        return RuntimeError(
            f"{self.actors} must live through every response, found that they ended {most} times at "
            f"{'this one' if len(names) == 1 else f'one of these {len(names)}'}:{listed(names)}\n{cause}\n{self.advice}"
        )


def each_kept(
    passes: Sequence[list[list[int]]],
    layout: Any,
    contents: Sequence[bytes],
    sequences: Sequence[Tokens],
    folder: Path,
    name: str,
    found: Callable[[bytes, Tensor], None],
    made: Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]],
) -> list[Tensor]:
    """Log-probs of the tokens of each sequence, of passes that are kept in `folder` as they come: those of a run that
    was stopped are there already.

    passes: rows of sequences, as `scoring.shares` parts them. layout: what else a pass goes by. made: the passes at the
    places that are asked for, as they come, (N,) float32 each, which `scoring.parted` reads. found: see `Pool.passes`.
    """
    names = [[contents[row].hex() for rows in share for row in rows] for share in passes]
    files = [folder / f"{digest([layout, named])}.safetensors" for named in names]
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[int, Tensor] = {}
    with progress(total=len(sequences), name=name) as bar:

        def take(share: list[list[int]], logps: Tensor) -> None:
            for row, one in parted(share, sequences, logps):
                values[row] = one
                found(contents[row], one)
            bar.update(sum(map(len, share)))

        for share, file in zip(passes, files, strict=True):
            if file.exists():
                take(share, load_file(file)["logps"])
        for place, logps in made([place for place, file in enumerate(files) if not file.exists()]):
            unfinished = files[place].with_suffix(".unfinished")
            save_file({"logps": logps}, unfinished)
            unfinished.rename(files[place])
            take(passes[place], logps)
    return [values[row] for row in range(len(sequences))]


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _ray() -> Any:
    """Imported where it is used, and told to be quiet and to report to nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15, where training waits for the actors that it starves
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what concerns a run is raised
    import ray
    import ray.data

    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # max_restarts has no other way in
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def anywhere(which: ModelSpec) -> ModelSpec:
    """The same model for a process that works in another folder, or on another machine that sees the files."""
    folder = Path(models.resolve_path(which.path))
    adapter = None if which.adapter is None else str(Path(which.adapter).resolve())
    return replace(which, path=str(folder.resolve()) if folder.is_dir() else which.path, adapter=adapter, layout=None)


@dataclass(frozen=True)
class Score:
    """What an actor does with a share: a pass over prompts with their responses."""

    precision: str
    packed: bool

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: list[Any]) -> bytes:
        items = [(prompt, responses) for prompt, responses in share]
        return forward(model, items, self.precision, self.packed).numpy().tobytes()

    @staticmethod
    def alone(share: list[Any]) -> list[Any]:
        return [[(prompt, [one])] for prompt, responses in share for one in responses]


@dataclass(frozen=True)
class Draw:
    """The same: a batch of responses, to prompts with their places."""

    sampling: Sampling
    seed: int

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: list[Any]) -> bytes:
        prompts, places = zip(*share, strict=True)
        drawn = sample(model, tokenizer, prompts, self.sampling, self.seed, "", places)
        return json.dumps([[one.response_ids, one.text, one.ended] for one in drawn]).encode()

    @staticmethod
    def alone(share: list[Any]) -> list[Any]:
        return [[row] for row in share]


class Worker:
    """An actor: the model, and one share after another. begun: a handle of `Begun`."""

    def __init__(
        self,
        load: Callable[[str], tuple[Any, Any]],
        weights: str | None,
        task: Task,
        threads: int,
        cuda: bool,
        begun: Any,
    ) -> None:
        torch.set_num_threads(threads)  # with others the last bits would be others
        self.model, self.tokenizer = load("cuda" if cuda else "cpu")
        if weights is not None and (found := models.fingerprint(self.model)) != weights:
            raise RuntimeError(
                f"an actor must load the weights {weights[:12]} from {self.model.name_or_path}, found {found[:12]}; "
                "the same files must be there for all machines of the pool"
            )
        self.task, self.begun = task, begun

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        made = np.empty(len(batch["place"]), dtype=object)
        for number, (place, said) in enumerate(zip(batch["place"].tolist(), batch["share"], strict=True)):
            share = json.loads(said)
            if self._begin(place):  # an actor died here: at which row?
                for row, alone in enumerate(self.task.alone(share)):
                    self._begin(f"{place}/{row}")
                    self.task(self.model, self.tokenizer, alone)
                    self.begun.end.remote(f"{place}/{row}")
            made[number] = self.task(self.model, self.tokenizer, share)
            self.begun.end.remote(str(place))
        return {"place": batch["place"], "made": made}

    def _begin(self, what: Any) -> bool:
        import ray

        return ray.get(self.begun.begin.remote(str(what)))


class Begun:
    """What actors are at, kept in an actor of its own that outlives them."""

    def __init__(self) -> None:
        self.times: dict[str, int] = {}

    def begin(self, what: str) -> bool:
        """Whether it was begun before and never ended."""
        self.times[what] = self.times.get(what, 0) + 1
        return self.times[what] > 1

    def end(self, what: str) -> None:
        del self.times[what]

    def left(self) -> dict[str, int]:
        """How many times each was begun that was not ended."""
        return self.times
