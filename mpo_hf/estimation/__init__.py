"""Mixture weights from tables of numbers: the dual and the primal objective, certificates. Tensors only, no models."""

from .certificate import Certificate, certify, certify_primal
from .dual import minimize_dual
from .objectives import dual_objective, effective_sample_size, implicit_dual_objective, on_policy_objective
from .optim import ExactMinimizer, MirrorDescent
from .primal import maximize_primal, primal_objective
from .reward_scales import RewardScale, reference_moments, win_rates
from .tables import DualTable, MixtureTable, balance_heuristic, implicit_table, reward_table
from .welfare import AlphaFair, Constrained, CVaR, MaxMin, WeightedSum, Welfare, project_to_simplex


__all__ = [
    "AlphaFair",
    "CVaR",
    "Certificate",
    "Constrained",
    "DualTable",
    "ExactMinimizer",
    "MaxMin",
    "MirrorDescent",
    "MixtureTable",
    "RewardScale",
    "WeightedSum",
    "Welfare",
    "balance_heuristic",
    "certify",
    "certify_primal",
    "dual_objective",
    "effective_sample_size",
    "implicit_dual_objective",
    "implicit_table",
    "maximize_primal",
    "minimize_dual",
    "on_policy_objective",
    "primal_objective",
    "project_to_simplex",
    "reference_moments",
    "reward_table",
    "win_rates",
]
