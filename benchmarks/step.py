"""A training step's time, split into adder forward, input gradient, weight gradient and the rest.

    python -m benchmarks.step --config configs/digits_adder_vit.py
    python -m benchmarks.step --config configs/cifar10_adder_vit.py --config.batch_size=32 --json

The step is the one that train.py runs, on random images: the data set is not opened. Every adder call of
its program is also timed by itself, on random operands of its shapes; the rest is the difference. Calls
inside of the step share caches with their neighbours, so the split is an estimate and the total is not.
"""

import argparse
import collections
import json
import sys
import time

import jax
import jax.extend
import numpy as np

from adderflax import pipes
from adderflax.analysis.configured import image_set
from adderflax.models.families import build_model
from adderflax.training import sharding
from adderflax.training.command_line import load_config
from adderflax.training.config import ConfigError, RunConfig
from adderflax.training.state import init_state
from adderflax.training.update import configured_update
from benchmarks.timing import alternate, machine

_PARTS = {"": "forward", "_gradient_x": "input gradient", "_gradient_y": "weight gradient"}
_CALLS = {"adder_matmul" + suffix: part for suffix, part in _PARTS.items()}


def split_step(run: RunConfig) -> dict[str, float]:
    """Milliseconds of a step: "step", the parts named in `_PARTS`, "rest", and "first step", not part of it.

    The first step is traced and compiled, or read from the cache of compiled programs, before it runs.
    """
    if run.distillation.teacher is not None:
        raise ConfigError(
            f"distillation.teacher={run.distillation.teacher!r} computes on every batch too, whose time would"
            " count as the rest: time a configuration without a teacher, as configs/cifar10_adder_vit.py."
        )
    info = image_set(run.data)
    model = build_model(run.model_config(info))
    mesh = sharding.make_mesh()
    update = configured_update(run, model, info, mesh, total_steps=1000)
    state = init_state(model, update.optimizer, seed=run.seed, with_ema=run.ema_decay > 0, mesh=mesh)
    random = np.random.default_rng(0)
    shape = (run.batch_size, info.image_size, info.image_size, info.channels)
    batch = {
        "image": random.integers(0, 256, shape, np.uint8),
        "label": random.integers(0, info.num_classes, run.batch_size, np.int32),
    }
    batch = sharding.put_batch(batch, mesh)
    with jax.set_mesh(mesh):
        calls = adder_calls(jax.make_jaxpr(update.step)(state, batch).jaxpr)

        def one_step():
            nonlocal state
            state, metrics = update.step(state, batch)
            return metrics

        begun = time.perf_counter()
        jax.block_until_ready(one_step())
        first = 1e3 * (time.perf_counter() - begun)
        functions = {"step": one_step}
        for key, (function, operands, _) in calls.items():
            functions[key] = lambda function=function, operands=operands: function(*operands)
        seconds = alternate(functions, rounds=7)
    parts = collections.Counter(dict.fromkeys(_PARTS.values(), 0.0))
    for key, (_, _, count) in calls.items():
        parts[_CALLS[key[0]]] += 1e3 * seconds[key] * count
    whole = 1e3 * seconds["step"]
    return {"step": whole, **parts, "rest": whole - sum(parts.values()), "first step": first}


def adder_calls(jaxpr, times: int = 1) -> dict:
    """{(name, shapes, ...): (compiled function, random operands, number of times it runs)}."""
    found = {}
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        if name in _CALLS and "jaxpr" in eqn.params:
            avals = [variable.aval for variable in eqn.invars]
            key = (name, *(f"{aval.dtype}{aval.shape}" for aval in avals), str(eqn.params["jaxpr"].jaxpr))
            if key in found:
                found[key] = (*found[key][:2], found[key][2] + times)
                continue
            operands = [
                jax.random.normal(jax.random.key(i), aval.shape).astype(aval.dtype)
                for i, aval in enumerate(avals)
            ]
            found[key] = (jax.jit(jax.extend.core.jaxpr_as_fun(eqn.params["jaxpr"])), operands, times)
            continue
        repeats = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            for key, (function, operands, count) in (
                adder_calls(inner, repeats).items() if hasattr(inner, "eqns") else ()
            ):
                before = found.get(key, (function, operands, 0))
                found[key] = (*before[:2], before[2] + count)
    return found


@pipes.reader_may_leave()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="configs/X.py; --config.a.b=value overrides a field")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    try:
        run = RunConfig.parse(load_config(options.config, overrides))
        figures = split_step(run)
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps({"machine": machine(), "config": options.config, "milliseconds": figures}))
        return 0
    print(f"{options.config} {' '.join(overrides)}: ms a step of {run.batch_size} images")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine().items()))
    for name, value in figures.items():
        share = "" if "step" in name else f"{100 * value / figures['step']:6.1f} %"
        print(f"{name:16s} {value:9.2f} {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
