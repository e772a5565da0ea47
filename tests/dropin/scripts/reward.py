"""Train a reward model with TRL."""

from datasets import Dataset
from local import make_rows
from trl import ModelConfig, RewardConfig, RewardTrainer, TrlParser, get_peft_config

arguments, model = TrlParser((RewardConfig, ModelConfig)).parse_args_and_config()
trainer = RewardTrainer(
    model.model_name_or_path,
    args=arguments,
    train_dataset=Dataset.from_list(make_rows("ranked", 14)),
    eval_dataset=Dataset.from_list(make_rows("ranked", 5, seed=1)),
    peft_config=get_peft_config(model),
)
trainer.train(arguments.resume_from_checkpoint)
trainer.save_model(f"{arguments.output_dir}/final")
