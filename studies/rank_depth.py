"""Does the identity matter more in a deeper model? 4 and 12 blocks, 5,000 images of CIFAR-10.

`studies/rank_digits.py` found the rank of the map in use restored by the identity, and accuracy the
same with and without it, in a model of 4 blocks. Features of attention alone fall towards rank one
with depth, so the identity should be worth more in 12 blocks, and most where the layers cost the
most rank. The model and the images are those of `studies/gap_cifar10.py`, 17 tokens, 10 epochs at
its best learning rate. Three arithmetics: the multiplying twin with its dot product, adder layers
with the L1 similarity as in the paper, and the same with centered templates, which is ours
(`model.centered`). Rows are named blocks-arithmetic-identity; all else is equal, the residual
connections included, which carry rank past every map.

What this can show: whether 12 blocks of a narrow model need the identity, for these seeds and a
short schedule. What it cannot: what it is worth in a model that is trained to its end.
"""

from typing import Any

from adderflax.analysis.study import Comparison, Run
from studies.gap_cifar10 import CENTERED, LR3, SUBSET

DEPTHS = (4, 12)
ARITHMETICS: dict[str, tuple[str, dict[str, Any]]] = {
    "multiply": ("multiply", {}),
    "adder": ("adder", {}),
    "centered": ("adder", CENTERED),
}


def runs() -> list[Run]:
    """Depths times arithmetics, without and with the identity."""
    return [
        Run(
            name=f"{depth}-{name}-{'I' if identity else 'none'}",
            config=f"configs/cifar10_adder_vit.py:{preset}",
            overrides=SUBSET
            | LR3
            | changes
            | {"epochs": 10.0, "model.depth": depth, "model.identity": identity},
        )
        for depth in DEPTHS
        for name, (preset, changes) in ARITHMETICS.items()
        for identity in (False, True)
    ]


def comparisons() -> list[Comparison]:
    """What the identity does at each depth, and what depth does with and without it."""
    shallow, deep = DEPTHS
    return [
        Comparison(f"identity, {depth} blocks, {name}", f"{depth}-{name}-I", f"{depth}-{name}-none")
        for name in ARITHMETICS
        for depth in DEPTHS
    ] + [
        Comparison(
            f"{deep} instead of {shallow} blocks, {name}, identity {identity}",
            f"{deep}-{name}-{identity}",
            f"{shallow}-{name}-{identity}",
        )
        for name in ARITHMETICS
        for identity in ("none", "I")
    ]
