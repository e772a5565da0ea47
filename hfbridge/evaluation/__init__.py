"""From predictions to metrics; knows Hugging Face, not Lightning."""
