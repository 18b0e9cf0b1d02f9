"""Where records lie: files and folders here, and data sets on the Hugging Face hub.

The `datasets` library reads all but JSON lines, which are read here, so that what is wrong is told by its line.
"""

import gzip
import json
import logging
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, NamedTuple, TypeVar

from dpo.data.texts import TEXTS, as_chat, kind, same_names

logger = logging.getLogger(__name__)
Row = dict[str, Any]
Columns = dict[str, str | list[str]]
Made = TypeVar("Made")

LINES = (".jsonl", ".jsonl.gz")
KINDS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}  # ending -> builder of `datasets`
ON_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")  # owner/name, owner/name@revision
OF_TEXT = (*TEXTS, "responses", "system")  # columns of text, even where a CSV file has numbers in them
SHOWN = 5  # offending records that an error message lists


@dataclass(frozen=True)
class Source:
    """Rows of one split.

    path: a file (.jsonl, .json, .csv, .parquet, .arrow; .gz of the first three), a folder that `save_to_disk` wrote or
    that holds a copy of a data set's repository, or a data set on the hub: owner/name, owner/name@revision. split:
    None: "train", where there are splits at all. config: the configuration of a repository. folder: the only one of it
    that is read, and downloaded. columns: what we call a column -> its name here, see `renamed`. chat: whether plain
    text becomes chat messages, see `dpo.data.texts.as_chat`.
    """

    path: str
    split: str | None = None
    config: str | None = None
    folder: str | None = None
    columns: Columns | None = None
    chat: bool = False

    def __str__(self) -> str:
        return f"{self.path}, {self.split or 'train'} split" if has_splits(self.path) else self.path


class Read(NamedTuple, Generic[Made]):
    """What was made of the rows, each with the name of its row; and of what is on the hub which commit was read."""

    records: list[tuple[str, Made]]
    revisions: dict[str, str]  # the source -> its commit; {}: it is here


def has_splits(path: str) -> bool:
    """Whether there are splits to choose from: on the hub, and in a folder unless it is a single `Dataset`."""
    place = Path(path).expanduser()
    return not place.is_file() and not (place / "state.json").is_file()


def elsewhere(source: Source, path: str | None, split: str | None) -> Source | None:
    """The source of rows that are held out, at another path or in another split; None where neither is given."""
    return None if path is None and split is None else replace(source, path=path or source.path, split=split)


def placed(path: str | None, published: Source) -> Source:
    """Where a published data set is read: at the path, or None: where it is published; at another revision of that with
    what else it takes there, its configuration and folder.
    """
    if path is None:
        return published
    folder = published.folder and Path(path).expanduser() / published.folder
    if path.partition("@")[0] == published.path.partition("@")[0] or (folder and folder.is_dir()):
        return replace(published, path=path)
    return Source(path, published.split if has_splits(path) else None, columns=published.columns)


def held_out_of(source: Source, path: str | None, published: Source, split: str | None) -> Source | None:
    """Where the held-out rows of a published data set are read, whose training rows are those of `source`: at another
    path, or in its split; None where it has none there.
    """
    if path is not None:
        return placed(path, replace(published, split=split))
    return replace(source, split=split) if split is not None and has_splits(source.path) else None


def absent(path: str) -> str | None:
    """What is wrong with a path that names nothing here, and nothing that could be on the hub; None: nothing."""
    place, (name, revision, _) = Path(path).expanduser(), path.partition("@")
    if revision and not place.exists() and Path(name).expanduser().is_dir():
        return f"must have no revision where they are a folder here, found {path}; take {name}"
    if (path.strip() and place.exists()) or (ON_HUB.fullmatch(path) and not path.endswith((*LINES, *KINDS, ".gz"))):
        return None
    return (
        f"must be a file of records, a folder of them or a data set on the hub (owner/name), found none at {path}; "
        "check the path"
    )


def read(source: Source, record: Callable[[Row], Made]) -> Read[Made]:
    """What `record` makes of each row.

    Raises: ValueError if there is no such place, split, configuration, revision or column, or if `record` refuses rows:
    then they are counted, and the first few are named with what is wrong.
    """
    if problem := absent(source.path):
        raise ValueError(f"data {problem}")
    if (source.split or source.config) and not has_splits(source.path):
        raise ValueError(
            f"{source.path} must be on the hub or a folder to have splits and configurations; leave them out"
        )

    def made(row: Row) -> Made:
        row = same_names(renamed(row, source.columns) if source.columns else row)
        return record(as_chat(row) if source.chat else row)

    if source.path.endswith(LINES):
        return Read(parse(source.path, made), {})
    with ExitStack() as stack:
        rows, revision = _loaded(source, stack)
        records = _gathered(str(source), ((f"row {number}", row) for number, row in enumerate(rows)), made, "rows")
    if revision is not None:
        logger.info(f"{source}: revision {revision}")
    return Read(records, {} if revision is None else {str(source): revision})


def renamed(row: Row, columns: Columns) -> Row:
    """The row with our names for its columns: {"prompt": "question.text"} reads what `question` has at `text`; in a
    list, each of it. Several columns become a list: {"responses": ["answer_a", "answer_b"]}. A column that was given
    another name has its former one no more.

    Raises: ValueError if there is no such column.
    """
    taken = set()

    def at(theirs: str, ours: str) -> Any:
        keys, value = [theirs] if theirs in row else theirs.split("."), row
        taken.add(keys[0])
        for key in keys:
            try:
                value = [one[key] for one in value] if isinstance(value, list) else value[key]
            except (KeyError, TypeError, IndexError):
                raise ValueError(
                    f"must have {theirs}, which data.columns reads as {ours}; found {', '.join(row) or 'no column'}"
                ) from None
        return value

    found = {
        ours: at(theirs, ours) if isinstance(theirs, str) else [at(one, ours) for one in theirs]
        for ours, theirs in columns.items()
    }
    return {name: value for name, value in row.items() if name not in taken} | found


def require(row: Row, names: Sequence[str], hint: str = "", instead: str = "") -> None:
    """Raise a ValueError unless the row has all these columns.

    hint: what to do, if that is not to map those that it has. instead: what would be read in their place.
    """
    if missing := [name for name in names if name not in row]:
        wanted = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        there = f" among {', '.join(row) or 'no columns'}; data.columns={{{missing[0]}:NAME}} reads one of another name"
        raise ValueError(f"must have {instead}{wanted}; found no {' and no '.join(missing)}{hint or there}")


def _loaded(source: Source, stack: ExitStack) -> tuple[Any, str | None]:
    """The rows by `datasets`, and their commit on the hub. What it makes of files that are no download is kept no
    longer than `stack`, so that none is stale.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {source.path} needs the datasets package, found none; pip install -e '.[hub]' -c "
            "constraints.txt, or give it as a JSONL file"
        ) from error
    place, check = Path(source.path).expanduser(), "check its split and its configuration"
    try:
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return _split_of(datasets.load_from_disk(str(place)), source), None
        options: dict[str, Any] = {"split": source.split or "train", "name": source.config, "data_dir": source.folder}
        commit = None
        if place.exists():
            options["cache_dir"] = stack.enter_context(TemporaryDirectory())
            datasets.disable_progress_bars()
        if place.is_file():
            check = "check the file"
            options |= {"path": _kind_of(place), "data_files": str(place)}
            if options["path"] == "csv":  # an empty cell or "NA" is text, and so is a response of 007
                named = {name: (source.columns or {}).get(name, name) for name in OF_TEXT}
                texts = [one for name in named.values() for one in ([name] if isinstance(name, str) else name)]
                options |= {"keep_default_na": False, "converters": dict.fromkeys(texts, str)}
        elif place.is_dir():
            options["path"] = str(place)
        else:
            check = "check the name (owner/name@revision on the hub), its split and its configuration"
            options["path"], commit = downloaded(source)
        given = {key: value for key, value in options.items() if value is not None}
        return datasets.load_dataset(given.pop("path"), **given), commit
    except Exception as error:  # whatever reading there raises
        within = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        words = [line.strip() for line in str(within or error).splitlines() if line.strip()]
        raise ValueError(
            f"{source} must be readable, found: {' '.join(words[:3]) or type(error).__name__}; {check}"
        ) from error


def downloaded(source: Source) -> tuple[str, str]:
    """The folder of a data set on the hub, in the library's cache, and its commit. Of its `folder` only that is there.

    Offline a revision (a tag, a branch) is what it was when it was read last. Raises: what the library raises, where it
    is not there, or where a download was ended before it was whole.
    """
    from huggingface_hub import snapshot_download

    at: Any = ON_HUB.fullmatch(source.path)
    only = f"{source.folder}/*" if source.folder else None
    folder = snapshot_download(at["name"], repo_type="dataset", revision=at["revision"], allow_patterns=only)
    return folder, Path(folder).name  # which it names after its commit


def _split_of(found: Any, source: Source) -> Any:
    if source.config:
        raise ValueError("what save_to_disk wrote, which has no configurations")
    if not isinstance(found, dict):
        return found
    if (split := source.split or "train") not in found:
        raise ValueError(f"no split {split}, but {', '.join(found)}")
    return found[split]


def _kind_of(place: Path) -> str:
    kind = KINDS.get(Path(place.name.removesuffix(".gz")).suffix)
    if kind is None:
        raise ValueError(f"an ending that is none of .jsonl, {', '.join(KINDS)}")
    return kind


def parse(path: str | Path, record: Callable[[Row], Made]) -> list[tuple[str, Made]]:
    """What `record` makes of the JSON object on each line, with the line's name; blank lines are passed over.

    Raises a ValueError that counts the lines without a JSON object and those that `record` refuses with a
    ValueError, and says what is wrong with the first few.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"a JSONL file of records must be at {path}, found none; check the path")
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as stream:
            lines = ((f"line {number}", line) for number, line in enumerate(stream, start=1) if not line.isspace())
            return _gathered(str(path), lines, record, "lines")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file, found: {error}; copy it again") from error


def _gathered(
    source: str, rows: Iterable[tuple[str, Row | bytes]], record: Callable[[Row], Made], called: str
) -> list[tuple[str, Made]]:
    records, refused, total = [], [], 0
    for where, row in rows:
        total += 1
        try:
            records.append((where, record(_object(row) if isinstance(row, bytes) else row)))
        except (ValueError, OverflowError) as error:
            refused.append(f"{where}: {error}")
        except RecursionError:
            refused.append(f"{where}: nested too deeply")
    if refused:
        raise ValueError(
            f"{source}: {len(refused)} of {total} {called} are no records:{listed(refused)}\nMend or remove them."
        )
    if not records:
        raise ValueError(f"{source} must hold at least one record, found an empty file")
    return records


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL, .gz or not; the file appears whole or not at all."""
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        with open(unfinished, "xb") as raw:
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if target.suffix == ".gz" else raw
            for row in rows:
                packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if packed is not raw:
                packed.close()
            raw.flush()
            os.fsync(raw.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def jsonl_files(folder: Path) -> Iterator[Path]:
    """The files of records in a folder, however deep."""
    return (file for file in sorted(folder.rglob("*")) if file.name.endswith(LINES))


def listed(lines: Sequence[str]) -> str:
    """The first few, each on a line of its own, and how many there are more."""
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "".join(f"\n  {line}" for line in lines[:SHOWN]) + more


def _object(line: bytes) -> Row:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, found {kind(value)}")
    return value


@contextmanager
def heard() -> Iterator[list[tuple[int, str]]]:
    """What is logged about data meanwhile: levels and messages."""
    said: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    above = logger.parent or logger  # of the other modules here, too
    above.addHandler(handler)
    try:
        yield said
    finally:
        above.removeHandler(handler)
