"""Adder ViT (DeiT-Ti on 4-pixel patches, 5.4 M parameters) on CIFAR-10, from scratch, 200 epochs.

    python train.py --config configs/cifar10_adder_vit.py

Arguments: ``:multiply`` is the multiplying twin, ``:vit`` the standard ViT.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: not yet run in full. Estimated, not measured, for an H200 with the CUDA kernels: 6.3 s an
epoch, the twin 2.8 s (``python -m benchmarks.device_cifar estimate``, which states its assumptions; the same
module runs both on a lent GPU in resumable calls). Small models on a subset: results/gap_cifar10.md.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import cifar


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    return cifar("cifar10", arithmetic)
