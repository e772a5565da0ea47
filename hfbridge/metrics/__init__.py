"""Metrics by name: those of `evaluate`, or equal ones shipped here."""
