"""The loop over an epoch."""
