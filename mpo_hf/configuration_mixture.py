"""`prune_mixture_weights`, where release 0.1.0 documented it."""

from .mixture.configuration_mixture import prune_mixture_weights


__all__ = ["prune_mixture_weights"]
