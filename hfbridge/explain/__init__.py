"""What settings become, what differs from the native Trainer, and what is refused; nothing is loaded."""

from hfbridge.explain.differences import Difference
from hfbridge.explain.explanation import Explained, Explanation, Overridden
from hfbridge.explain.make import explain

__all__ = ["Difference", "Explained", "Explanation", "Overridden", "explain"]
