"""from_trainer: the one line that moves an existing script; knows both worlds."""

from typing import Any, Literal

from transformers import Trainer as NativeTrainer

from hfbridge.advice import Advice
from hfbridge.datamodule import HFDataModule
from hfbridge.migrate.carry import carry_over
from hfbridge.module import HFModule
from hfbridge.trainer import Trainer

_ADVICE = Advice(
    exact='pass loss_normalization="exact" to from_trainer',
    native='pass loss_normalization="native" to from_trainer',
)


def from_trainer(
    native_trainer: NativeTrainer,
    *,
    strategy: Any = "auto",
    loss_normalization: Literal["exact", "native"] = "native",
    **trainer_arguments: Any,
) -> tuple[Trainer, HFModule, HFDataModule]:
    """Move a native Trainer over, with all that it holds.

    After `trainer, module, data = from_trainer(native_trainer)`, `trainer.fit(module, data)` does what
    `native_trainer.train()` would have done next, to the bit. Use one of the two: model, callbacks and
    datasets are the same objects. A Trainer that has trained goes on as its next `train` would: with the
    trained weights, its optimizer's state and the random state that is there, counting steps from 0. To go on
    with the run itself, give its checkpoint: `trainer.fit(module, data, ckpt_path="out/checkpoint-500")`.

    Args:
        native_trainer: a `transformers.Trainer` or `Seq2SeqTrainer`, or of a subclass that adds methods and
            replaces none that Lightning would have to call.
        strategy: as of `hfbridge.Trainer`: "ddp", "fsdp2", "deepspeed_stage_2", ...; "auto" is what the
            settings say, or one device.
        loss_normalization: "native": the numbers of the Trainer that is moved. "exact": those that do not
            depend on how a step's samples are cut into micro-batches, which is HFModule's own default.
        **trainer_arguments: further ones of `hfbridge.Trainer`, such as `devices=2`; `callbacks` are added to
            those of the native Trainer.

    Returns:
        Trainer, module and data module.

    Raises:
        SettingsError: a method was replaced, an attribute changed, or a setting is not carried;
            all are named.
        DataError: the native Trainer has no dataset.
        ModelError: the model cannot be trained by hfbridge.

    Mirrors: transformers.Trainer.train
    Proved by: tests/parity/test_migrate.py
    """
    return carry_over(
        native_trainer,
        loss_normalization=loss_normalization,
        advice=_ADVICE,
        strategy=strategy,
        **trainer_arguments,
    )
