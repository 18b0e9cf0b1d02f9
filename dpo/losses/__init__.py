"""Preference objectives, functions `(pair, beta, ...) -> Loss` of log-probabilities: what `conf/loss/` names."""

from dpo.losses.coupled import BCO, AlphaDPO, aot, aot_unpaired, dr_dpo, kto, kto_paired, sft
from dpo.losses.dynamic_beta import BetaDPO
from dpo.losses.objectives import (
    apo_down,
    apo_zero,
    cal_dpo,
    chi_po,
    cpo,
    dpo,
    dpop,
    exo,
    f_dpo,
    hinge,
    ipo,
    length_normalized,
    nca,
    orpo,
    r_dpo,
    robust,
    rpo,
    simpo,
    slic,
    sppo,
)
from dpo.losses.pairs import Loss, PairLogps, reads, whole_step
from dpo.losses.tokens import ld_dpo, tdpo, wpo

__all__ = [
    "BCO", "AlphaDPO", "BetaDPO", "Loss", "PairLogps", "aot", "aot_unpaired", "apo_down", "apo_zero", "cal_dpo",
    "chi_po", "cpo", "dpo", "dpop", "dr_dpo", "exo", "f_dpo", "hinge", "ipo", "kto", "kto_paired", "ld_dpo",
    "length_normalized", "nca", "orpo", "r_dpo", "reads", "robust", "rpo", "sft", "simpo", "slic", "sppo", "tdpo",
    "whole_step", "wpo",
]  # fmt: skip
