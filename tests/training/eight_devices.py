"""Run by test_sharding.py in a process of its own with 8 CPU devices: prints figures as one JSON line.

    eight_devices.py WORKDIR NAME...

Three updates of one small run, with everything random in it switched on, on one device and on the named
meshes; compiling is what takes the time. Of the mixed one a checkpoint goes on on another.
"""

import functools
import json
import sys
from unittest import mock

import jax
import numpy as np

from adderflax.analysis.pods import count_collectives
from adderflax.training import sharding
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import default_config
from adderflax.training.trainer import Trainer

STEPS = 3
MIXED = "data 2 x fsdp 2 x tensor 2"
# Devices, mesh, operator implementation; None is XLA's blocked loop, which compiles for longer.
RUNS = {
    "1": (1, {}, "reference"),
    "data 2": (2, {}, "reference"),
    "data 4": (4, {}, "reference"),
    "data 8": (8, {}, "reference"),
    "fsdp 8": (8, {"fsdp": 8}, "reference"),
    "tensor 4": (8, {"tensor": 4}, "reference"),
    MIXED: (8, {"fsdp": 2, "tensor": 2}, None),
}
EVALUATED = ("1", MIXED)


def build(devices, mesh, implementation):
    config = default_config()
    fields = {
        "batch_size": 64,
        "total_steps": 6,
        "ema_decay": 0.9,
        "model.patch_size": 4,
        "model.depth": 1,
        "model.pooling": "mean",
        "model.mlp_kernel_size": 3,
        "model.drop_path_rate": 0.2,
        "model.implementation": implementation,
        "augment.crop_padding": 1,
        "augment.cutmix_alpha": 1.0,
        # Updates proportional to the gradient: Adam's first ones are its sign, rounding errors included.
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.05,
        "optimizer.warmup_fraction": 0.0,
    } | {f"mesh.{name}": size for name, size in mesh.items()}
    config.update_from_flattened_dict({k: v for k, v in fields.items() if v is not None})
    make_mesh = functools.partial(sharding.make_mesh, jax.devices()[:devices])
    with mock.patch.object(sharding, "make_mesh", make_mesh):
        return Trainer(config)


def flat(tree):
    """A tree's leaves by their paths; of a random key its numbers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    keys = jax.dtypes.prng_key
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, keys) else leaf
        )
        for path, leaf in leaves
    }


def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def put(state, mesh):
    """A state from the host, which spares compiling its initialization once more."""
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    return jax.device_put(state, sharding.resting(jax.eval_shape(lambda: state), mesh), may_alias=False)


def main(workdir, *names):
    figures, final, compiled = {}, {}, {}
    begin = build(*RUNS["1"]).new_state()
    begin = jax.device_get(begin.replace(key=jax.random.key_data(begin.key)))
    for name in ("1", *names):
        run = build(*RUNS[name])
        with jax.set_mesh(run.mesh):
            batches = run.train_batches()
            state = run.new_state() if name in EVALUATED else put(begin, run.mesh)
            batch = sharding.put_batch(next(batches), run.mesh)
            update = run.train_step.lower(state, batch).compile()
            compiled[name] = run, update
            figure = {"collectives": count_collectives(update.as_text()), "losses": []}
            figure["bytes"] = {
                part: bytes_on_a_device(getattr(state, part))
                for part in ("params", "opt_state", "ema_params")
            }
            for step in range(STEPS):
                if step:
                    batch = sharding.put_batch(next(batches), run.mesh)
                state, metrics = update(state, batch)
                figure["losses"].append(float(metrics["loss"]))
            if name in EVALUATED:
                figure["test"] = run.evaluate(state.evaluated_variables, "test")
        final[name] = flat(state)
        figure["far"] = {
            path: float(np.abs(leaf - final["1"][path]).max() / (np.abs(final["1"][path]).max() + 1e-9))
            for path, leaf in final[name].items()
        }
        figures[name] = figure
    if name == MIXED:
        figures["restored"] = go_on(workdir, *compiled[MIXED], state, batches, *compiled["fsdp 8"])
    print(json.dumps(figures))


def go_on(workdir, run, update, state, batches, other, other_update):
    """Saves on one mesh, restores on the other, and compares the next update on both."""
    saved = flat(state)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(STEPS, state, batches, None)
    with jax.set_mesh(run.mesh):
        after, _ = update(state, sharding.put_batch(next(batches), run.mesh))
    with jax.set_mesh(other.mesh), Checkpointer(workdir, read_only=True) as checkpointer:
        batches = other.train_batches()
        restored = checkpointer.restore(other.abstract_state(), batches)
        equal = [np.array_equal(leaf, saved[path]) for path, leaf in flat(restored).items()]
        continued, _ = other_update(restored, sharding.put_batch(next(batches), other.mesh))
    far = [
        float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9))
        for a, b in zip(flat(continued).values(), flat(after).values())
    ]
    return {"equal": all(equal), "far": max(far)}


if __name__ == "__main__":
    main(*sys.argv[1:])
