"""How often the intervals of `analysis.seeds` hold the truth: simulated sweeps, whose true means are known.

    python -m analysis.coverage

prints the share of 95 % intervals of "the best beta of one method minus the best of another" that hold it, in worlds
like those of the studies: by number of seeds and betas, in ties and apart, with noise that the runs of a seed share,
with betas that differ in spread, and with one that collapses for some seeds. Beside it stands the interval that takes,
for each seed, the beta that is best for the others: it looks fair and is too narrow.
"""

from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.seeds import Floats, half_width, of_best

LADDERS: dict[str, Callable[[int], NDArray[Any]]] = {  # true means of a method's betas, the best of which is 0
    "tie": np.zeros,
    "two tie": lambda betas: np.array([0.0, 0.0, *np.linspace(-0.05, -0.15, betas - 2)]),
    "close": lambda betas: -0.02 * np.arange(betas),
    "apart": lambda betas: -0.1 * np.arange(betas),
}
WORLDS = [("tie", "tie"), ("tie", "apart"), ("two tie", "two tie"), ("close", "close"), ("apart", "apart")]
NOISE = 0.05  # standard deviation of a win rate over seeds
COLLAPSE = 0.5  # what a collapse costs


def sweeps(
    world: tuple[str, str], seeds: int, betas: int, shared: float, uneven: bool, collapse: float, trials: int
) -> tuple[Floats, Floats]:
    """Win rates of two methods whose best betas are as good.  # (trials, seeds, betas), (trials, seeds, betas)

    world: the LADDERS of the two. shared: correlation of the runs of a seed. uneven: the last beta has four times the
    spread of the first.
    collapse: share of seeds for which the last beta collapses, with the mean that it has elsewhere.
    """
    rng = np.random.default_rng([seeds, betas, int(100 * shared), uneven, int(100 * collapse), WORLDS.index(world)])
    common = rng.normal(0, 1, (trials, seeds, 1))
    spread = NOISE * (np.linspace(1, 4, betas) if uneven else np.ones(betas))
    found = []
    for ladder in world:
        own = rng.normal(0, 1, (trials, seeds, betas))
        rates = 0.7 + LADDERS[ladder](betas) + spread * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        fallen = rng.random((trials, seeds)) < collapse
        rates[..., -1] -= COLLAPSE * (fallen - collapse)
        found.append(rates)
    return found[0], found[1]


def held(mine: Floats, theirs: Floats, looks: float = 1) -> float:
    """Share of the sweeps whose interval holds the difference of the best true means, which is zero."""
    _, low, high = of_best(mine, theirs, looks)
    return float(np.mean((low <= 0) & (high >= 0)))


def chosen_by_others(mine: Floats, theirs: Floats) -> float:
    """The same where each seed's beta is chosen by the mean of the other seeds, and the interval is Student's."""
    picked = []
    for side in (mine, theirs):
        best = (side.sum(-2, keepdims=True) - side).argmax(-1, keepdims=True)
        picked.append(np.take_along_axis(side, best, -1)[..., 0])
    difference = picked[0] - picked[1]
    n = difference.shape[-1]
    half = difference.std(-1, ddof=1) * half_width(np.array(float(n)))
    return float(np.mean(np.abs(difference.mean(-1)) <= half))


def table(trials: int = 4000, seeds: Sequence[int] = (5, 10), betas: Sequence[int] = (3, 4, 6)) -> pd.DataFrame:
    """A row per simulated world."""
    rows = []
    grids = list(product(seeds, betas))
    cases = [(world, n, k, shared, False, 0.0) for world in WORLDS for n, k in grids for shared in (0.0, 0.7)]
    cases += [(world, n, k, 0.5, True, 0.0) for world in WORLDS for n, k in grids]
    cases += [(("apart", "apart"), n, k, 0.5, False, 0.3) for n, k in grids]
    for world, n, k, shared, uneven, collapse in cases:
        mine, theirs = sweeps(world, n, k, shared, uneven, collapse, trials)
        noise = "uneven" if uneven else "a beta collapses" if collapse else "even"
        settings: dict[str, Any] = {
            "betas of the two": "against".join(f" {one} " for one in world).strip(),
            "spread": noise,
        }
        settings |= {"shared": shared, "seeds": n, "betas": k}
        rows.append(
            {**settings, "best minus best": held(mine, theirs), "chosen by others": chosen_by_others(mine, theirs)}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    ArgumentParser(
        "python -m analysis.coverage", description=__doc__, formatter_class=RawTextHelpFormatter
    ).parse_args()
    print(table().to_string(index=False, float_format="{:.3f}".format))
