"""The same job on several engines, recorded step by step and compared."""
