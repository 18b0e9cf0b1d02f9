"""Judges compare responses to a prompt: the functions that `conf/judge/` names, and `compare`, which asks them."""

from dpo.judges.comparing import JUDGES_VERSION, Judge, Verdict, compare, costly, is_pairwise, remembering
from dpo.judges.rules import gold, hasty, shorter

__all__ = [
    "JUDGES_VERSION",
    "Judge",
    "Verdict",
    "compare",
    "costly",
    "gold",
    "hasty",
    "is_pairwise",
    "remembering",
    "shorter",
]
