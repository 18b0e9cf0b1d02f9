"""What a run paid to servers: a line of `bill.jsonl` in its directory for each request, when its answer comes.

So its parts add up, however each ended. `dpo.sweep.directory.finish` puts the sums beside the run's own figures.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_directory: Path | None = None  # of the run that this process executes


@dataclass
class Bill:
    """What was asked of a server, in requests that it answered, and tokens as it counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def __add__(self, other: "Bill") -> "Bill":
        return Bill(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    def money(self, prices: Sequence[float]) -> float:
        """prices: of a million tokens in, and out."""
        return (self.prompt_tokens * prices[0] + self.tokens * prices[1]) / 1e6

    def said(self, prices: Sequence[float] | None) -> str:
        money = "" if prices is None else f", {self.money(prices):.4f} at the given prices"
        return f"{self.requests} requests, {self.prompt_tokens} tokens in, {self.tokens} out{money}"


@contextmanager
def paid_by(directory: Path) -> Iterator[None]:
    """What is entered meanwhile is this run's."""
    global _directory
    _directory = directory
    try:
        yield
    finally:
        _directory = None


def enter(kind: str, /, **amounts: float) -> None:
    """Add amounts to the bill of the run, if one is executed here and they are not nothing."""
    if _directory is not None and any(amounts.values()):
        with open(_directory / "bill.jsonl", "a") as file:
            file.write(f"\n{json.dumps({kind: amounts})}")  # a line that a full disk cut spoils no other


def total(directory: Path) -> dict[str, float]:
    """The sums of a run's bill, as "kind/amount"; {} of a run that has none."""
    sums: dict[str, float] = {}
    file = directory / "bill.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):  # cut, or empty
            [(kind, amounts)] = json.loads(line).items()
            for name, amount in amounts.items():
                sums[f"{kind}/{name}"] = sums.get(f"{kind}/{name}", 0) + amount
    return sums
