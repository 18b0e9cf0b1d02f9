"""AlpacaEval's instructions, which a policy answers after training, and its answers in the format of the package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_instructions(path: str | None) -> list[Row]:
    """AlpacaEval's instructions, in its order; none without a path."""
    return [] if path is None else rows_of(path, "instruction")


def write_outputs(directory: Path, instructions: Sequence[Row], answers: Sequence[str]) -> None:
    """Write a run's `alpaca_eval.json`, what the package takes as model_outputs; the generator is the run."""
    generator = "/".join(directory.absolute().parts[-2:])
    rows = [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": answer,
            "generator": generator,
            "datasplit": "eval",
        }
        for row, answer in zip(instructions, answers, strict=True)
    ]
    write_json(directory / "alpaca_eval.json", rows)


def rows_of(path: str | Path, *columns: str) -> list[Row]:
    """A JSON list of objects that have text in these columns."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"a JSON list must be at {path}, found no file; check the path")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, found otherwise: {error}") from error
    sound = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(column), str) for column in columns) for row in rows
    )
    if not sound or not rows:
        raise ValueError(f"{path} must be a JSON list of objects with {', '.join(columns)}; found otherwise")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
