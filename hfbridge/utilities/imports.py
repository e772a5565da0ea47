"""Optional packages: imported where used, with an error that names the extra to install."""

import importlib
from types import ModuleType

from hfbridge.errors import MissingDependencyError


def require(package: str, *, extra: str, for_: str) -> ModuleType:
    """Import an optional package at the point of use.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: the package is not installed. An error inside an installed package is not
            wrapped.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != package and not package.startswith(f"{missing}."):
            raise
        root = package.partition(".")[0]
        message = (
            f'{for_} needs the package {root}, which is not installed; run: pip install "hfbridge[{extra}]"'
        )
        raise MissingDependencyError(message, name=root) from error
