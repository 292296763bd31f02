"""What closes the gap between an adder ViT and its multiplying twin, on the digits.

The tools of `studies/gap_cifar10.py` on the model, schedule and augmentation of
`configs/digits_adder_vit.py`, whose learning rate is 3e-3: screened over 30 epochs with one seed
(`screen-...`), the best three over 80 with three (`final-...`), beside `multiply` and `vit`; and, so that the
lesson is no advantage unseen, the twin with the same help. One of the 359 test images is 0.28 points.
Run it with `--keep_checkpoints`: later rows read those of `final-multiply-seed0`.
"""

from typing import Any

from adderflax.analysis.study import Comparison, Run
from studies.gap_cifar10 import TOOLS, against_twins, lessons, rows

CONFIG = "configs/digits_adder_vit.py"
LESSONS = lessons("gap_digits")
RATES = {"": {}, "-lr1": {"optimizer.learning_rate": 1e-3}, "-lr6": {"optimizer.learning_rate": 6e-3}}
SCREENED: dict[str, dict[str, Any]] = {
    **{f"{name}{rate}": changes for name in ("multiply", "vit", "adder") for rate, changes in RATES.items()},
    **TOOLS,
    **{f"adder-{name}": changes for name, changes in LESSONS.items()},
    "adder-warm-features": LESSONS["warm"] | LESSONS["features"],
    "adder-power": {"model.power_activation": True},
    "adder-anneal": {"anneal_fraction": 0.2},
}
FINALS: dict[str, dict[str, Any]] = {
    "multiply": {},
    "vit": {},
    "adder-features": LESSONS["features"],
    "adder-warm": LESSONS["warm"],
    "adder-warm-features": LESSONS["warm"] | LESSONS["features"],
}
# The same help for the multiplying twin.
CONTROLS = {"multiply-warm-features": LESSONS["warm"] | LESSONS["features"]}


def runs() -> list[Run]:
    """The final runs, the teacher first, and the screening runs."""
    once = {"eval_every": 10_000, "checkpoint_every": 10_000}
    return rows("final", CONFIG, FINALS | CONTROLS, (0, 1, 2), once) + rows(
        "screen", CONFIG, SCREENED, (0,), once | {"epochs": 30.0}
    )


def comparisons() -> list[Comparison]:
    """Every tool against the plain adder model, and the final adder models against both twins."""
    names = [name for name in SCREENED if name.startswith("adder-")]
    return [Comparison(name, f"screen-{name}", "screen-adder") for name in names] + against_twins(FINALS)
