"""The cache builds once per key, whole or not at all, also when many processes ask at once."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo import cache
from dpo.cache import damages, digest, main, remember, remember_each, why_missed


def _slow_build(folder: Path) -> None:
    time.sleep(0.5)
    (folder / "result").write_text(str(os.getpid()))


def _ask(root: str) -> tuple[str, bool]:
    folder, cached = remember(root, "kind", {"a": 1}, _slow_build)
    return (folder / "result").read_text(), cached


def test_digest_depends_on_values_not_on_key_order():
    assert digest({"a": 1, "b": 0.1}) == digest({"b": 0.1, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 0.1}) != digest({"a": 0.1 + 1e-17 + 1e-16})


def test_second_call_finds_the_first(tmp_path):
    calls = []
    for expected in (False, True):
        folder, cached = remember(tmp_path, "kind", {"a": 1}, lambda folder: calls.append(folder))
        assert cached is expected
    assert len(calls) == 1
    assert json.loads((folder / "key.json").read_text()) == {"a": 1}
    assert remember(tmp_path, "kind", {"a": 2}, lambda folder: None)[0] != folder


@pytest.mark.parametrize(
    "ending", ["raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGKILL)", "raise OSError('disk full')"]
)
def test_a_build_that_ended_early_goes_on_where_it_was(tmp_path, ending):
    """Stopped, killed or by an error: none of them deletes what was computed."""
    script = f"""
import os, signal, sys
from dpo import cache
from dpo.cache import remember
def build(folder):
    (folder / "half").write_text("x")
    (folder / "half.ab12.unfinished").write_text("left by a writer that was killed")
    {ending}
remember(sys.argv[1], "kind", {{"a": 1}}, build)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True)
    assert ended.returncode != 0

    def build(folder: Path) -> None:
        (folder / "whole").write_text((folder / "half").read_text() + "y")

    folder, cached = remember(tmp_path, "kind", {"a": 1}, build)
    assert not cached
    assert (folder / "whole").read_text() == "xy"
    assert damages(folder) == []
    assert {path.name for path in (tmp_path / "kind").iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert {path.name for path in folder.iterdir()} == {"half", "whole", "key.json", "files.json"}


def test_concurrent_processes_build_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        answers = pool.map(_ask, [str(tmp_path)] * 4, chunksize=1)
    assert len({builder for builder, _ in answers}) == 1
    assert sum(not cached for _, cached in answers) == 1


def _write(folder: Path) -> None:
    (folder / "scores").write_text("1 2 3")


def test_a_miss_names_the_field_that_differs(tmp_path, capsys):
    remember(tmp_path, "kind", {"weights": "a" * 64, "precision": "fp32"}, _write)
    assert capsys.readouterr().out == ""
    remember(tmp_path, "kind", {"weights": "b" * 64, "precision": "bf16"}, _write)
    capsys.readouterr()
    remember(tmp_path, "kind", {"weights": "b" * 64, "precision": "fp32", "new": 1}, _write)
    said = capsys.readouterr().out
    assert "differs in new (null there, 1 asked for), weights (aaaaaaaaaaaa... there" in said
    assert why_missed(tmp_path / "nothing", {}) is None
    other = {"weights": "c" * 64, "precision": "fp32", "seed": 1, "new": 2}
    remember(tmp_path, "kind", {**other, "sequences": "d"}, _write)  # four fields: another thing, and no news
    remember(tmp_path, "kind", {**other, "sequences": "d", "seed": 3}, _write)  # a replicate
    assert capsys.readouterr().out == ""


def test_what_is_told_about_an_entry_explains_a_miss_and_decides_nothing(tmp_path, capsys, monkeypatch):
    def made(key: dict, **about) -> tuple[Path, bool]:
        return remember(tmp_path, "kind", key, _write, about=lambda: about)

    first, _ = made({"ids": "a" * 64}, length=40)
    assert made({"ids": "a" * 64}, length=20) == (first, True)
    second, _ = made({"ids": "b" * 64}, length=30)
    differs = "ids (aaaaaaaaaaaa... there, bbbbbbbbbbbb... asked for){}length (40 there, 30 asked for)"
    assert f"differs in {differs.format(', ')}\n" in capsys.readouterr().out
    names = [f"kind/{folder.name}" for folder in (first, second)]
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path), "--why", *names])
    main()
    assert capsys.readouterr().out == differs.format("\n") + "\n"
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path), "--why", names[0], "kind/none"])
    with pytest.raises(SystemExit, match=f"A and B must be folders in .* with a key at {tmp_path}/kind/none; "):
        main()
    (first / "key.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path), "--why", *names])
    with pytest.raises(SystemExit, match=r"A and B must be sound, found otherwise: .*; --verify says"):
        main()


@pytest.mark.parametrize("at", ["runs/dev/beta=1", "runs/dev", "runs"])
def test_a_folder_of_runs_is_no_cache(tmp_path, monkeypatch, at):
    (tmp_path / "runs/dev/beta=1").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "runs/dev/beta=1" / name).write_text("{}\n{}\n")
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path / at)])
    with pytest.raises(SystemExit, match="must be a cache folder, found one of runs; "):
        main()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "scores").write_text("1 2 4"),
        lambda folder: (folder / "scores").write_text(""),
        lambda folder: (folder / "scores").unlink(),
        lambda folder: (folder / "key.json").write_text("{"),
        lambda folder: (folder / "key.json").write_text("{}"),
        lambda folder: (folder / "files.json").unlink(),
        lambda folder: (folder / "files.json").write_text('{"scores": "abc"}'),
    ],
)
def test_a_damaged_entry_is_an_error_that_says_what_to_do(tmp_path, damage):
    folder, _ = remember(tmp_path, "kind", {"a": 1}, _write)
    damage(folder)
    with pytest.raises(RuntimeError, match=f"{folder} must hold what was written.*delete that folder.*--verify"):
        remember(tmp_path, "kind", {"a": 1}, _write)
    remember(tmp_path, "kind", {"a": 2}, _write)  # others are not affected


def test_of_large_files_the_size_is_checked_on_a_hit(tmp_path, monkeypatch):
    folder, _ = remember(tmp_path, "kind", {"a": 1}, _write)
    monkeypatch.setattr(cache, "LARGE", 4)
    (folder / "scores").write_text("1 2 4")
    assert remember(tmp_path, "kind", {"a": 1}, _write)[1]
    assert damages(folder) == ["scores changed"]
    (folder / "scores").write_text("1 2")
    with pytest.raises(RuntimeError, match="scores changed"):
        remember(tmp_path, "kind", {"a": 1}, _write)


def test_listing_and_verifying(tmp_path, capsys, monkeypatch):
    folder, _ = remember(tmp_path, "kind", {"precision": "fp32"}, _write)
    remember(tmp_path, "kind", {"precision": "bf16"}, _write)
    assert damages(folder) == []
    (folder / "scores").write_text("1 2 4")
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path)])
    with pytest.raises(SystemExit) as plain:
        main()
    assert plain.value.code == 0
    assert "precision: fp32" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path), "--verify"])
    with pytest.raises(SystemExit) as checked:
        main()
    assert checked.value.code == 1
    assert capsys.readouterr().out.count("DAMAGED: scores changed") == 1
    (folder / "scores").unlink()
    assert damages(folder) == ["scores is missing"]
    (folder / "key.json").unlink()
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.count("DAMAGED: no record of what was written") == 1


def test_files_in_folders_are_recorded_and_checked_on_a_hit(tmp_path):
    """A policy is a folder within its entry; a few megabytes are read whole, whatever byte changed."""

    def build(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_bytes(bytes(3 * 2**20))
        for left in ("policy.replaced", "half.unfinished"):  # by writers that were killed, of folders and of files
            (folder / left).mkdir()
        (folder / "row.replaced").touch()

    folder, _ = remember(tmp_path, "kind", {"a": 1}, build, about=lambda: {"b": 2})
    assert {path.name for path in folder.iterdir()} == {"policy", "key.json", "files.json", "about.json"}
    assert set(json.loads((folder / "files.json").read_text())) == {"policy/weights", "about.json"}
    assert json.loads((folder / "key.json").read_text()) == {"a": 1}
    (folder / "policy" / "weights").write_bytes(bytes(3 * 2**20 - 1) + b"1")
    with pytest.raises(RuntimeError, match="policy/weights changed"):
        remember(tmp_path, "kind", {"a": 1}, build)


def test_other_ranks_build_with_rank_0_or_not_at_all(tmp_path, monkeypatch):
    """They throw away what they built, and say and ask as often as rank 0 does."""
    asked: list[bool] = []

    def together(missing: bool):
        return lambda flag: asked.append(flag) or (flag or missing)

    built: list[Path] = []
    monkeypatch.setenv("RANK", "1")
    assert remember(tmp_path, "kind", {"a": 1}, built.append, together(False))[1]
    assert (asked, built) == ([False], [])
    folder, cached = remember(tmp_path, "kind", {"a": 1}, built.append, together(True))
    assert (cached, asked, len(built)) == (False, [False] * 3, 1)
    assert not built[0].exists()
    assert not folder.exists()
    monkeypatch.setenv("RANK", "0")
    for missing in (True, False):
        asked.clear()
        assert remember(tmp_path, "kind", {"a": 1}, _write, together(False)) == (folder, not missing)
        assert asked == ([True, False] if missing else [False])


def test_the_nearest_of_the_same_seed_explains_a_miss(tmp_path):
    for key in ({"seed": 1, "a": 1, "b": 1, "c": 1}, {"seed": 1, "a": 2, "b": 3}, {"seed": 2, "a": 2, "b": 2, "c": 2}):
        remember(tmp_path, "kind", key, _write)
    said = why_missed(tmp_path / "kind", {"seed": 1, "a": 2, "b": 2})
    assert (said or "").endswith("differs in b (3 there, 2 asked for)")
    said = why_missed(tmp_path / "kind", {"seed": 2, "a": 2})
    assert (said or "").endswith("differs in b (2 there, null asked for), c (2 there, null asked for)")
    assert why_missed(tmp_path / "kind", {"seed": 2}) is not None  # three fields
    assert why_missed(tmp_path / "kind", {"seed": 2, "d": 1}) is None  # four


def test_what_is_unfinished_is_counted_and_not_listed(tmp_path, capsys, monkeypatch):
    remember(tmp_path, "kind", {"a": 1}, _write)
    (tmp_path / "kind" / "0f.unfinished").mkdir()
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path), "--verify"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert "1 unfinished, 0 damaged" in listed
    assert "0f.unfinished" not in listed


def _answered(root: str) -> int:
    """How many of five questions this process had to answer, slowly."""
    asked: list[int] = []

    def answer(questions: list[int]) -> Iterator[tuple[int, int]]:
        for place, question in enumerate(questions):
            time.sleep(0.05)
            asked.append(question)
            yield place, 2 * question

    assert remember_each(root, "kind", {"a": 1}, [1, 2, 3, 4, 5], answer) == [2, 4, 6, 8, 10]
    return len(asked)


def test_concurrent_processes_ask_each_question_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert sorted(pool.map(_answered, [str(tmp_path)] * 4, chunksize=1)) == [0, 0, 0, 5]


def test_answers_come_in_any_order(tmp_path):
    asked: list[list[int]] = []

    def answer(some: list[int]) -> Iterator[tuple[int, int]]:
        asked.append(some)
        return ((place, 10 * some[place]) for place in reversed(range(len(some))))

    assert remember_each(tmp_path, "kind", {}, [3, 1, 3, 2], answer) == [30, 10, 30, 20]
    assert remember_each(tmp_path, "kind", {}, [2, 5], answer) == [20, 50]
    assert asked == [[3, 1, 2], [5]]
    assert remember_each(tmp_path, "kind", {"a": 1}, [3], lambda _: [(0, "other")]) == ["other"]
    assert remember_each(tmp_path, "kind", {}, [3], lambda _: [(0, "other")]) == [30]


def test_an_answer_is_kept_when_it_comes(tmp_path):
    """By another process than the one that asked, while that waits for the next."""
    (tmp_path / "kind").mkdir()

    def answer(some: list[int]) -> Iterator[tuple[int, int]]:
        for nth, place in enumerate((1, 0), 1):
            yield place, some[place]
            (file,) = (tmp_path / "kind").glob("*.jsonl")
            assert len(file.read_text().splitlines()) == 1 + nth

    assert remember_each(tmp_path, "kind", {}, [1, 2], answer) == [1, 2]


def test_a_question_without_an_answer_is_asked_again(tmp_path):
    with pytest.raises(RuntimeError, match="must be answered, got no answer to 2 of 3; run it again"):
        remember_each(tmp_path, "kind", {}, [1, 2, 3], lambda some: [(1, some[1])])
    asked: list[int] = []
    assert remember_each(tmp_path, "kind", {}, [1, 2, 3], lambda some: same(some, asked)) == [1, 2, 3]
    assert asked == [1, 3]


def same(some: list[int], asked: list[int]) -> list[tuple[int, int]]:
    asked.extend(some)
    return [*enumerate(some)]


def test_answers_outlive_a_full_disk(tmp_path):
    """What came before it is not asked for again; the line that found no room is cut, and taken away."""
    script = """
import resource, sys
from dpo.cache import remember_each
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
remember_each(sys.argv[1], "kind", {}, [1, 2, 3, 4, 5], lambda some: ((n, "x" * 60) for n in range(len(some))))
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large" in ended.stderr
    (file,) = (tmp_path / "kind").glob("*.jsonl")
    assert not file.read_text().endswith("\n")
    asked: list[int] = []
    for _ in range(2):
        remember_each(tmp_path, "kind", {}, [1, 2, 3, 4, 5], lambda some: same(some, asked))
    assert asked == [3, 4, 5]


def test_answers_outlive_a_process_that_is_killed(tmp_path):
    script = """
import os, signal, sys
from dpo.cache import remember_each
def answer(questions):
    yield 0, questions[0]
    yield 3, questions[3]
    os.kill(os.getpid(), signal.SIGKILL)
remember_each(sys.argv[1], "kind", {}, [1, 2, 3, 4, 5], answer)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode != 0
    asked: list[int] = []
    remember_each(tmp_path, "kind", {}, [1, 2, 3, 4, 5], lambda some: same(some, asked))
    assert asked == [2, 3, 5]


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_a_line_that_a_killed_process_was_writing_is_asked_for_again(tmp_path, lost):
    """Whatever of its end is missing; what stands before it is kept."""
    remember_each(tmp_path, "kind", {"a": 1}, [1, 2, 3], enumerate)
    (file,) = (tmp_path / "kind").glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    asked: list[int] = []
    for _ in range(2):
        assert remember_each(tmp_path, "kind", {"a": 1}, [1, 2, 3], lambda some: same(some, asked)) == [1, 2, 3]
    assert asked == [3]
    assert file.read_bytes() == whole
    file.write_bytes(whole[:5])  # of the first line, which says what the file is of
    remember_each(tmp_path, "kind", {"a": 1}, [1, 2, 3], enumerate)
    assert file.read_bytes() == whole


def test_a_damaged_answer_is_an_error_that_says_where(tmp_path):
    remember_each(tmp_path, "kind", {}, [1, 2], enumerate)
    (file,) = (tmp_path / "kind").glob("*.jsonl")
    lines = file.read_text().splitlines()
    for bad in ("", "{", "1", "{}", lines[1].replace("answer", "said")):
        file.write_text("\n".join([lines[0], bad, lines[2]]) + "\n")
        with pytest.raises(
            ValueError, match=f"{file} must hold an answer in each line, found none in line 2; delete that"
        ):
            remember_each(tmp_path, "kind", {}, [1, 2], enumerate)


def test_answers_are_listed(tmp_path, capsys, monkeypatch):
    remember_each(tmp_path, "kind", {}, [1, 2], enumerate)
    (file,) = (tmp_path / "kind").glob("*.jsonl")
    monkeypatch.setattr("sys.argv", ["cache", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"kind/{file.name}  0.0 MB  2 answers\n0 unfinished\n" in capsys.readouterr().out
