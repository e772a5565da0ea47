"""From examples to windows of micro-batches; knows Hugging Face, not Lightning."""
