"""Selectors: from scores to the examples that are kept."""
