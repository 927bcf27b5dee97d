"""A page for saved records: one HTML file that opens anywhere, without a network, and computes nothing anew."""

from .page import write_report

__all__ = ["write_report"]
