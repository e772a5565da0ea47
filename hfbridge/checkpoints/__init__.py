"""`checkpoint-N` directories in the native Trainer's format, and the same content in Lightning's."""
