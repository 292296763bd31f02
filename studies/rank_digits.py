"""Does the identity restore the rank that additions lose? Digits, 8x8 pixels.

The abstract of the paper says that the rank of the attention map is not preserved by additions
alone and that adding I to the map restores it. Here {dot, L1} similarity x {no identity, identity}
x {multiplying, adder} linear layers are trained with all else equal: size, schedule, augmentation,
a normalization behind every linear layer, no biases, the output projection in the arithmetic of the
other linear layers; patch embedding and head multiply. Rows are named similarity-identity-linear
layers.

L1 and dot product also differ in temperature. For unit-normal queries and keys the scaled L1
similarity varies within a row with standard deviation 0.88, the scaled dot product with 1.0: what
depends on the query alone cancels in the softmax. `dotcool` is the dot product at scale 0.88 /
sqrt(d), `l1hot` the L1 similarity at 1 / 0.88 of its scale. What remains between `l1` and
`dotcool`, and between `l1hot` and `dot`, is not the temperature at initialization.

What this can show: differences in a small model on a small set, for these seeds and one learning
rate. What it cannot: that they carry over to other sets, sizes or schedules.
"""

import math
from typing import Any

from adderflax.analysis.study import Comparison, Run

# Deviation within a row of the scaled L1 similarity, for any head width:
# sqrt((2 - E[m(q)^2]) / (2 (1 - 2 / pi))), where m(q) = E_k |q - k| and q, k ~ N(0, 1).
L1_SPREAD = 0.8809


def runs() -> list[Run]:
    """The eight cells and four controls of temperature."""
    # The configuration's 80 epochs would take more than the 90 s that a run may take on two cores.
    return rank_runs("configs/digits_adder_vit.py:adder", head_width=16, overrides={"epochs": 60.0})


def rank_runs(config: str, *, head_width: int, overrides: dict[str, Any]) -> list[Run]:
    """The runs on any configuration of an adder ViT.

    Args:
      config: the configuration file, in the preset "adder".
      head_width: its embed_dim / num_heads.
      overrides: fields that all runs change.
    """
    l1_scale = 1 / math.sqrt(2 * head_width * (1 - 2 / math.pi))
    similarities = {
        "dot": {"model.similarity": "dot"},
        "l1": {"model.similarity": "l1"},
        "dotcool": {
            "model.similarity": "dot",
            "model.attention_scale": L1_SPREAD / math.sqrt(head_width),
        },
        "l1hot": {"model.similarity": "l1", "model.attention_scale": l1_scale / L1_SPREAD},
    }
    cells = [(similarity, linear) for linear in ("multiply", "adder") for similarity in ("dot", "l1")]
    controls = [("dotcool", "adder"), ("l1hot", "adder")]
    return [
        Run(
            name=f"{similarity}-{'I' if identity else 'none'}-{linear}",
            config=config,
            overrides=overrides
            | similarities[similarity]
            | {
                "model.identity": identity,
                "model.linear": linear,
                "model.output_projection": linear,
            },
        )
        for similarity, linear in cells + controls
        for identity in (False, True)
    ]


def comparisons() -> list[Comparison]:
    """The effects of identity, similarity, temperature and linear layers."""
    arithmetics, similarities, identities = ("multiply", "adder"), ("dot", "l1"), ("none", "I")
    found = [
        Comparison(
            f"identity, with {similarity} and {linear} layers",
            f"{similarity}-I-{linear}",
            f"{similarity}-none-{linear}",
        )
        for linear in arithmetics
        for similarity in similarities
    ]
    found += [
        Comparison(
            f"L1 instead of dot, identity {identity}, {linear} layers",
            f"l1-{identity}-{linear}",
            f"dot-{identity}-{linear}",
        )
        for linear in arithmetics
        for identity in identities
    ]
    for identity in identities:
        where = f"identity {identity}, adder layers"
        l1, dot = f"l1-{identity}-adder", f"dot-{identity}-adder"
        cool, hot = f"dotcool-{identity}-adder", f"l1hot-{identity}-adder"
        found.append(Comparison(f"L1 instead of dot, both at L1's temperature, {where}", l1, cool))
        found.append(Comparison(f"L1 instead of dot, both at dot's temperature, {where}", hot, dot))
    found += [
        Comparison(
            f"adder instead of multiplying layers, with {similarity}, identity {identity}",
            f"{similarity}-{identity}-adder",
            f"{similarity}-{identity}-multiply",
        )
        for similarity in similarities
        for identity in identities
    ]
    return found
