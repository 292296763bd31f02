"""AdderNet's ResNet-20 (0.27 M parameters) on CIFAR-10: the recipe of its official code.

    python train.py --config configs/cifar10_adder_resnet20.py

Arguments: ``:multiply`` is the twin whose every convolution multiplies.
The recipe: 400 epochs of SGD at 0.1 on a cosine to 0, momentum 0.9, weight decay 5e-4 on every parameter,
batches of 256, crops with 4 pixels of padding and flips, the adaptive local rate 0.2 on adder templates.
Where we differ: the rate falls with every update, not every epoch; an image is divided by the set's deviation
of all pixels, (0.247, 0.244, 0.262), not by (0.2023, 0.1994, 0.2010); dense kernels begin as He et al. 2015
draw them, not as PyTorch does. The official code runs 399 of its 400 epochs, the first at the second's rate.
Weights of the official code are read by `adderflax.models.load_addernet_weights`.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: not yet run in full. With ``--config.epochs=10`` it reached 0.7939 of the test images, its
twin 0.8365 (results/cifar10.md). A step takes 1.3 to 1.5 s on two cores of an AMD EPYC with
``--config.model.implementation=cpu``, so the 400 epochs some 30 hours there (docs/accelerators.md).
"""

from ml_collections import ConfigDict

from adderflax.training.config import default_config


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    config = default_config(arithmetic)
    config.data.name = "cifar10"
    # The official code selects nothing, so all 50,000 images train.
    config.data.validation_fraction = 0.0
    config.model.variant = "ResNet-20"

    config.batch_size = 256
    config.epochs = 400.0
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_rest = True
    if arithmetic == "adder":
        config.optimizer.decay_adder = True
        config.optimizer.adder_local_rate = 0.2

    config.augment.crop_padding = 4
    config.augment.flip = True

    config.checkpoint_every = 980
    config.log_every = 50
    return config
