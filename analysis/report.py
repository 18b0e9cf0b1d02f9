"""The command line of a study, and the numbers of its runs kept where a reader finds them."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dpo.results.figures import save

Frames = dict[str, pd.DataFrame]  # what a study reads of its runs, a row per run or finer, by name


def write(frames: Frames, folder: Path) -> None:
    """A CSV file per frame, from which every interval can be computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)


def kept(folder: str | Path, read: Callable[..., Frames], *sweeps: str) -> Frames:
    """`read(*sweeps)`, kept in `folder`; what is kept there where the runs are not here.

    Raises: ValueError if neither is here.
    """
    folder = Path(folder)
    if all(Path(sweep).is_dir() for sweep in sweeps):
        write(read(*sweeps), folder)
    files = sorted(folder.glob("*.csv"))
    if not files:
        missing = [sweep for sweep in sweeps if not Path(sweep).is_dir()]
        raise ValueError(f"{', '.join(missing)} must hold the runs, or {folder} their numbers; found neither: run it")
    # A token may be "null": only what is empty was not measured.
    return {file.stem: pd.read_csv(file, keep_default_na=False, na_values=[""]) for file in files}


def main(
    usage: str | None,
    read: Callable[..., Frames],
    study: Callable[[Frames], tuple[dict[str, pd.DataFrame], dict[str, Figure]]],
) -> None:
    """Run `study` on what `read` reads of the folders and the values of keys (policy=...) that the command line names.

    Results go to the first folder.
    """
    folders = [Path(one) for one in sys.argv[1:] if Path(one).is_dir() or "=" not in one]
    only = dict(one.split("=", 1) for one in sys.argv[1:] if Path(one) not in folders)
    if not folders or not all(folder.is_dir() for folder in folders):
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        sys.exit(f"{usage}\nfound no folder of runs {', '.join(missing)}" if missing else str(usage))
    try:
        inspect.signature(read).bind(*folders, **only)
    except TypeError as error:
        sys.exit(f"{usage}\nfound {len(folders)} folders and {len(only)} keys: {error}")
    try:
        frames = read(*folders, **only)
        tables, figures = study(frames)
    except ValueError as error:
        sys.exit(str(error))
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string() if len(table) else 'no rows: it takes more runs, or larger ones'}")
        table.to_csv(folders[0] / f"{name}.csv")
    for name, figure in figures.items():
        save(figure, folders[0] / f"{name}.png")
    write(frames, folders[0] / "frames")
    written = [*(f"{name}.csv" for name in tables), *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf"))]
    print(f"\nwritten to {folders[0]}: {', '.join(written)}, and the numbers of each run in frames/")
