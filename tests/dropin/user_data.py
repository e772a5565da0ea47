"""What user_script.py imports from the folder that it lies in."""

from typing import Any

from tests.tiny import PadRows, make_model, make_rows


def make_sets() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make rows to train on, and to evaluate."""
    return make_rows("bert-token", 20), make_rows("bert-token", 6, seed=8)


def model_of() -> Any:
    """Make the model."""
    return make_model("bert-token")


collate = PadRows(12)
