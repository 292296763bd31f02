"""What closes the gap between an adder ViT and its multiplying twin, on 5,000 images of CIFAR-10.

The training set is a fixed subset of 5,000 images, the test set all 10,000. The model is small enough
for two CPU cores: 64 features, 4 blocks, 4 heads, patches of 8 pixels; crops and flips, no other
augmentation. Each tool is screened with one seed over 10 epochs (`screen-...`), first alone, then on
top of the learning rate that was found best; `multiply` and `vit` are screened at the same learning
rates, so that they are no easier to beat. The best three then run over 20 epochs with three seeds
(`final-...`), beside `multiply` and `vit` at their best rate. The teacher, and the source of a warm
start, is the first seed of `final-multiply`: its 20 epochs come on top of the student's. So that this is
no advantage unseen, `final-multiply-warm` lets the twin go on from the same weights for as many epochs.
Run it with `--keep_checkpoints`: later rows read those of `final-multiply-seed0`.

What this can show: which tools help a small model that is trained for a short time. One seed of a
screening run is good for about a point.
"""

from typing import Any

from adderflax.analysis.study import Comparison, Run

CONFIG = "configs/cifar10_adder_vit.py"
SUBSET = {
    "data.train_examples": 5000,
    "data.validation_fraction": 0.0,
    "model.patch_size": 8,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "model.depth": 4,
    "model.drop_path_rate": 0.0,
    "batch_size": 64,
    "ema_decay": 0.0,
    "augment.randaugment_layers": 0,
    "augment.mixup_alpha": 0.0,
    "augment.cutmix_alpha": 0.0,
    "augment.erasing_probability": 0.0,
    "augment.label_smoothing": 0.0,
    "eval_every": 10_000,
    "checkpoint_every": 10_000,
}
TEACHER = "runs/studies/gap_cifar10/final-multiply-seed0"
LR3, LR6 = {"optimizer.learning_rate": 3e-3}, {"optimizer.learning_rate": 6e-3}
WARM = {"warm_start.source": TEACHER}
SOFT = {"distillation.teacher": TEACHER, "distillation.soft_labels": 0.5, "distillation.temperature": 2.0}
ATTENTION = {"distillation.teacher": TEACHER, "distillation.attention": 1.0}
FEATURES = {"distillation.teacher": TEACHER, "distillation.features": 1.0}

# What is changed, by the name of the row; its first word is the arithmetic.
TWINS: dict[str, dict[str, Any]] = {
    "multiply": {},
    "multiply-lr3": LR3,
    "multiply-lr6": LR6,
    "vit": {},
    "vit-lr3": LR3,
    "vit-lr6": LR6,
}
ALONE: dict[str, dict[str, Any]] = {
    "adder": {},
    "adder-lr3": LR3,
    "adder-multiplier1": {"optimizer.adder_multiplier": 1.0},
    "adder-multiplier30": {"optimizer.adder_multiplier": 30.0},
    "adder-dx-sign": {"model.grad_inputs": "sign"},
    "adder-dx-hardtanh4": {"model.grad_inputs": "hardtanh:4"},
    "adder-dx-full": {"model.grad_inputs": "full"},
    "adder-qk-sign": {"model.grad_query": "sign", "model.grad_key": "sign"},
    "adder-decay": {"optimizer.decay_adder": True},
    "adder-no-identity": {"model.identity": False},
    "adder-out-multiply": {"model.output_projection": "multiply"},
    "adder-sgd-local-rate": {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "optimizer.weight_decay": 5e-4,
        "optimizer.adder_local_rate": 0.2,
    },
}
TOGETHER: dict[str, dict[str, Any]] = {
    "adder-lr6": LR6,
    "adder-lr3-warm": LR3 | WARM,
    "adder-lr3-features": LR3 | FEATURES,
    "adder-lr3-attention": LR3 | ATTENTION,
    "adder-lr3-soft": LR3 | SOFT,
    "adder-lr3-power": LR3 | {"model.power_activation": True},
    "adder-lr3-dx-hardtanh4": LR3 | {"model.grad_inputs": "hardtanh:4"},
    "adder-lr3-warm-features": LR3 | WARM | FEATURES,
    "adder-lr3-anneal": LR3 | {"anneal_fraction": 0.2},
}
FINALS: dict[str, dict[str, Any]] = {
    "multiply": LR3,
    "vit": LR3,
    "adder-features": LR3 | FEATURES,
    "adder-warm": LR3 | WARM,
    "adder-warm-features": LR3 | WARM | FEATURES,
}
# As many epochs for the multiplying twin as a warm-started model has seen in all.
CONTROLS: dict[str, dict[str, Any]] = {"multiply-warm": LR3 | WARM}


def row(kind: str, name: str, changes: dict[str, Any], epochs: float, seeds: tuple[int, ...]) -> Run:
    """A row of the study."""
    config = f"{CONFIG}:{name.partition('-')[0]}"
    overrides = SUBSET | {"epochs": epochs} | changes
    return Run(name=f"{kind}-{name}", config=config, overrides=overrides, seeds=seeds)


def runs() -> list[Run]:
    """The final runs, the teacher first, and the screening runs."""
    finals = [row("final", name, changes, 20.0, (0, 1, 2)) for name, changes in FINALS.items()]
    finals += [row("final", name, changes, 20.0, (0,)) for name, changes in CONTROLS.items()]
    screened = TWINS | ALONE | TOGETHER
    return finals + [row("screen", name, changes, 10.0, (0,)) for name, changes in screened.items()]


def comparisons() -> list[Comparison]:
    """Every tool against the adder model without it, and the final adder models against both twins."""
    found = [Comparison(name, f"screen-{name}", "screen-adder") for name in ALONE if name != "adder"]
    found += [Comparison(name, f"screen-{name}", "screen-adder-lr3") for name in TOGETHER]
    for base in ("multiply", "vit"):
        found += [
            Comparison(f"{name} against {base}", f"final-{name}", f"final-{base}")
            for name in FINALS
            if name.startswith("adder")
        ]
    return found
