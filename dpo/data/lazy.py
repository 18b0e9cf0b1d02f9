"""Sequences whose items are made when they are asked for, so that a large set is never in memory whole."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")


class Lazy(Sequence[Made], Generic[Made]):
    """`length` items; item n is make(n), anew each time. digests: what tells each item, where that is known before."""

    def __init__(self, length: int, make: Callable[[int], Made], digests: Sequence[Any] | None = None) -> None:
        self.length, self.make, self.digests = length, make, digests

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        """The item, or of a slice a list of them. Raises: IndexError."""
        if isinstance(place, slice):
            return [self.make(number) for number in range(self.length)[place]]
        return self.make(range(self.length)[place])


def mapped(function: Callable[[Any], Made], items: Sequence[Any]) -> Lazy[Made]:
    """What a function makes of each item."""
    return Lazy(len(items), lambda place: function(items[place]))


def joined(parts: Sequence[Sequence[Made]]) -> Lazy[Made]:
    """The items of all parts, one part after another."""
    starts = [0, *accumulate(map(len, parts))]

    def item(number: int) -> Made:
        part = bisect_right(starts, number) - 1
        return parts[part][number - starts[part]]

    known = [digests for part in parts if (digests := digests_of(part)) is not None]
    return Lazy(starts[-1], item, joined(known) if parts and len(known) == len(parts) else None)


def digests_of(items: Sequence[Any]) -> Sequence[Any] | None:
    """Those that a `Lazy` was given."""
    return items.digests if isinstance(items, Lazy) else None
