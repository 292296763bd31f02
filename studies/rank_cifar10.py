"""Does the identity restore the rank that additions lose? CIFAR-10, 7 blocks of width 256.

The runs and comparisons are those of `studies/rank_digits.py`, which explains them, on 64 tokens
and heads of width 64, and each run has the epochs of `configs/cifar10_adder_vit.py`. Not for a
CPU: on a machine with an accelerator, in as many stretches as it takes,

    python -m adderflax.study studies/rank_cifar10.py --data_dir DIR

What this can show: differences in a model of 3.9 M parameters for these seeds and one learning
rate. What it cannot: accuracies to compare with full schedules.
"""

from adderflax.analysis.study import Run
from studies.rank_digits import comparisons, rank_runs

__all__ = ["comparisons", "runs"]


def runs() -> list[Run]:
    """The eight cells and four controls of temperature."""
    # The paper's layers, without our constant.
    overrides = {"epochs": 50.0, "model.centered": None}
    return rank_runs("configs/cifar10_adder_vit.py:adder", head_width=64, overrides=overrides)
