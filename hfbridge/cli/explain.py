"""`hfbridge explain`."""

import argparse
import json

from hfbridge.explain import explain


def run(arguments: argparse.Namespace) -> int:
    """Print what settings become.

    Returns:
        1 if something is refused.

    Raises:
        SettingsError: the source cannot be read, holds no settings, or is a script.
    """
    explanation = explain(
        arguments.source,
        strategy=arguments.strategy,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        accelerate_config=arguments.accelerate_config,
        loss_normalization=arguments.loss_normalization,
    )
    print(json.dumps(explanation.as_dict(), indent=2) if arguments.json else explanation)
    return int(bool(explanation.refused))
