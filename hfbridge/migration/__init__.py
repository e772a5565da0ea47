"""What a `transformers.Trainer` object holds: methods, attributes, callbacks."""
