"""Train a language model on preferences with TRL."""

from datasets import Dataset
from local import make_rows
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

arguments, model = TrlParser((DPOConfig, ModelConfig)).parse_args_and_config()
trainer = DPOTrainer(
    model.model_name_or_path,
    args=arguments,
    train_dataset=Dataset.from_list(make_rows("preference", 14)),
    eval_dataset=Dataset.from_list(make_rows("preference", 5, seed=1)),
    peft_config=get_peft_config(model),
)
trainer.train(arguments.resume_from_checkpoint)
trainer.save_model(f"{arguments.output_dir}/final")
trainer.save_state()
