"""Plant each listed fault, one at a time, and see whether a test falls.

    python -m tests.faults                   # all of tests/faults/*.yaml; about an hour on two cores
    python -m tests.faults loop plan         # those of some files
    python -m tests.faults loop -k clip      # those whose words hold "clip"

A fault is a change that runs without an error and makes something wrong: a number, a name, a default. Each is planted
in a copy of the checkout, and the tests named beside it run until the first fails. Ends with the share that was caught,
and with exit code 1 if that is below 95 %, or if a fault is stale: its text is no longer there, or not just once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent
AIM, LONGEST = 0.95, 900  # share of faults caught; seconds for the tests of one fault


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
        for file, planted in yaml.safe_load(path.read_text()).items():
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


def outcome(fault: Fault, checkout: Path) -> str:
    """ "caught", "missed", or why neither can be said."""
    file = checkout / fault.file
    text = file.read_text()
    try:
        file.write_text(fault.planted(text))
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *fault.tests]
        command += ["--basetemp", str(checkout.parent / "pytest")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return "caught"  # it hangs
    except ValueError as error:
        return f"stale: {error}"
    finally:
        file.write_text(text)
    said = done.stdout.strip().splitlines()
    return {0: "missed", 1: "caught"}.get(done.returncode, f"no verdict: {' '.join(said[-2:])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", help="names of tests/faults/*.yaml; all by default")
    parser.add_argument("-k", default="", help="only faults whose words hold this")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    given = parser.parse_args()
    faults = [fault for fault in read(given.lists) if given.k in f"{fault.what} {fault.file}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        checkouts: SimpleQueue[Path] = SimpleQueue()
        for job in range(given.jobs):
            checkouts.put(copy(Path(folder, str(job))))

        def tried(fault: Fault) -> tuple[Fault, str]:
            checkout = checkouts.get()
            try:
                return fault, outcome(fault, checkout)
            finally:
                checkouts.put(checkout)

        found = []
        for fault, result in (bar := tqdm(pool.map(tried, faults), total=len(faults), unit="fault")):
            found.append(result)
            if result != "caught":
                bar.write(f"{result}: {fault.file}: {fault.what} ({fault.list}.yaml)")
    caught, missed = found.count("caught"), found.count("missed")
    share, unclear = caught / max(1, caught + missed), len(found) - caught - missed
    print(f"{caught} of {caught + missed} planted faults caught ({share:.0%}), {unclear} without a verdict")
    sys.exit(int(share < AIM or caught + missed < len(found)))


if __name__ == "__main__":
    main()
