"""What closes the gap between an adder ViT and its multiplying twin, on 5,000 images of CIFAR-10.

The training set is a fixed subset of 5,000 images, the test set all 10,000. The model is small enough
for two CPU cores: 64 features, 4 blocks, 4 heads, patches of 8 pixels; crops and flips, no other
augmentation. Each tool is screened with one seed over 10 epochs (`screen-...`), first alone, then on
top of the learning rate that was found best; `multiply` and `vit` are screened at the same learning
rates, so that they are no easier to beat. The best three then run over 20 epochs with three seeds
(`final-...`), beside `multiply` and `vit` at their best rate. The teacher, and the source of a warm
start, is the first seed of `final-multiply`: its 20 epochs come on top of the student's. So that this is
no advantage unseen, `final-multiply-warm` lets the twin go on from the same weights for as many epochs,
and `final-multiply-features` lets it learn from the same teacher. The rows with `neighbors` repeat this for
the depthwise convolution in the MLP and the teaching of `configs/cifar10_adder_vit.py:taught`, the teacher
being the first seed of `final-multiply-neighbors`. The rows `full-...` repeat that once more with ten times
as many updates: 10 epochs of all 50,000 images, their own twin as teacher. Rows with `no-identity` leave the
identity out of the attention maps, of the centered adder model and of its twin.
Run it with `--keep_checkpoints`: later rows read those of `final-multiply-seed0`.

What this can show: which tools help a small model that is trained for a short time. One seed of a
screening run is good for about a point.
"""

import math
from typing import Any

from adderflax.analysis.study import Comparison, Run

SUBSET = {
    "model.variant": "Ti/4",
    "model.dtype": None,
    "optimizer.learning_rate": 1e-3,
    "data.train_examples": 5000,
    "data.validation_fraction": 0.0,
    "model.patch_size": 8,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "model.depth": 4,
    "model.mlp_kernel_size": None,
    "model.mlp_convolution": None,
    "model.centered": None,
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
LR3, LR6 = {"optimizer.learning_rate": 3e-3}, {"optimizer.learning_rate": 6e-3}

MEAN = {"model.pooling": "mean"}
NEIGHBORS = MEAN | {"model.mlp_kernel_size": 3}
CENTERED = {"model.centered": True}
NO_IDENTITY = {"model.identity": False}


def lessons(study: str) -> dict[str, dict[str, Any]]:
    """What can be taken over from the first final run of a study's twin."""
    teacher = f"runs/studies/{study}/final-multiply-seed0"
    taught = {"distillation.teacher": teacher}
    return {
        "warm": {"warm_start.source": teacher},
        "features": taught | {"distillation.features": 1.0},
        "attention": taught | {"distillation.attention": 1.0},
        "soft": taught | {"distillation.soft_labels": 0.5, "distillation.temperature": 2.0},
    }


LESSONS = lessons("gap_cifar10")
WARM, FEATURES = LESSONS["warm"], LESSONS["features"]

# What is changed, by the name of the row; its first word is the arithmetic.
TWINS: dict[str, dict[str, Any]] = {
    "multiply": {},
    "multiply-lr3": LR3,
    "multiply-lr6": LR6,
    "multiply-lr3-mean": LR3 | MEAN,
    "multiply-lr3-neighbors": LR3 | NEIGHBORS,
    "vit": {},
    "vit-lr3": LR3,
    "vit-lr6": LR6,
}
TOOLS: dict[str, dict[str, Any]] = {
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
ALONE: dict[str, dict[str, Any]] = {"adder": {}, "adder-lr3": LR3} | TOOLS
TOGETHER: dict[str, dict[str, Any]] = {
    "adder-lr6": LR6,
    **{f"adder-lr3-{name}": LR3 | changes for name, changes in LESSONS.items()},
    "adder-lr3-power": LR3 | {"model.power_activation": True},
    # Twice the default scale of 16 features: trained adder maps are nearer to rank one than the twin's.
    "adder-lr3-hot": LR3 | {"model.attention_scale": 2 / math.sqrt(2 * 16 * (1 - 2 / math.pi))},
    "adder-lr3-dot": LR3 | {"model.similarity": "dot"},
    "adder-lr3-dx-hardtanh4": LR3 | {"model.grad_inputs": "hardtanh:4"},
    "adder-lr3-warm-features": LR3 | WARM | FEATURES,
    "adder-lr3-mean": LR3 | MEAN,
    "adder-lr3-neighbors": LR3 | NEIGHBORS,
    "adder-lr3-neighbors-centered": LR3 | NEIGHBORS | CENTERED,
    "adder-lr3-centered": LR3 | CENTERED,
    "adder-lr3-anneal": LR3 | {"anneal_fraction": 0.2},
}
FINALS: dict[str, dict[str, Any]] = {
    "multiply": LR3,
    "vit": LR3,
    "adder": LR3,
    "adder-features": LR3 | FEATURES,
    "adder-warm": LR3 | WARM,
    "adder-warm-features": LR3 | WARM | FEATURES,
}
# The same help for the multiplying twin.
CONTROLS: dict[str, dict[str, Any]] = {"multiply-warm": LR3 | WARM, "multiply-features": LR3 | FEATURES}
# The recipe of configs/cifar10_adder_vit.py:taught on the small model: neighbors, and their twin as teacher.
TEACHER = {"distillation.teacher": "runs/studies/gap_cifar10/final-multiply-neighbors-seed0"}
TAUGHT = LR3 | NEIGHBORS | TEACHER | {"distillation.features": 1.0, "distillation.soft_labels": 0.5}
ADDER = LR3 | NEIGHBORS | CENTERED | {"model.mlp_convolution": "multiply"}
# studies/rank_depth.py finds the identity to cost small adder models accuracy (results/rank_depth.md).
WITHOUT_IDENTITY: dict[str, dict[str, Any]] = {
    "adder-neighbors-multiply-centered-no-identity": ADDER | NO_IDENTITY,
    "multiply-neighbors-no-identity": LR3 | NEIGHBORS | NO_IDENTITY,
}
NEIGHBOR_FINALS: dict[str, dict[str, Any]] = {
    "multiply-neighbors": LR3 | NEIGHBORS,
    "adder-neighbors": LR3 | NEIGHBORS,
    "adder-neighbors-taught": TAUGHT,
    "adder-neighbors-multiply-taught": TAUGHT | {"model.mlp_convolution": "multiply"},
    "adder-neighbors-multiply-centered": ADDER,
    "adder-neighbors-multiply-centered-taught": TAUGHT | CENTERED | {"model.mlp_convolution": "multiply"},
} | WITHOUT_IDENTITY
NEIGHBOR_CONTROLS: dict[str, dict[str, Any]] = {
    "multiply-neighbors-taught": TAUGHT,
    "adder-neighbors-multiply": LR3 | NEIGHBORS | {"model.mlp_convolution": "multiply"},
}
# The same recipe for ten times as many updates: 10 epochs of all 50,000 images, its own twin as teacher.
ALL = {"data.train_examples": None, "epochs": 10.0}
ALL_TEACHER = {"distillation.teacher": "runs/studies/gap_cifar10/full-multiply-neighbors-seed0"}
MULTIPLY_TAUGHT = TAUGHT | ALL_TEACHER | {"model.mlp_convolution": "multiply"}
FULL: dict[str, dict[str, Any]] = {
    "multiply-neighbors": LR3 | NEIGHBORS,
    "adder-neighbors-multiply-taught": MULTIPLY_TAUGHT,
    "multiply-neighbors-taught": MULTIPLY_TAUGHT,
    "adder-neighbors-multiply": LR3 | NEIGHBORS | {"model.mlp_convolution": "multiply"},
    "adder-neighbors-multiply-centered-taught": MULTIPLY_TAUGHT | CENTERED,
    "adder-neighbors-multiply-centered": ADDER,
} | WITHOUT_IDENTITY


def rows(
    kind: str,
    config: str,
    changed: dict[str, dict[str, Any]],
    seeds: tuple[int, ...],
    overrides: dict[str, Any],
) -> list[Run]:
    """A row of the study for each name: the first word is the arithmetic."""
    return [
        Run(
            name=f"{kind}-{name}",
            config=f"{config}:{name.partition('-')[0]}",
            overrides=overrides | changes,
            seeds=seeds,
        )
        for name, changes in changed.items()
    ]


def runs() -> list[Run]:
    """The final runs, the teacher first, and the screening runs."""
    config = "configs/cifar10_adder_vit.py"
    long, short = SUBSET | {"epochs": 20.0}, SUBSET | {"epochs": 10.0}
    return (
        rows("final", config, FINALS, (0, 1, 2), long)
        + rows("final", config, CONTROLS, (0,), long)
        + rows("final", config, NEIGHBOR_FINALS, (0, 1, 2), long)
        + rows("final", config, NEIGHBOR_CONTROLS, (0,), long)
        + rows("full", config, FULL, (0,), SUBSET | ALL)
        + rows("screen", config, TWINS | ALONE | TOGETHER, (0,), short)
    )


def comparisons() -> list[Comparison]:
    """Every tool against the adder model without it, and the final adder models against both twins."""
    found = [Comparison(name, f"screen-{name}", "screen-adder") for name in ALONE if name != "adder"]
    found += [Comparison(name, f"screen-{name}", "screen-adder-lr3") for name in TOGETHER]
    found += against_twins(FINALS)
    for kind in ("final", "full"):
        for name in ("adder-neighbors-multiply-centered", "multiply-neighbors"):
            found.append(
                Comparison(f"{kind}-{name}, identity", f"{kind}-{name}", f"{kind}-{name}-no-identity")
            )
    return found + [
        Comparison(f"{kind}-{name} against its twin", f"{kind}-{name}", f"{kind}-multiply-neighbors")
        for kind, names in (("final", NEIGHBOR_FINALS), ("full", FULL))
        for name in names
        if name.startswith("adder")
    ]


def against_twins(finals: dict[str, dict[str, Any]]) -> list[Comparison]:
    """The final adder models against both twins."""
    adders = [name for name in finals if name.startswith("adder")]
    return [
        Comparison(f"{name} against {base}", f"final-{name}", f"final-{base}")
        for base in ("multiply", "vit")
        for name in adders
    ]
