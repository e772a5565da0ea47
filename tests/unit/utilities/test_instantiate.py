import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hfbridge import HFDataModule, HFModule
from hfbridge.errors import DataError, ModelError
from hfbridge.utilities.instantiate import find_factory, make_processor, make_set
from tests.tiny import make_dataset, make_model, make_tokenizer

ROWS = [{"x": 1}, {"x": 2}]
MODULE = """
ROWS = [{"x": 1}, {"x": 2}]
calls = []
def train(count=2):
    calls.append(count)
    return ROWS[:count]
def nothing():
    pass
def needs(path, count):
    return ROWS
def build():
    raise AssertionError("called too early")
class Rows:
    def __init__(self, count=1): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, index): return ROWS[index]
NUMBER = 3
"""


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported."""
    name = "sources_named"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "sources_broken.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in (name, "sources_broken"):
        sys.modules.pop(module, None)


def test_objects_stay_what_they_are() -> None:
    assert make_set(ROWS, "train_dataset") is ROWS
    assert make_set(None, "train_dataset") is None
    tokenizer = make_tokenizer()  # it can be called, and is not
    assert make_processor(tokenizer) is tokenizer
    assert make_processor(None) is None


def test_a_function_is_called() -> None:
    assert make_set(lambda: ROWS, "train_dataset") is ROWS
    assert make_set(functools.partial(list, ROWS), "train_dataset") == ROWS
    assert isinstance(make_processor(make_tokenizer), PreTrainedTokenizerFast)


def test_a_name_is_imported_and_called(named: str) -> None:
    assert make_set(f"{named}.train", "train_dataset") == ROWS
    assert len(make_set(f"{named}.Rows", "train_dataset")) == 1
    assert make_set(f"{named}.ROWS", "train_dataset") == ROWS


@pytest.mark.parametrize("beside", [False, True], ids=["init_args", "beside class_path"])
def test_a_description_is_called_with_its_arguments(named: str, beside: bool) -> None:
    arguments = {"count": 1} if beside else {"init_args": {"count": 1}}
    assert make_set({"class_path": f"{named}.train", **arguments}, "train_dataset") == ROWS[:1]


def test_the_sets_of_a_dict_are_made_one_by_one(named: str) -> None:
    made = make_set({"a": f"{named}.train", "b": ROWS}, "eval_dataset")
    assert made == {"a": ROWS, "b": ROWS}


def test_a_dataset_dict_is_no_dict_of_names() -> None:
    import datasets

    splits = datasets.DatasetDict(train=make_dataset("distilbert", 4))
    assert make_set(splits, "dataset") is splits


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("glue/sst2", "names nothing that can be imported.*datasets.load_dataset"),
        ("train", "names nothing that can be imported"),
        ("no_such_module_here.train", "names nothing that can be imported"),
        ("sources_named.trian", "sources_named has no trian; did you mean train"),
        ("sources_named.nothing", "nothing, given as train_dataset, returns nothing"),
        ("sources_named.needs", "needs, given as train_dataset, needs the arguments path, count"),
        ({"class_path": "sources_named.train", "init_args": {"cuont": 1}}, "init_args do not fit.*cuont"),
        ({"class_path": "sources_named.NUMBER"}, "cannot be called"),
        ({"class_path": 3}, "the text 3"),
        ({"a": "sources_named.trian"}, r"train_dataset\['a'\] is 'sources_named.trian'"),
    ],
)
def test_what_names_no_set(named: str, source: object, says: str) -> None:
    with pytest.raises(DataError, match=f"(?s){says}"):
        HFDataModule(train_dataset=source)  # type: ignore[arg-type]


def test_an_error_inside_of_a_module_is_not_hidden(named: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        make_set("sources_broken.train", "train_dataset")


def test_a_folder_holds_a_processor(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "saved")
    for source in (tmp_path / "saved", str(tmp_path / "saved"), "./saved", "saved"):
        made = make_processor(source)
        assert made("w3")["input_ids"] == [3]
    module = HFModule(make_model("distilbert"), processing_class="./saved")
    assert module.processing_class("w5")["input_ids"] == [5]


def test_a_processor_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"'\./nowhere', given as processing_class, does not exist"):
        make_processor("./nowhere")


def test_a_function_that_makes_no_processor(named: str) -> None:
    with pytest.raises(ModelError, match="given as processing_class, returns nothing"):
        make_processor(f"{named}.nothing")
    with pytest.raises(ModelError, match="needs the arguments path, count"):
        make_processor(f"{named}.needs")


def test_a_model_is_named_by_its_factory_which_the_run_calls(named: str) -> None:
    module = HFModule(f"{named}.build")  # the function would raise
    assert not module.is_built
    with pytest.raises(ModelError, match=r"model is 'sources_named\.biuld', and sources_named has no biuld"):
        HFModule(f"{named}.biuld")


def test_names_of_models_stay_names(named: str, tmp_path: Path) -> None:
    for name in ("distilbert-base-uncased", "org/model-1.5b", "gpt2", "some.model"):
        assert find_factory(name, None) == name
    assert find_factory(f"{named}.build", "AutoModelForCausalLM") == f"{named}.build"
    (tmp_path / f"{named}.build").mkdir()
    assert find_factory(f"{named}.build", None) == f"{named}.build"
