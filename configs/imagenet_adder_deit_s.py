"""Adder DeiT-S (22 M parameters) on ImageNet at 224 pixels, DeiT's recipe, 300 epochs.

    python train.py --config configs/imagenet_adder_deit_s.py --config.data.data_dir=DIR

Arguments: ``:multiply`` is the multiplying twin, ``:vit`` the standard DeiT-S.
Data: imagenet2012 prepared by tensorflow-datasets as array_record (docs/training.md).
Hardware: a TPU pod slice or several GPUs; all local devices are used.
Accuracy and time: not yet run.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import deit


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    return deit("S/16", arithmetic)
