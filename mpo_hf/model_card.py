"""`create_model_card`, where release 0.1.0 documented it."""

from .mixture.model_card import create_model_card


__all__ = ["create_model_card"]
