"""From examples to micro-batches and their optimizer steps."""
