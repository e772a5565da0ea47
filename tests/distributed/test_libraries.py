"""Unmodified scripts of TRL on two ranks, which share the optimizer by DeepSpeed."""

import json
from pathlib import Path

import pytest

from tests.distributed.library_jobs import run_script
from tests.dropin.libraries import save_models
from tests.dropin.sides import files_in
from tests.parity.engines import same

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed, pytest.mark.slow]

COMMON = (
    "--use_cpu true --bf16 false --disable_tqdm true --report_to none --logging_steps 1 --learning_rate 1e-2 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1 --output_dir out"
)
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}

COMPARED = (
    "out/README.md",
    "out/checkpoint-2/model.safetensors",
    "out/checkpoint-2/trainer_state.json",
    "out/final/model.safetensors",
    "out/trainer_state.json",
)


@pytest.mark.long
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_deepspeed_of_stage_2(ranks, tmp_path: Path, script: str) -> None:
    pytest.importorskip("trl")
    models = save_models(tmp_path / "models")
    (tmp_path / "ds.json").write_text(json.dumps(ZERO_2))
    arguments = ["--model_name_or_path", str(models / "llama"), *COMMON.split()]
    given = {
        "theirs": ([*arguments, "--deepspeed", str(tmp_path / "ds.json")], None),
        "ours": ([*arguments, "--deepspeed", str(tmp_path / "ds.json")], None),
        "named": (arguments, "deepspeed_stage_2"),
    }
    for side, (said, strategy) in given.items():
        (tmp_path / side).mkdir()
        ranks(2).run(run_script, tmp_path / side, side, script, said, strategy)
    found = {side: files_in(tmp_path / side) for side in given}
    for side in ("ours", "named"):
        for name in COMPARED:
            same(f"{side}: {name}", found["theirs"][name], found[side][name])
