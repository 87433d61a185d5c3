"""Mixture weights from tables of numbers: the dual objective, what mixtures achieve, certificates. Tensors only, no models."""

from .dual import Certificate, DualTable, balance_heuristic, certify, implicit_table, minimize_dual, reward_table
from .objectives import dual_objective, effective_sample_size, implicit_dual_objective, on_policy_objective
from .optim import MirrorDescent, TableFit
from .primal import MixtureTable, achieved_welfare, certify_achieved, maximize_achieved
from .reward_scales import RewardScale, reference_moments, win_rates
from .welfare import AlphaFair, Constrained, CVaR, MaxMin, WeightedSum, Welfare, project_to_simplex


__all__ = [
    "AlphaFair",
    "CVaR",
    "Certificate",
    "Constrained",
    "DualTable",
    "MaxMin",
    "MirrorDescent",
    "MixtureTable",
    "RewardScale",
    "TableFit",
    "WeightedSum",
    "Welfare",
    "achieved_welfare",
    "balance_heuristic",
    "certify",
    "certify_achieved",
    "dual_objective",
    "effective_sample_size",
    "implicit_dual_objective",
    "implicit_table",
    "maximize_achieved",
    "minimize_dual",
    "on_policy_objective",
    "project_to_simplex",
    "reference_moments",
    "reward_table",
    "win_rates",
]
