"""Train a language model on rewards of what it writes with TRL."""

from datasets import Dataset
from local import make_rows
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config


def count_distinct(completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


arguments, model = TrlParser((GRPOConfig, ModelConfig)).parse_args_and_config()
trainer = GRPOTrainer(
    model.model_name_or_path,
    reward_funcs=count_distinct,
    args=arguments,
    train_dataset=Dataset.from_list(make_rows("prompt", 14)),
    peft_config=get_peft_config(model),
)
trainer.train(arguments.resume_from_checkpoint)
trainer.save_model(f"{arguments.output_dir}/final")
