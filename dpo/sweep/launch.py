"""Plan a sweep and execute its runs on this machine: skip what is finished, list what failed.

Nothing is trained in the process that plans: each run is `python -m dpo.sweep.execute DIRECTORY` in a process of its
own, under torchrun if it asks for several. Those of a CPU are forked from one that has imported what they need.
"""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from dpo.cores import cores
from dpo.sweep import command_line, gpus
from dpo.sweep.command_line import EXPERIMENTS, in_hydras_words, message, no_options
from dpo.sweep.directory import MOST, reason, status
from dpo.sweep.execute import IN_USE, THREADS
from dpo.sweep.forks import Fork
from dpo.sweep.identity import flatten, in_name, non_numeric
from dpo.sweep.plan import Composed, Refused, Run, deciding_nothing, key_of, plan, resolve
from dpo.sweep.renamed import renamed
from dpo.sweep.rounds import run_chains
from dpo.sweep.schema import check
from dpo.sweep.signature import check_signature, instantiate
from dpo.world import sizes

OTHERS = ("server", "pool", "llm", "concurrency", "model")  # keys of what has other processes answer
WORDS = ("world", *sizes.MADE, "initial", "human")  # for a model that is small, or another policy of the run
AT_ONCE = 8  # runs at most, unless told
SMALL = 50e6  # bytes of weights, below which a model is small: the world's largest has 10 million


def command(verb: str) -> NoReturn:
    """What `python -m dpo.VERB` does with the command line: --help, a plan of one, or with -m a sweep."""
    sys.argv[1:], said = renamed(sys.argv[1:])
    for line in said:
        print(line, file=sys.stderr, flush=True)
    command_line.run(verb, single)
    sys.exit()


def single(config: DictConfig) -> NoReturn:
    """The same road as a sweep, with a plan of one."""
    node: Any = OmegaConf.to_container(HydraConfig.get().launcher, resolve=True)
    try:
        launcher: Sweep = instantiate(node)
    except ValueError:  # one of Hydra's own
        sys.exit(f"hydra/launcher must be local or slurm, got {node['_target_']}")
    except TypeError:  # other options than it has
        sys.exit("\n".join(check_signature("hydra.launcher", node)))
    launcher.execute([_composed(config, HydraConfig.get())], [])


class Grid(Sweeper):
    """Every combination of the values given. (Hydra's own sweeper writes files before it has checked any.)"""

    def __init__(self, params: dict[str, str] | None) -> None:
        self.params = params or {}

    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        axes: dict[str, list[str]] = {}  # the command line counts over an experiment
        for override in self.parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments]):
            key = override.get_key_element()
            if not override.is_sweep_override():
                axes[key] = [override.input_line or ""]
            elif override.is_discrete_sweep():
                values = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
                if isinstance(override.value(), RangeSweep):  # it adds up its steps, and 0.1 + 0.2 is not 0.3
                    values = [value if value.lstrip("-").isdigit() else f"{float(value):.12g}" for value in values]
                axes[key] = in_hydras_words([f"{key}={value}" for value in values])
            else:
                raise ConfigCompositionException(
                    f"{key} must be a list of values, like {key}=1,2,3; got {override.input_line}"
                )
        if none := [key for key, values in axes.items() if not values]:
            raise ConfigCompositionException(
                f"{none[0]} must have values to sweep, found none: no option, or an empty range"
            )
        if math.prod(map(len, axes.values())) > MOST:
            sizes = ", ".join(f"{key} has {len(values)}" for key, values in axes.items() if len(values) > 1)
            raise ConfigCompositionException(f"a sweep must have at most {MOST} runs; {sizes} values: sweep in parts")
        return self.launcher.launch([list(combination) for combination in itertools.product(*axes.values())], 0)


class Combinations:
    """Composes combinations of overrides as Hydra's loader does, which reads and merges all files again for each.

    Those that choose the same options of groups are composed once, and get their values in copies of that.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig, swept: Collection[str] = ()) -> None:
        self.loader, self.config, self.swept = loader, config, swept
        self.parsed = cache(OverridesParser.create(config_loader=loader).parse_override)
        self.is_group = cache(loader.get_group_options)
        self.alike: dict[tuple[str, ...], Composed] = {}  # by options

    def compose(self, overrides: Sequence[str]) -> Composed:
        """Raises: HydraException, OmegaConfBaseException if they fit nothing, or one another."""
        given = [self.parsed(override) for override in overrides]
        changes = [one for one in given if one.key_or_group not in EXPERIMENTS]
        plain = all(one.type == OverrideType.CHANGE and not one.is_hydra_override() for one in changes)
        if not plain or "${" in str(overrides):
            return self._by_hydra(overrides)
        values = [one for one in given if not (one.package or self.is_group(one.key_or_group))]
        options = tuple(one.input_line or "" for one in given if one.package or self.is_group(one.key_or_group))
        if options not in self.alike:
            self.alike[options] = self._by_hydra(options)
        config = deepcopy(self.alike[options].config)
        try:
            for one in values:
                OmegaConf.update(config, one.key_or_group, one.value(), merge=True)
        except OmegaConfBaseException:
            return self._by_hydra(overrides)  # it says more of what is wrong
        return replace(self.alike[options], config=config, overrides=[*overrides])

    def _by_hydra(self, overrides: Sequence[str]) -> Composed:
        config = self.loader.load_sweep_config(self.config, list(overrides))
        return _composed(config, config.hydra, self.swept)


Report = Callable[[Path, Collection[str]], None]  # what is said of a folder at the end, see `dpo.results.report`


class Sweep(Launcher):
    """What a launcher is to us: plan every combination of overrides, then start the runs; see `Local` and `Slurm`."""

    report: Report  # a subclass brings it

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        composed, refused = [], []
        swept = {*(self.config.hydra.sweeper.get("params") or {})}  # an experiment's, though the command line fixes one
        for alike in zip(*job_overrides, strict=True):
            swept |= {key_of(alike[0])} if len({*alike}) > 1 else set()
        combinations = Combinations(self.loader, self.config, swept)
        for overrides in job_overrides:
            try:
                if problem := no_options(overrides):
                    raise ConfigCompositionException(problem)
                composed.append(combinations.compose(overrides))
            except (HydraException, OmegaConfBaseException) as error:
                refused.append(Refused(overrides, message(error)))
        self.execute(composed, refused)

    def execute(self, composed: Sequence[Composed], refused: Sequence[Refused]) -> NoReturn:
        """Plan all, start what is to do, end the process. If one run is refused nothing is written."""
        refused = [*refused, *deciding_nothing(composed)]
        if composed and composed[0].config.get("command") == "data":
            sys.exit(_looked_at(composed, refused))
        if composed and composed[0].config.get("command") == "rounds":
            sys.exit(run_chains(self, composed, refused))
        planned, more = plan(composed)
        self.check(planned, [*refused, *more])
        if said := fewer(composed, planned):
            print(said, flush=True)
        sys.exit(self.start(planned))

    def check(self, planned: Sequence[Run], refused: Sequence[Refused]) -> None:
        """End the process, with every reason, if one run is refused; say what has to be made first."""
        given = {key: value for key, value in vars(self).items() if key not in ("loader", "config")}
        unfit = check_signature(
            "hydra.launcher", {"_target_": f"{type(self).__module__}.{type(self).__name__}", **given}
        )
        refused = [*refused, *(Refused([], problem) for problem in unfit or self.problems(planned))]
        if refused:
            _list(refused)
            sys.exit(1)
        needed = [(run.config.get("policy"), run.config.get("cache", "")) for run in planned]
        for base, folder in dict.fromkeys((sizes.missing(policy, where), where) for policy, where in needed):
            if base:
                spent = f"about {sizes.MINUTES[base]} minutes on one core"
                print(f"{base} is not in {folder}/base: the first run that needs it makes it, {spent}", flush=True)

    def problems(self, planned: Sequence[Run]) -> list[str]:
        """Why these runs cannot be started here."""
        raise NotImplementedError

    def start(self, planned: Sequence[Run]) -> int:
        """Returns the exit code."""
        raise NotImplementedError


class Local(Sweep):
    """`jobs` runs at a time on this machine, with CPU threads and GPUs divided among them. None: see `side_by_side`."""

    def __init__(self, jobs: int | None) -> None:
        self.jobs = jobs

    def problems(self, planned: Sequence[Run]) -> list[str]:
        here, found = self._gpus(planned), []
        if self.jobs is not None and self.jobs < 1:
            found.append(f"hydra.launcher.jobs must be a whole number above 0, got {self.jobs}")
        if here and (wide := max(run.config["processes"] for run in planned)) > len(here):
            return [*found, f"processes must be at most the {len(here)} GPUs, got {wide}; or use device=cpu"]
        return found + gpus.lacking([run.config for run in planned if status(run.directory) != "finished"])

    def start(self, planned: Sequence[Run]) -> int:
        here = self._gpus(planned)
        if self.jobs is not None:
            return Execution(planned, self.jobs, here, self.report).run()
        many = side_by_side(planned, here)  # a thread each: another number may change the last bits of who resumes
        return Execution(planned, max(1, many), here, self.report, threads=1 if many else None).run()

    def _gpus(self, planned: Sequence[Run]) -> list[str]:
        return gpus.visible() if any(run.config["device"] != "cpu" for run in planned) else []


def side_by_side(planned: Sequence[Run], gpus: Sequence[str]) -> int:
    """How many runs go on at a time unless told: one a core on a CPU if all models are small, such as the world's; 0 if
    not, since each should then have memory, GPUs and servers to itself.
    """
    if gpus or any(_loads({**run.config, "data": None}) for run in planned):
        return 0
    each = max(run.config["processes"] * (run.config.get("threads") or 1) for run in planned)
    return max(1, min(AT_ONCE, cores() // each))


def _loads(node: Mapping[str, Any]) -> bool:
    """Whether a config names a model that is not small, or not there, or a server or a pool of actors."""
    for key, value in node.items():
        if key in ("path", "base", "against", "baseline") and value is not None and value not in WORDS:
            weights = sum(file.stat().st_size for file in Path(str(value)).glob("*.safetensors"))
            if not 0 < weights < SMALL:
                return True
        elif (value is not None and key in OTHERS) or (isinstance(value, Mapping) and _loads(value)):
            return True
    return False


class Execution:
    """The processes of a plan, `jobs` at a time. Signals are passed on: runs save and stop, and we wait."""

    def __init__(
        self, planned: Sequence[Run], jobs: int, gpus: Sequence[str], report: Report, threads: int | None = None
    ) -> None:
        self.planned, self.gpus, self.report, self.threads = planned, gpus, report, threads
        states = {run.directory: status(run.directory) for run in planned}
        self.todo = [run for run in planned if states[run.directory] not in ("finished", "damaged")]
        self.jobs = max(1, min(jobs, len(self.todo)))
        self.active: dict[int, tuple[str, Run, subprocess.Popen[bytes] | Fork, float]] = {}  # by slot
        self.problems = {path: reason(path) or "" for path, state in states.items() if state == "damaged"}
        self.received: list[int] = []

    def run(self) -> int:
        """Returns the exit code: 0 if all are finished, 1 if some are not, 128 + n after signal n."""
        done, todo = len(self.planned) - len(self.todo) - len(self.problems), len(self.todo)
        folders = list(dict.fromkeys(run.directory.parent for run in self.planned))
        where = ", ".join(map(str, folders))
        print(f"{where}: {count(len(self.planned))}: {done} finished, {todo} to do", flush=True)
        for run in self.planned:
            if run.asked != run.directory.name:
                print(f"{run.asked} is {run.directory.name}: the same settings", flush=True)
        try:
            for run in self.todo:
                if status(run.directory) != "running":
                    run.freeze()
        except OSError as error:
            print(f"could not write a run directory: {error}; nothing was started", file=sys.stderr)
            return 1
        former = {
            number: signal.signal(number, lambda number, _: self.received.append(number))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # nohup
        }
        waiting = [(f"[{n}/{todo}] {run.directory.name}", run) for n, run in enumerate(self.todo, 1)]
        stopped_by, shown = 0, 0.0
        with _bar(todo, None if self.jobs > 1 else True) as bar:
            while (waiting and not stopped_by) or self.active:
                while self.received:
                    self._pass_on(number := self.received.pop(0), again=bool(stopped_by))
                    stopped_by = stopped_by or number
                for slot in range(self.jobs):
                    if waiting and not stopped_by and slot not in self.active:
                        title, run = waiting.pop(0)
                        try:
                            self._start(slot, title, run)
                        except OSError as error:
                            self.problems[run.directory] = f"could not be started: {error}"
                            _say(f"{title} {self.problems[run.directory]}")
                time.sleep(0.05)
                for slot in [slot for slot, (_, _, process, _) in self.active.items() if process.poll() is not None]:
                    self._ended(*self.active.pop(slot), asked=bool(stopped_by))
                if not bar.disable and time.monotonic() > shown + 1:
                    stages = "; ".join(stage(self.active[slot][1].directory) for slot in sorted(self.active))
                    bar.n, shown = todo - len(waiting) - len(self.active), time.monotonic()
                    bar.set_postfix_str(stages)
        for number, handler in former.items():
            signal.signal(number, handler)
        for folder in folders:
            self.report(folder, {path.name for path in self.problems})
        if stopped_by:
            print(f"stopped, {count(len(waiting))} not started; the same command resumes", flush=True)
        for directory, problem in self.problems.items():
            log = f"  ({directory / 'log.txt'})" if self.jobs > 1 else ""
            print(f"not finished: {directory.name}: {problem}{log}", file=sys.stderr, flush=True)
        return 128 + stopped_by if stopped_by else int(bool(self.problems))

    def _start(self, slot: int, title: str, run: Run) -> None:
        if status(run.directory) == "running":
            self.problems[run.directory] = "another process is executing it"
            _say(f"{title} is being executed by another process")
            return
        (run.directory / "error.json").unlink(missing_ok=True)
        processes = run.config["processes"]
        threads = str(self.threads or max(1, cores() // self.jobs // processes))
        environment = dict.fromkeys(THREADS, threads) | {"PYTHONUNBUFFERED": "1", **os.environ}
        if self.gpus and run.config["device"] != "cpu":  # slots share GPUs when there are too few
            own = [self.gpus[(slot * processes + rank) % len(self.gpus)] for rank in range(processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # time for all ranks to save when stopped
        command = [sys.executable, *(several if processes > 1 else []), "-m", "dpo.sweep.execute", str(run.directory)]
        log = open(run.directory / "log.txt", "ab") if self.jobs > 1 else None  # noqa: SIM115
        process: subprocess.Popen[bytes] | Fork
        if processes == 1 and not self.gpus:
            process = Fork(run.directory, environment, Path(log.name) if log else None)
        else:  # in a session of its own a run gets Ctrl-C once, from us, and not from the terminal as well
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        if log:
            log.close()
        _say(f"{title} started{f'  ({log.name})' if log else ''}")
        self.active[slot] = title, run, process, time.monotonic()

    def _pass_on(self, number: int, again: bool) -> None:
        if self.active and not again:
            _say("\nstopping: each run saves and stops; a second signal ends them at once")
        for _, _, process, _ in self.active.values():
            with suppress(ProcessLookupError):
                if again:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _ended(self, title: str, run: Run, process: subprocess.Popen[bytes] | Fork, began: float, asked: bool) -> None:
        seconds = time.monotonic() - began
        spent = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        if status(run.directory) == "finished":
            _say(f"{title} finished in {spent}")
            return
        if process.returncode == IN_USE:
            problem = "another process is executing it"
        elif said := reason(run.directory):
            problem = said
        elif asked:
            problem = "stopped before it could say where"
        else:
            problem = _silent(run.directory, process.returncode or 0)
        self.problems[run.directory] = problem
        verdict = "failed" if status(run.directory) == "failed" else "ended early"
        _say(f"{title} {verdict} after {spent}: {problem}")


def stage(directory: Path) -> str:
    """A run beside others, and how far it is: what its log ends with."""
    with suppress(OSError), open(directory / "log.txt", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 300))
        last = log.read().decode(errors="replace").splitlines()[-1:]
        return " ".join([f"{directory.name}:", *(" ".join(last).partition("[")[0][:40].split())])
    return directory.name


def _bar(runs: int, disable: bool | None) -> Any:
    """How many of several have ended, whose own bars go to their logs. disable: None if there is no terminal."""
    tqdm.set_lock(threading.RLock())  # not one that processes share
    form = "{n}/{total} runs ended [{elapsed}{postfix}]"
    return tqdm(total=runs, bar_format=form, leave=False, dynamic_ncols=True, disable=disable)


def _say(line: str) -> None:
    tqdm.write(line)  # above the bar
    sys.stdout.flush()


def fewer(composed: Sequence[Composed], planned: Sequence[Run]) -> str:
    """What to say where several combinations are one run, and the keys that are to blame, of those with several values;
    "" where none are.
    """
    if len(planned) == len(composed):
        return ""
    varied = sorted({key for one in composed for key in one.swept})
    blamed = [key for key in varied if not any(in_name(key, flatten(run.config)) for run in planned)]
    why, verb = "some have the same settings", "decide" if len(blamed) > 1 else "decides"
    if blamed:
        why = f"{', '.join(blamed)} {verb} no number of dpo.{planned[0].config['command']}"
    return f"{len(composed)} combinations of overrides are {count(len(planned))}: {why}"


def _looked_at(composed: Sequence[Composed], refused: Sequence[Refused]) -> int:
    """The report of `dpo.data`, which is made here and now: it is no run. Returns the exit code."""
    if not refused:
        try:
            if len(composed) > 1:
                raise ValueError(f"dpo.data must be given one data set at a time, got {len(composed)}; leave out -m")
            check(values := resolve(composed[0].config))
            if problems := gpus.lacking([{**values, "processes": 1}]):
                raise ValueError(problems[0])
            importlib.import_module("dpo.data.__main__").main(OmegaConf.create(values))
        except (OmegaConfBaseException, ValueError) as error:
            refused = [Refused(composed[0].overrides, message(error))]
    if refused:
        _list(refused)
    return int(bool(refused))


def _composed(config: DictConfig, settings: Any, swept: Collection[str] = ()) -> Composed:
    chosen = {key_of(group): option for group, option in settings.runtime.choices.items() if option is not None}
    choices = {key: str(option) for key, option in chosen.items() if "/" not in key and not non_numeric(key)}
    with open_dict(config):
        config.pop("hydra", None)
    given: Any = OmegaConf.to_container(settings.overrides.task)  # as it is written: a ${...} is not read here
    return Composed(config, given, choices, frozenset(swept))


def _list(refused: Sequence[Refused]) -> None:
    """Every reason once, with the overrides that it speaks of."""
    by_reason: dict[str, list[str]] = {}
    for one in refused:
        by_reason.setdefault(one.reason, []).append(" ".join(one.overrides))
    print("nothing was started:", file=sys.stderr)
    for why, overrides in by_reason.items():
        others = f" (and {len(overrides) - 1} more)" if len(overrides) > 1 else ""
        print(f"\n{overrides[0] or 'this command'}{others}", file=sys.stderr)
        print("\n".join(f"  {line}" for line in why.splitlines()), file=sys.stderr, flush=True)


def _silent(directory: Path, code: int) -> str:
    """Record the end of a run that could not say why."""
    kind, text = "Ended", f"exit code {code}, and it did not say why"
    if code < 0:
        kind, text = (
            "Killed",
            f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}",
        )
    error = {"type": kind, "message": text, "traceback": ""}
    with suppress(OSError):  # a full disk cannot
        (directory / "error.json").write_text(json.dumps(error, indent=1))
    return f"{kind}: {text}"


def count(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"
