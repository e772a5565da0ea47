"""The model and the arithmetic of one optimizer step; knows Hugging Face, not Lightning."""
