"""Fine-tune a language model with TRL."""

from dataclasses import dataclass

from datasets import Dataset
from local import make_rows
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config


@dataclass
class Script:
    rows: str = "text"


script, arguments, model = TrlParser((Script, SFTConfig, ModelConfig)).parse_args_and_config()
trainer = SFTTrainer(
    model.model_name_or_path,
    arguments,
    train_dataset=Dataset.from_list(make_rows(script.rows, 14)),
    eval_dataset=Dataset.from_list(make_rows(script.rows, 5, seed=1)),
    peft_config=get_peft_config(model),
)
trainer.train(arguments.resume_from_checkpoint)
trainer.save_model(f"{arguments.output_dir}/final")
trainer.save_state()
