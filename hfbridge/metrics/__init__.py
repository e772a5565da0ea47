"""Metrics by name: `evaluate`'s own, or equal ones shipped here."""
