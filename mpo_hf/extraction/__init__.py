"""From full fine-tunes to adapters of their base."""

from .adapter_extraction import ExtractedAdapter, ExtractionReport, FactoredModule, extract_adapter


__all__ = ["ExtractedAdapter", "ExtractionReport", "FactoredModule", "extract_adapter"]
