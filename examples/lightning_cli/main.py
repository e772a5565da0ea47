"""A project with a LightningCLI of its own: python main.py fit --config config.yaml

config.yaml says what runs, and names what parts.py makes. Any value can be said on the command line, too:

    python main.py fit --config config.yaml --config tiny.yaml
    python main.py fit --config config.yaml --trainer.settings.learning_rate 3e-5 --trainer.strategy ddp
    python main.py fit --print_config

`hfbridge fit --config config.yaml` does the same without this file.
"""

from lightning.pytorch.cli import LightningCLI

import hfbridge

if __name__ == "__main__":
    LightningCLI(
        hfbridge.HFModule,
        hfbridge.HFDataModule,
        trainer_class=hfbridge.Trainer,
        seed_everything_default=False,  # `seed` of the settings seeds, as natively
        save_config_kwargs={"overwrite": True},
    )
