"""NFNets at scale: the models, training, scaling fits and reports behind "ConvNets Match Vision Transformers at Scale".

The package is flat: each module is one responsibility (see the table in README.md). Importing it is free: no JAX, no
TensorFlow, no plotting; models and training import JAX where they are defined, analysis (configurations, records,
scaling fits, figures) never does, so that a laptop without an accelerator opens results in about a second.
"""

__version__ = "0.1.0"

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
"""The checkout: relative output folders of notebooks are taken from here, wherever the kernel started."""


def located(path: str | os.PathLike) -> Path:
    """Where a run's data lie: `path` from where the process is or, if there is nothing, from the checkout.

    The kernels of open notebooks are in notebooks/, those of studies in the checkout.
    """
    path = Path(path).expanduser()
    return path if path.exists() else PROJECT / path
