"""What the ranks of a pool run for tests/distributed/test_packing.py."""

import hfbridge
from tests.parity.engines import assert_identical, run_ours
from tests.parity.test_packing import TOKENS, job_of, pack, run_native
from tests.tiny import make_model, make_rows


def run_on_both() -> list[list[int]]:
    """Train on packed rows in both engines, to the bit alike on this rank; returns the packs."""
    assert_identical(run_native(job_of(), pack), run_ours(job_of()))
    return pack(make_rows("llama", 40)).packs


def train(strategy: str) -> list[float]:
    """Train on packed rows; returns the loss of each step."""
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    module = hfbridge.HFModule(make_model("llama", dropout=0.0))
    data = hfbridge.HFDataModule(train_dataset=make_rows("llama", 40), packing=TOKENS)
    trainer = hfbridge.Trainer(settings, strategy=strategy, logger=False, enable_model_summary=False)
    trainer.fit(module, data)
    return [row["loss"] for row in trainer.log_history if "loss" in row]


def refuse(strategy: str) -> str:
    """Try to train a model that would not keep packed examples apart; returns why it cannot."""
    module = hfbridge.HFModule(make_model("llama", dropout=0.0))
    for layer in module.model.model.layers:
        layer.register_forward_hook(lambda layer, given, out: out + out.cumsum(1) * 1e-3)
    data = hfbridge.HFDataModule(train_dataset=make_rows("llama", 40), packing=TOKENS)
    settings = {"output_dir": "out", "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
    trainer = hfbridge.Trainer(settings, strategy=strategy, logger=False, enable_model_summary=False)
    try:
        trainer.fit(module, data)
    except hfbridge.ModelError as error:
        return str(error)
    return ""
