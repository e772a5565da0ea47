import inspect
import typing

import lightning.pytorch as pl
import pytest

from hfbridge import Trainer
from hfbridge.errors import SettingsError
from hfbridge.types import TrainerArguments


def test_every_argument_of_lightning_is_there() -> None:
    of_lightning = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert set(TrainerArguments.__annotations__) == of_lightning - {"callbacks"}


def test_all_of_them_can_be_left_out() -> None:
    assert TrainerArguments.__required_keys__ == frozenset()


def test_every_argument_is_explained_where_it_is_listed() -> None:
    text = inspect.getdoc(TrainerArguments) or ""
    missing = [name for name in TrainerArguments.__annotations__ if f"\n    {name}: " not in text]
    assert not missing


def test_the_trainer_names_them_to_type_checkers_and_to_lightning_cli() -> None:
    hint = typing.get_type_hints(Trainer.__init__)["trainer_arguments"]
    assert typing.get_args(hint) == (TrainerArguments,)


def test_an_unknown_argument_is_still_refused_by_hfbridge() -> None:
    with pytest.raises(SettingsError, match="did you mean devices"):
        Trainer({"report_to": "none"}, device=2)  # type: ignore[call-arg]
