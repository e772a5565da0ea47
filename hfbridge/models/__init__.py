"""The model and the arithmetic of one optimizer step."""
