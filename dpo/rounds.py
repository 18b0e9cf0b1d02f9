"""Rounds of on-policy training: sample of the policy, judge, train, measure, and again from what came of it.

python -m dpo.rounds -m beta=0.03,0.1 seed=0,1 rounds=3

Each round is a run of `dpo.train`, which starts from the policy of the round before: see `dpo.sweep.rounds`.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("rounds")  # ends here: what a run imports is slow

from dpo import train  # noqa: F401  what plans the rounds has it imported once, for all of them
