"""Compute once under the digest of the inputs; share across a sweep.

python -m dpo.cache                 what is stored in cache/, and from what
python -m dpo.cache --verify        and whether its files are as they were written
python -m dpo.cache --why A B       in which fields two entries differ; A and B are names such as reference/0f...
"""

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from dpo.bill import enter

logger = logging.getLogger(__name__)
LARGE = 64 * 2**20  # bytes above which a file's content is checked by `--verify` alone
AT_ONCE = 1000  # items of a sequence that are written as one text
SHORT = 10  # items up to which each is written by itself, for it may be large
FEW = 3  # fields in which an entry may differ to explain why there is none for others


def digest(value: Any) -> str:
    """SHA-256, in hex, of a JSON value (dictionaries by sorted key; floats by their exact repr)."""
    return hashlib.sha256(_dumps(value).encode()).hexdigest()


def digest_large(value: Any) -> str:
    """The same as `digest`, of what would be large as one text. A sequence need not be a list, nor in memory; nor need
    its items, where there are few.
    """
    hashed = hashlib.sha256()
    for part in _json(value):
        hashed.update(part.encode())
    return hashed.hexdigest()


def _json(value: Any) -> Iterator[str]:
    """The JSON of `digest` in pieces."""
    if isinstance(value, dict):
        for place, name in enumerate(sorted(value)):
            yield f"{'{,'[place > 0]}{_dumps(name)}:"
            yield from _json(value[name])
        yield "}" if value else "{}"
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) > SHORT:
        for first in range(0, len(value), AT_ONCE):
            yield "[,"[first > 0] + _dumps(list(value[first : first + AT_ONCE]))[1:-1]
        yield "]"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for place, item in enumerate(value):
            yield "[,"[place > 0]
            yield from _json(item)
        yield "]" if value else "[]"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def entry(root: str | Path, kind: str, key: dict[str, Any]) -> Path:
    """The folder of `remember` for this key."""
    return Path(root) / kind / digest(key)[:20]


def remember(
    root: str | Path,
    kind: str,
    key: dict[str, Any],
    build: Callable[[Path], None],
    any_true: Callable[[bool], bool] = bool,
    about: Callable[[], dict[str, Any]] = dict,
    alone: bool = False,
) -> tuple[Path, bool]:
    """The folder that `build` filled for this key, and whether it was there already.

    The key holds everything that decides the result, and nothing else; it is kept beside the result as `key.json`.
    about: asked on a miss alone, further fields that say where the key's come from; kept as `about.json`, and shown
    when another key misses.
    Many processes may ask at once: one builds under a lock while the others wait and say what for, and a folder
    appears whole or not at all. `build` may get the folder as a process that was stopped, killed or ended by an error
    left it, and goes on from there or writes all files anew: an error deletes nothing that was computed.

    any_true: whether a flag is set on any process of this run; bool: it is the only one. All build together, since a
    sharded model needs them, and what rank 0 built is kept.

    alone: any process can build it by itself, so the processes of one run wait as those of others do. Then all that
    the folder holds is compared with its checksums, however large: nothing else tells what it holds.

    Raises: RuntimeError if the folder is there, but not as it was written.
    """
    folder = entry(root, kind, key)
    checked = math.inf if alone else LARGE
    if not alone and int(os.environ.get("RANK", "0")) > 0:  # the launcher ends every rank when rank 0 fails
        return folder, _beside(build, any_true)
    if folder.is_dir():
        any_true(False)
        return intact(folder, checked), True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        exists = folder.is_dir()
        any_true(not exists)
        if exists:
            return intact(folder, checked), True
        details = about()
        if not alone and (missed := why_missed(folder.parent, {**details, **key})):  # that is made anew in no time
            logger.info(f"{kind} {folder.name} is not in the cache: {missed}")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        unfinished.mkdir(exist_ok=True)
        build(unfinished)
        # A writer that was killed left these.
        for path in [path for path in unfinished.rglob("*") if path.suffix in (".unfinished", ".replaced")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name, value in (("about.json", details), ("key.json", key)):
            if value:
                (unfinished / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        (unfinished / "files.json").write_text(json.dumps(_files(unfinished), indent=1) + "\n")
        unfinished.rename(folder)
        any_true(False)  # a barrier: now it is there
        return folder, False


def _beside(build: Callable[[Path], None], any_true: Callable[[bool], bool]) -> bool:
    """What ranks other than 0 do in `remember`; returns whether the folder was there already."""
    if not any_true(False):
        return True
    with tempfile.TemporaryDirectory() as thrown_away:
        build(Path(thrown_away))
    any_true(False)
    return False


def remember_each(
    root: str | Path,
    kind: str,
    key: dict[str, Any],
    questions: Sequence[Any],
    answer: Callable[[list[Any]], Iterable[tuple[int, Any]]],
) -> list[Any]:
    """The answer to each question, asked for where no process has had it under this key; all of them JSON values.

    answer: gives the place of a question in its list and the answer, in any order, as they come. Each is added to the
    key's file at once, a line each: a process that ends early loses no answer that it had. Many processes may ask at
    once: one of them does under a lock, and the others wait.

    Raises: RuntimeError if one has no answer; the others are kept. ValueError if the file is damaged.
    """
    file = Path(root) / kind / f"{digest(key)[:20]}.jsonl"
    names = {digest(question): question for question in questions}
    known = answers_in(file)
    if names.keys() <= known.keys():
        enter("kept", **{kind: len(names)})
        return [known[digest(question)] for question in questions]
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        known = answers_in(file, mend=True)
        missing = [name for name in names if name not in known]
        enter("kept", **{kind: len(names) - len(missing)})
        for place, said in answer([names[name] for name in missing]):
            add_answers(file, key, {missing[place]: said})
            known[missing[place]] = said
        if failed := len(names.keys() - known.keys()):
            raise RuntimeError(
                f"all questions must be answered, got no answer to {failed} of {len(missing)}; run it again: answers "
                f"are kept ({file})"
            )
    return [known[digest(question)] for question in questions]


def add_answers(file: Path, key: dict[str, Any], answers: dict[Any, Any]) -> None:
    """Add answers by their questions to a file, a line each; its first line is the key."""
    lines = [{"question": question, "answer": said} for question, said in answers.items()]
    with open(file, "a") as kept:
        begun = [] if kept.tell() else [json.dumps(key, sort_keys=True)]
        kept.write("".join(f"{line}\n" for line in [*begun, *map(json.dumps, lines)]))


def answers_in(file: Path, mend: bool = False) -> dict[Any, Any]:
    """What a file of `add_answers` holds. A writer that was killed may have cut its last line. mend: take that away.

    Raises: ValueError if another line is no answer.
    """
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if mend and whole != text:
        os.truncate(file, len(whole))
    answers = {}
    for number, line in enumerate(whole.splitlines()[1:], 2):
        try:
            row = json.loads(line)
            answers[row["question"]] = row["answer"]
        except (ValueError, TypeError, LookupError):
            raise ValueError(
                f"{file} must hold an answer in each line, found none in line {number}; delete that line"
            ) from None
    return answers


def why_missed(kind: str | Path, wanted: dict[str, Any]) -> str | None:
    """In which fields the nearest entry of that kind differs; None if none is near: a list of many explains nothing."""
    candidates = []
    for file in sorted(Path(kind).glob("*/key.json")):
        with suppress(OSError, ValueError):  # damaged
            stored = fields(file.parent)
            if stored.get("seed") == wanted.get("seed"):  # another seed is a replicate, and meant to miss
                candidates.append((differences(stored, wanted), file.parent.name))
    if not candidates:
        return None
    differing, nearest = min(candidates, key=lambda candidate: len(candidate[0]))
    if len(differing) > FEW:
        return None
    return f"the nearest, {nearest}, differs in {', '.join(differing)}"


def fields(folder: Path) -> dict[str, Any]:
    """The key of an entry, and what else is told about it.

    Raises: OSError or ValueError if the entry is damaged, or none.
    """
    key, about = folder / "key.json", folder / "about.json"
    return {**(json.loads(about.read_text()) if about.exists() else {}), **json.loads(key.read_text())}


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{field} ({_brief(stored.get(field))} there, {_brief(wanted.get(field))} asked for)"
        for field in sorted({*wanted, *stored})
        if digest(stored.get(field)) != digest(wanted.get(field))
    ]


def damages(folder: Path, up_to: float = math.inf) -> list[str]:
    """What is not as `remember` left it in one folder of the cache; above `up_to` bytes only a file's size counts."""
    try:
        key, written = (json.loads((folder / name).read_text()) for name in ("key.json", "files.json"))
        sizes = {name: (folder / name).stat().st_size for name in written if (folder / name).is_file()}
        changed = [
            f"{name} changed"
            for name, size in sizes.items()
            if size != written[name]["bytes"] or (size <= up_to and sha256(folder / name) != written[name]["sha256"])
        ]
    except (OSError, ValueError, TypeError, LookupError) as error:
        return [f"no record of what was written: {error}"]
    missing = [f"{name} is missing" for name in written if name not in sizes]
    return changed + missing + ([] if digest(key)[:20] == folder.name else ["key.json is of another folder"])


def intact(folder: Path, up_to: float = math.inf) -> Path:
    """The folder, if what it holds is what was written. Weights are told by their fingerprint when they are loaded."""
    if faults := damages(folder, up_to):
        raise RuntimeError(
            f"{folder} must hold what was written there, found otherwise: {'; '.join(faults[:3])}; delete that folder, "
            f"and it is made again (python -m dpo.cache {folder.parent.parent} --verify checks the others)"
        )
    return folder


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that was built."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("key.json", "files.json"))
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in names}


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _locked(folder: Path) -> AcquireReturnProxy:
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"waiting for another process that makes {folder}")
        return lock.acquire()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dpo.cache", description="What the cache holds, and from what.")
    parser.add_argument("root", nargs="?", type=Path, default=Path("cache"), help="the folder (default: cache)")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    parser.add_argument("--why", nargs=2, metavar=("A", "B"), help="in which fields B differs from A")
    options = parser.parse_args()
    of_runs = any(any(options.root.glob(f"{above}config.yaml")) for above in ("", "*/", "*/*/"))
    if of_runs or not options.root.is_dir():
        found = "one of runs" if of_runs else "none"
        sys.exit(f"{options.root} must be a cache folder, found {found}; runs make one at cache=...")
    if options.why:
        entries = [options.root / name for name in options.why]
        if absent := [str(folder) for folder in entries if not (folder / "key.json").is_file()]:
            sys.exit(
                f"A and B must be folders in {options.root} such as reference/0f..., found none with a key at "
                f"{' and '.join(absent)}; python -m dpo.cache {options.root} lists them"
            )
        try:
            stored, wanted = map(fields, entries)
        except ValueError as error:
            sys.exit(f"A and B must be sound, found otherwise: {error}; --verify says which entries are damaged")
        print("\n".join(differences(stored, wanted)) or "in none")
        return
    damaged = 0
    for folder in sorted(path for path in options.root.glob("*/*/") if path.suffix != ".unfinished"):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
        print(f"{folder.relative_to(options.root)}  {size / 1e6:.1f} MB  {made}")
        with suppress(OSError, ValueError):  # damaged: --verify says so
            for field, value in fields(folder).items():
                print(f"    {field}: {_brief(value)}")
        for damage in damages(folder) if options.verify else ():
            damaged += 1
            print(f"    DAMAGED: {damage}; delete the folder, and the next run makes it again")
    for file in sorted(options.root.glob("*/*.jsonl")):  # of `remember_each`
        print(f"{file.relative_to(options.root)}  {file.stat().st_size / 1e6:.1f} MB  {len(answers_in(file))} answers")
    unfinished = len(list(options.root.glob("*/*.unfinished")))
    print(f"{unfinished} unfinished{f', {damaged} damaged' if options.verify else ''}")
    sys.exit(bool(damaged))


if __name__ == "__main__":
    main()
