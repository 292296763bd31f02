"""Training recipes that several configuration files share."""

from ml_collections import ConfigDict

from adderflax.fields import require_choice
from adderflax.models.vit import PRESETS
from adderflax.training.config import default_config


def deit(variant: str, arithmetic: str) -> ConfigDict:
    """The recipe of DeiT on ImageNet at 224 pixels (Touvron et al. 2021, table 9), in bfloat16.

    Left out: repeated augmentation, which draws each image three times into a batch.

    Args:
      variant: "Ti/16", "S/16" or "B/16".
      arithmetic: "adder", "multiply", "vit" or "custom".
    """
    config = default_config(arithmetic)
    config.data.name = "imagenet2012"
    config.data.validation_fraction = 0.01
    config.data.workers = 8
    config.model.variant = variant
    config.model.dtype = "bfloat16"

    config.batch_size = 1024
    config.epochs = 300.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_fraction = 5 / 300
    config.optimizer.final_fraction = 0.01
    config.optimizer.weight_decay = 0.05

    config.augment.random_resized_crop = True
    config.augment.flip = True
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 9
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.augment.erasing_probability = 0.25
    config.augment.label_smoothing = 0.1
    config.model.drop_path_rate = 0.1

    config.eval_every = 6250
    config.checkpoint_every = 1250
    config.log_every = 50
    return config


def cifar(name: str, arithmetic: str) -> ConfigDict:
    """Training from scratch on 32-pixel images: a compact encoder on 4-pixel patches behind a small stem, its
    MLPs with a 3x3 depthwise convolution.

    Args:
      name: "cifar10" or "cifar100".
      arithmetic: "adder", "multiply", "vit" or "custom"; or "taught", the adder model that learns from its
        finished twin besides the labels; or "warm", the same from that twin's converted weights, in two
        epochs.
    """
    require_choice("arithmetic", arithmetic, (*PRESETS, "custom", "taught", "warm"))
    config = default_config("adder" if arithmetic in ("taught", "warm") else arithmetic)
    if arithmetic in ("taught", "warm"):
        config.distillation.teacher = f"runs/{name}_adder_vit-multiply"
        config.distillation.features = 1.0
        config.distillation.soft_labels = 0.5
    config.data.name = name
    config.data.validation_fraction = 0.02
    config.model.variant = "compact/4"
    config.model.mlp_kernel_size = 3
    # In the adder model too: under 1 % of its terms, and 1.3 points on a subset (results/gap_cifar10.md).
    config.model.mlp_convolution = "multiply"
    # Without it the adder model gains little from the neighbors (same page).
    config.model.centered = True
    config.model.dtype = "bfloat16"

    config.batch_size = 256
    config.epochs = 50.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.final_fraction = 0.01
    config.optimizer.weight_decay = 0.05
    config.ema_decay = 0.999

    # Milder than what DeiT needs for 300 epochs, and all of it runs on the accelerator.
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.augment.mixup_alpha = 0.2
    config.augment.cutmix_alpha = 1.0
    config.augment.label_smoothing = 0.1
    config.model.drop_path_rate = 0.0

    config.eval_every = 1910
    config.checkpoint_every = 1910
    config.log_every = 50
    if arithmetic == "warm":
        _make_short(config)
    return config


def _make_short(config: ConfigDict) -> None:
    """Begins with the teacher's weights, which leave little to learn and nothing to regularize."""
    config.warm_start.source = config.distillation.teacher
    config.batch_size = 64
    config.epochs = 2.0
    config.optimizer.learning_rate = 5e-4
    config.ema_decay = 0.995
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.label_smoothing = 0.0
    config.eval_every = 300
    config.checkpoint_every = 150
    config.log_every = 25
