"""Fitting mixture weights with reward models: [`MPOConfig`] and [`MPOTrainer`]."""

from .mpo_config import MPOConfig
from .mpo_trainer import MPOTrainer


__all__ = ["MPOConfig", "MPOTrainer"]
