"""Unmodified scripts of TRL, sentence-transformers and SetFit: by `hfbridge run` all is equal to the bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dropin.libraries import TwoProcesses, save_models, two_processes
from tests.dropin.sides import files_in
from tests.parity.engines import same

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

COMMON = (
    "--use_cpu true --bf16 false --disable_tqdm true --report_to none --logging_steps 1 --learning_rate 1e-2 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1 "
    "--save_strategy steps --save_steps 2"
)
EVALUATED = "--eval_strategy steps --eval_steps 2"
LORA = "--use_peft --lora_r 2 --lora_target_modules q_proj v_proj"
TRL = {
    "sft": f"sft llama {EVALUATED}",
    "sft: packed": f"sft llama {EVALUATED} --packing true --max_length 16",
    "sft: wrapped": f"sft llama {EVALUATED} --packing true --max_length 16 --packing_strategy wrapped",
    "sft: completion only": f"sft llama {EVALUATED} --rows completion --completion_only_loss true",
    "sft: assistant only": f"sft llama {EVALUATED} --rows messages --assistant_only_loss true",
    "sft: padding-free": f"sft llama {EVALUATED} --padding_free true --max_length none",
    "sft: LoRA": f"sft llama {EVALUATED} {LORA}",
    "sft: chunked": f"sft llama {EVALUATED} --loss_type chunked_nll",
    "sft: dft": f"sft llama {EVALUATED} --loss_type dft",
    "sft: smoothed": f"sft llama {EVALUATED} --label_smoothing_factor 0.1",
    "dpo": f"dpo llama {EVALUATED}",
    "dpo: LoRA": f"dpo llama {EVALUATED} {LORA}",
    "dpo: precomputed": f"dpo llama {EVALUATED} --precompute_ref_log_probs true",
    "dpo: reference follows": f"dpo llama {EVALUATED} --sync_ref_model true --ref_model_sync_steps 2",
    "reward": f"reward llama-reward {EVALUATED}",
    "reward: LoRA": f"reward llama-reward {EVALUATED} {LORA} --lora_task_type SEQ_CLS",
    "kto": f"kto llama {EVALUATED}",
    "kto: LoRA": f"kto llama {EVALUATED} {LORA}",
    "grpo": "grpo llama --num_generations 2 --max_completion_length 6",
    "grpo: twice": "grpo llama --num_generations 2 --max_completion_length 6 --num_iterations 2 --beta 0.1",
    "rloo": "rloo llama --num_generations 2 --max_completion_length 6",
}
OTHERS = {
    "embed": "embed bert",
    "embed: no duplicates": "embed bert --batch_sampler no_duplicates",
    "embed: two losses": "embed bert --losses two",
    "embed: in turn": "embed bert --losses two --multi_dataset_batch_sampler round_robin",
    "embed: weights in the loss": "embed bert --losses softmax",
    "embed: several sizes": "embed bert --losses matryoshka",
    "embed: best model": "embed bert --load_best_model_at_end",
    "embed: only an evaluator": "embed bert --only_evaluator",
    "rerank": "rerank bert-rank",
    "rerank: two losses": "rerank bert-rank --losses two",
    "few_shot": "few_shot bert",
}
LIBRARY = {"embed": "sentence_transformers", "rerank": "sentence_transformers", "few_shot": "setfit"}


@pytest.fixture(scope="module")
def both() -> Iterator[TwoProcesses]:
    """Give a process for each side."""
    with two_processes() as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the models that the scripts load."""
    return save_models(tmp_path_factory.mktemp("models"))


def compare(both: TwoProcesses, models: Path, command: str) -> None:
    """Run a script on both sides, and see that they write the same.

    Args:
        both: the sides.
        models: where the models are.
        command: the script, its model, and arguments.
    """
    script, model, *arguments = command.split()
    pytest.importorskip(LIBRARY.get(script, "trl"))
    both.run(Path.cwd(), script, ["--model_name_or_path", str(models / model), *arguments])
    theirs, ours = files_in(Path("theirs")), files_in(Path("ours"))
    assert any(name.endswith("trainer_state.json") for name in theirs)
    same("the files", theirs, ours)


@pytest.mark.parametrize("case", TRL)
def test_trl(case: str, both: TwoProcesses, models: Path) -> None:
    compare(both, models, f"{TRL[case]} {COMMON} --output_dir out")


@pytest.mark.parametrize("case", OTHERS)
def test_sentence_transformers_and_setfit(case: str, both: TwoProcesses, models: Path) -> None:
    compare(both, models, OTHERS[case])


@pytest.mark.long
@pytest.mark.parametrize("command", [f"{TRL['sft']} {COMMON}", f"{TRL['grpo']} {COMMON}", "embed bert"])
def test_a_run_that_is_resumed(command: str, both: TwoProcesses, models: Path) -> None:
    compare(both, models, f"{command} --output_dir out")
    compare(both, models, f"{command} --output_dir again --resume_from_checkpoint out/checkpoint-2")
