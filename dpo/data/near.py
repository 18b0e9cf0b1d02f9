"""Near-duplicate texts: MinHash in bands proposes candidates, and the overlap of their shingles decides.

A text is taken without case, punctuation and runs of white space, as the set of its shingles: all runs of 8 characters.
Near are two texts whose sets have a Jaccard index (common over all) of at least 0.8: a word or two of a paragraph
differ. So whatever is found is near by that measure. Of texts at 0.8 one in some 5,000 is missed, of nearer ones fewer;
missed are, too, some of texts that share most of a long boilerplate, since a text is compared with few of its bucket. A
paraphrase or a translation is not near.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHINGLE = 8  # characters
BANDS, ROWS = 16, 4  # a candidate agrees in all rows of a band: at Jaccard j with probability 1 - (1 - j^4)^16
THRESHOLD = 0.8
COMPARED = 10  # texts of a bucket with which each that falls into it is compared
SURE = 0.5  # share of agreeing hashes below which a candidate is not looked at: six standard errors below THRESHOLD

_powers = np.random.default_rng(0).integers(2**63, size=SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_bins = np.arange(BANDS * ROWS, dtype=np.uint64) << np.uint64(64 - 6)  # the beginnings of 64 equal parts of the hashes


@lru_cache(maxsize=2**12)
def shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of the shingles of a text, sorted, each once; of a shorter text one of the whole."""
    plain = re.sub(r"\W+", " ", text.casefold()).strip().ljust(SHINGLE)
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    runs = len(codes) - SHINGLE + 1
    hashes = sum((codes[place : place + runs] * _powers[place] for place in range(SHINGLE)), np.zeros(runs, np.uint64))
    hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes * np.uint64(0x9E3779B97F4A7C15))


def signatures(texts: Sequence[str]) -> NDArray[np.uint64]:
    """MinHash by one permutation (1208.1259): the least hash in each of 64 bins, or where a bin is empty in the next
    that is not (1406.4784).  # (texts, 64)
    """
    found = np.empty((len(texts), len(_bins)), np.uint64)
    for row, text in enumerate(texts):
        hashes = shingles(text)
        found[row] = hashes[np.searchsorted(hashes, _bins) % len(hashes)]
    return found


def jaccard(one: str, other: str) -> float:
    """Common shingles of two texts over all that they have."""
    first, second = shingles(one), shingles(other)
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def near(
    texts: Sequence[str],
    sketches: NDArray[np.uint64],
    known: Sequence[str] | None = None,
    known_sketches: NDArray[np.uint64] | None = None,
) -> NDArray[np.int64]:
    """For each text the place of a known one that is near it, or -1. sketches: their `signatures`.

    known: None: the same texts, of which none is near itself.  # (texts,)
    """
    others, theirs = (texts, sketches) if known is None or known_sketches is None else (known, known_sketches)
    found = np.full(len(texts), -1)
    for band in range(BANDS if len(others) else 0):
        columns = slice(band * ROWS, (band + 1) * ROWS)
        ours, buckets = _bucket(sketches[:, columns]), _bucket(theirs[:, columns])
        order = np.argsort(buckets, kind="stable")
        first = np.searchsorted(buckets[order], ours)
        for step in range(COMPARED + 1):
            place = np.minimum(first + step, len(order) - 1)
            candidates = order[place]
            asked = (first + step < len(order)) & (buckets[candidates] == ours) & (found < 0)
            if known is None:
                asked &= candidates != np.arange(len(texts))
            rows = np.flatnonzero(asked)
            rows = rows[(sketches[rows] == theirs[candidates[rows]]).mean(axis=1) >= SURE]
            for row in rows:
                if found[row] < 0 and jaccard(texts[row], others[candidates[row]]) >= THRESHOLD:
                    found[row] = candidates[row]
                    if known is None:  # it is mutual
                        found[candidates[row]] = row if found[candidates[row]] < 0 else found[candidates[row]]
    return found


def _bucket(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for the hashes of a band.  # (texts, ROWS) -> (texts,)"""
    mixed = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return mixed
