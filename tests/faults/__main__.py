"""Plant each listed fault, one at a time, and see whether a test falls.

    python -m tests.faults                   # all of tests/faults/*.yaml; some forty minutes on two cores
    python -m tests.faults loop plan         # those of some files
    python -m tests.faults loop -k clip      # those whose words hold "clip"
    python -m tests.faults --sample 100      # some of them, drawn at random

A fault is a change that runs without an error and makes something wrong: a number, a name, a default. Each is planted
in a copy of the checkout, and the tests named beside it run until the first fails. Ends with the share that was caught,
and with exit code 1 if that is below 95 %, or if a fault is stale: its text is no longer there, or not just once.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent
AIM, LONGEST = 0.95, 900  # share of faults caught; seconds for the tests of one fault
FAST = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


@dataclass(frozen=True)
class Fault:
    """`before`, which is once in `file`, becomes `after`."""

    list: str
    file: str
    what: str
    before: str
    after: str
    tests: Sequence[str]

    def planted(self, text: str) -> str:
        if text.count(self.before) != 1:
            raise ValueError(f"{self.list}: {self.what!r} must find its text once in {self.file}, found it "
                             f"{text.count(self.before)} times: {self.before!r}")  # fmt: skip
        return text.replace(self.before, self.after)


def read(names: Sequence[str] = ()) -> list[Fault]:
    """The faults of tests/faults/<name>.yaml, or of all: {file: [{what, before, after, tests}]}."""
    faults = []
    for path in [LISTS / f"{name}.yaml" for name in names] or sorted(LISTS.glob("*.yaml")):
        for file, planted in yaml.load(path.read_text(), FAST).items():
            faults += [Fault(path.stem, file, **{**one, "tests": one["tests"].split()}) for one in planted]
    return faults


def copy(folder: Path) -> Path:
    """The files of this checkout that git knows or would add, in folder/checkout, with its neighbour `shared`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "checkout" / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "checkout"


def preload() -> None:
    """Import what is not ours, which takes longer than most tests: a fork has it."""
    for module in (
        "datasets",
        "hydra",
        "hypothesis",
        "matplotlib.pyplot",
        "pandas",
        "torch.distributed.fsdp",
        "transformers",
    ):
        importlib.import_module(module)
    for module in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(sys.modules["transformers"], module)
    sys.modules["torch"].set_num_threads(1)


def fork(fault: Fault, checkout: Path) -> int:
    """Start the tests of a fault that is planted; returns the process id."""
    if pid := os.fork():
        return pid
    os.setsid()  # what the tests start ends with them
    os.chdir(checkout)
    sys.path[:] = [str(checkout), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for module in [name for name in sys.modules if name.split(".")[0] in ("analysis", "dpo", "hydra_plugins", "tests")]:
        del sys.modules[module]
    os.environ.update(PYTHONPATH=str(checkout), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    said = os.open(checkout.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, number in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
        os.dup2(stream, number)
    options = ["-n", "0", "-x", "-m", "", "-p", "no:cacheprovider", "--basetemp", str(checkout.parent / "pytest")]
    os._exit(int(pytest.main([*options, *fault.tests])))


def outcomes(faults: Sequence[Fault], checkouts: Sequence[Path]) -> Iterator[tuple[Fault, str]]:
    """Of each fault "caught", "missed", or why neither can be said; as many at a time as there are checkouts."""
    waiting, free = list(reversed(faults)), list(checkouts)
    active: dict[
        int, tuple[Fault, Path, str, float]
    ] = {}  # process id -> what it tries, the file's own text, until when
    while waiting or active:
        while waiting and free:
            fault, checkout = waiting.pop(), free.pop()
            text = (checkout / fault.file).read_text()
            try:
                (checkout / fault.file).write_text(fault.planted(text))
            except ValueError as error:
                free.append(checkout)
                yield fault, f"stale: {error}"
            else:
                active[fork(fault, checkout)] = fault, checkout, text, time.monotonic() + LONGEST
        time.sleep(0.05)
        for pid, (fault, checkout, text, until) in list(active.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() < until:
                continue
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status if ended else os.waitpid(pid, 0)[1])
            (checkout / fault.file).write_text(text)
            free.append(checkout)
            del active[pid]
            last = " ".join((checkout.parent / "said.txt").read_text(errors="replace").split("\n")[-3:])
            hung = "caught" if not ended else f"no verdict: {last}"
            yield fault, {0: "missed", 1: "caught"}.get(code, hung)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", help="names of tests/faults/*.yaml; all by default")
    parser.add_argument("-k", default="", help="only faults whose words hold this")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--sample", type=int, help="only so many, drawn at random")
    given = parser.parse_args()
    faults = [fault for fault in read(given.lists) if given.k in f"{fault.what} {fault.file}"]
    if given.sample is not None:
        faults = random.sample(faults, min(given.sample, len(faults)))
    preload()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        checkouts = [copy(Path(folder, str(job))) for job in range(given.jobs)]
        for fault, result in (bar := tqdm(outcomes(faults, checkouts), total=len(faults), unit="fault")):
            found.append(result)
            if result != "caught":
                bar.write(f"{result}: {fault.file}: {fault.what} ({fault.list}.yaml)")
    caught, missed = found.count("caught"), found.count("missed")
    share, unclear = caught / max(1, caught + missed), len(found) - caught - missed
    print(f"{caught} of {caught + missed} planted faults caught ({share:.0%}), {unclear} without a verdict")
    sys.exit(int(share < AIM or caught + missed < len(found)))


if __name__ == "__main__":
    main()
