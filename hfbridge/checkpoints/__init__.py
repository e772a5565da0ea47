"""Checkpoints in the layout of `transformers.Trainer`: write, read, convert, resume."""
