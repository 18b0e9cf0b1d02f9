"""Judges compare responses to a prompt: the functions that `conf/judge/` names, and `compare`, which asks them."""

from dpo.judges.comparing import JUDGES_VERSION, Judge, Rule, Verdict, cached_judge, compare, is_pairwise
from dpo.judges.llm import Pairwise, Questions
from dpo.judges.preference import accurate_then_short
from dpo.judges.reward_model import RewardModel
from dpo.judges.rules import gold, hasty, shorter

__all__ = [
    "JUDGES_VERSION",
    "Judge",
    "Pairwise",
    "Questions",
    "RewardModel",
    "Rule",
    "Verdict",
    "accurate_then_short",
    "cached_judge",
    "compare",
    "gold",
    "hasty",
    "is_pairwise",
    "shorter",
]
