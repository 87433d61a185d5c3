"""`extract_adapter`, where release 0.1.0 documented it."""

from .extraction.adapter_extraction import extract_adapter


__all__ = ["extract_adapter"]
