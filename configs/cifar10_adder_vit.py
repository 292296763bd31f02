"""Adder ViT (7 blocks of width 256, a small stem, 3.9 M parameters) on CIFAR-10, from scratch, 50 epochs.

    python train.py --config configs/cifar10_adder_vit.py:multiply   # the twin
    python train.py --config configs/cifar10_adder_vit.py:taught     # the adder model that learns from it
    python train.py --config configs/cifar10_adder_vit.py:warm       # the same, from its weights, 2 epochs
    python train.py --config configs/cifar10_adder_vit.py            # the adder model alone

Other argument: ``:vit`` is the standard ViT. ``:taught`` and ``:warm`` read the finished twin from
runs/cifar10_adder_vit-multiply, or from ``--config.distillation.teacher=WORKDIR``, ``:warm`` its weights from
``--config.warm_start.source=WORKDIR``.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: measured on an H200 with one seed, results/cifar10.md. The twin: 90.7 % of the test images
(weights/cifar10_twin). ``:warm``, on two CPU cores in 70 minutes: 89.9 % (weights/cifar10_adder_vit).
``:taught`` and the adder model alone have not yet been trained to their end. An epoch should take the adder
model 4.4 s there and the twin 1.8 s, by `python -m benchmarks.device_cifar estimate`. Without the convolution
in the MLP ``:taught`` took 4.8 s. A small model on a CPU: results/gap_cifar10.md.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import cifar


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic, or "taught" or "warm"."""
    return cifar("cifar10", arithmetic)
