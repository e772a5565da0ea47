"""The loss of an optimizer step: what it counts, how it is divided, what is logged of it."""
