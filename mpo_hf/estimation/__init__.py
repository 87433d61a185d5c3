"""Mixture weights from tables of numbers: the dual and the primal objective, certificates. Tensors only, no models."""

from .bias import minimize_debiased
from .certificate import Certificate, certify, certify_primal
from .comparison import Comparison, compare
from .decoded import DecodedTable, LogNormalizer
from .decoded_certificate import certify_decoded
from .decoded_weights import WeightSpace, maximize_decoded
from .dual import minimize_dual
from .objectives import dual_objective, effective_sample_size, implicit_dual_objective, on_policy_objective
from .optim import ExactMinimizer, MirrorDescent
from .primal import maximize_primal, primal_objective
from .reward_scales import RewardScale, reference_moments, win_rates
from .tables import DualTable, MixtureTable, balance_heuristic, implicit_table, reward_table
from .welfare import (
    AlphaFair,
    Constrained,
    CVaR,
    InfeasibleError,
    MaxMin,
    Polyhedral,
    WeightedSum,
    Welfare,
    project_to_simplex,
)


__all__ = [
    "AlphaFair",
    "CVaR",
    "Certificate",
    "Comparison",
    "Constrained",
    "DecodedTable",
    "DualTable",
    "ExactMinimizer",
    "InfeasibleError",
    "LogNormalizer",
    "MaxMin",
    "MirrorDescent",
    "MixtureTable",
    "Polyhedral",
    "RewardScale",
    "WeightSpace",
    "WeightedSum",
    "Welfare",
    "balance_heuristic",
    "certify",
    "certify_decoded",
    "certify_primal",
    "compare",
    "dual_objective",
    "effective_sample_size",
    "implicit_dual_objective",
    "implicit_table",
    "maximize_decoded",
    "maximize_primal",
    "minimize_debiased",
    "minimize_dual",
    "on_policy_objective",
    "primal_objective",
    "project_to_simplex",
    "reference_moments",
    "reward_table",
    "win_rates",
]
