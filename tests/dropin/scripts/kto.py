"""Train a language model on judged completions with TRL."""

from datasets import Dataset
from local import make_rows
from trl import KTOConfig, KTOTrainer, ModelConfig, TrlParser, get_peft_config

arguments, model = TrlParser((KTOConfig, ModelConfig)).parse_args_and_config()
trainer = KTOTrainer(
    model.model_name_or_path,
    args=arguments,
    train_dataset=Dataset.from_list(make_rows("judged", 14)),
    eval_dataset=Dataset.from_list(make_rows("judged", 6, seed=1)),
    peft_config=get_peft_config(model),
)
trainer.train(arguments.resume_from_checkpoint)
trainer.save_model(f"{arguments.output_dir}/final")
