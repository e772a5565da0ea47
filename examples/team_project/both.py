"""Step 3: HFModule on HFDataModule."""

from data_module_only import Reviews
from module_only import Classifier
from plain import main

if __name__ == "__main__":
    main(Classifier, Reviews, "eval_names.yaml")
