"""The command line of a study: print its tables, and write them and its figures beside the runs."""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def main(usage: str | None, study: Callable[..., tuple[dict[str, pd.DataFrame], dict[str, Figure]]]) -> None:
    """Run `study` on the folders and the values of keys (policy=...) that the command line names.

    Results go to the first folder.
    """
    folders = [Path(one) for one in sys.argv[1:] if Path(one).is_dir() or "=" not in one]
    only = dict(one.split("=", 1) for one in sys.argv[1:] if Path(one) not in folders)
    if not folders or not all(folder.is_dir() for folder in folders):
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        sys.exit(f"{usage}\nfound no folder of runs {', '.join(missing)}" if missing else str(usage))
    try:
        tables, figures = study(*folders, **only)
    except ValueError as error:
        sys.exit(str(error))
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string()}")
        table.to_csv(folders[0] / f"{name}.csv")
    for name, figure in figures.items():
        figure.savefig(folders[0] / f"{name}.png")
    written = [*(f"{name}.csv" for name in tables), *(f"{name}.png" for name in figures)]
    print(f"\nwritten to {folders[0]}: {', '.join(written)}")
