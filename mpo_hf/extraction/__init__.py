"""From full fine-tunes to adapters of their base."""

from .adapter_extraction import ExtractedAdapter, extract_adapter
from .extraction_report import ExtractionReport, FactoredModule


__all__ = ["ExtractedAdapter", "ExtractionReport", "FactoredModule", "extract_adapter"]
