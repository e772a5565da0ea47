"""hfbridge.dropin.Seq2SeqTrainer beside transformers', live."""

from typing import Any

import pytest
from transformers import DataCollatorForSeq2Seq, GenerationConfig, Seq2SeqTrainingArguments

from tests.dropin.sides import BASE, Side, compare, look
from tests.parity.engines import digest_metrics, without_times
from tests.tiny import make_dataset, make_model, make_tokenizer


def make_seq2seq(trainer_class: Any, **arguments: Any) -> Any:
    tokenizer, model = make_tokenizer(), make_model("t5")
    return trainer_class(
        model=model,
        args=Seq2SeqTrainingArguments(**{**BASE, "num_train_epochs": 1, **arguments}),
        train_dataset=make_dataset("t5", 12),
        eval_dataset=make_dataset("t5", 6, seed=5),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=digest_metrics,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("own", [False, True])
def test_generation_in_a_run_and_after_it(own: bool) -> None:
    def user_code(side: Side) -> Any:
        kind = side.seq2seq
        if own:  # evaluate is the Trainer's own method then

            class Mine(side.seq2seq):  # type: ignore[misc,name-defined]
                def evaluate(self, *args: Any, **kwargs: Any) -> Any:
                    return super().evaluate(*args, **kwargs)

            kind = Mine
        trainer = make_seq2seq(
            kind,
            predict_with_generate=True,
            generation_max_length=7,
            generation_config=GenerationConfig(num_beams=2, decoder_start_token_id=0, pad_token_id=0),
            eval_strategy="epoch",
            save_strategy="epoch",
        )
        run = look(trainer, trainer.train())
        beams = without_times(trainer.evaluate(num_beams=3, metric_key_prefix="beams"))
        predicted = trainer.predict(make_dataset("t5", 5, seed=6), max_length=5)
        return run, beams, predicted.predictions.tolist(), without_times(predicted.metrics)

    facts, _, predicted, _ = compare(user_code)
    assert any("eval_predictions" in row for row in facts["history"])
    assert len(predicted) == 5


def test_without_generation() -> None:
    def user_code(side: Side) -> Any:
        trainer = make_seq2seq(side.seq2seq, eval_strategy="epoch")
        return look(trainer, trainer.train()), without_times(trainer.evaluate())

    compare(user_code)
