"""Meshes: what lies where, equal figures on all of them, light communication, checkpoints across meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from eight_devices import EVALUATED, MIXED, RUNS
from jax.sharding import PartitionSpec as P

from adderflax.training import sharding
from adderflax.training.config import ConfigError, default_config
from adderflax.training.sharding import MeshConfig
from adderflax.training.trainer import Trainer, train

# Gradients on several devices are sums in another order. After three updates parameters and averages differ
# by at most this share of their tensor's largest entry, and so do losses.
TOLERANCE = 1e-4
# The same axes on fewer devices; test_trainer.py compares two with one in every run of the tests.
FEWER = ("data 2", "data 4")
KINDS = tuple(name for name in RUNS if name not in ("1", *FEWER))


def measure(workdir, names):
    """What eight_devices.py prints."""
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("eight_devices.py")
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=8")
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": flags}
    command = [sys.executable, str(script), str(workdir), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Of a mesh of each kind."""
    return measure(tmp_path_factory.mktemp("mixed"), KINDS)


def assert_computes_what_one_device_does(figures, name):
    assert max(figures[name]["far"].values()) < TOLERANCE
    np.testing.assert_allclose(figures[name]["losses"], figures["1"]["losses"], rtol=TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_every_mesh_computes_what_one_device_does(figures, name):
    assert_computes_what_one_device_does(figures, name)


@pytest.mark.slow
def test_fewer_devices_compute_what_one_does(tmp_path):
    figures = measure(tmp_path, FEWER)
    for name in FEWER:
        assert_computes_what_one_device_does(figures, name)


def test_evaluation_counts_every_image_once(figures):
    alone, test = (figures[name]["test"] for name in EVALUATED)
    assert test["test_examples"] == alone["test_examples"] == 359
    assert abs(test["test_accuracy"] - alone["test_accuracy"]) < 1.5 / 359  # one image may lie on the border
    np.testing.assert_allclose(test["test_loss"], alone["test_loss"], rtol=TOLERANCE)


def test_data_parallelism_sums_gradients_and_moves_nothing_else(figures):
    collectives = figures["data 8"]["collectives"]
    parameters = figures["data 8"]["bytes"]["params"]
    assert not collectives.keys() - {"all-reduce", "collective-permute"}
    assert parameters <= collectives["all-reduce"][1] < 1.02 * parameters
    # CutMix's neighbor of the first image on each device.
    assert collectives["collective-permute"][1] < 8 * 8 * 4 * 4


def test_fsdp_gathers_parameters_once_and_no_activations(figures):
    collectives = figures["fsdp 8"]["collectives"]
    parameters = figures["data 8"]["bytes"]["params"]
    assert collectives["all-gather"][1] <= parameters
    reduced = sum(collectives.get(kind, [0, 0])[1] for kind in ("all-reduce", "reduce-scatter"))
    assert reduced < 1.05 * parameters


@pytest.mark.parametrize("part", ["params", "opt_state", "ema_params"])
def test_what_rests_on_a_device(figures, part):
    whole = figures["1"]["bytes"][part]
    assert figures["data 8"]["bytes"][part] == whole
    # An eighth and a quarter of the matrices; vectors and the depthwise convolution, 12 % of this small
    # model, stay whole.
    assert figures["fsdp 8"]["bytes"][part] < 0.24 * whole
    assert figures[MIXED]["bytes"][part] < 0.32 * whole


def test_a_checkpoint_goes_on_on_another_mesh(figures):
    assert figures["restored"]["equal"]
    assert figures["restored"]["far"] < TOLERANCE


def specs(tree, fsdp, tensor):
    mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), sharding.AXES)
    placed = sharding.resting(tree, mesh)
    return [leaf.spec for leaf in jax.tree.leaves(placed)]


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "tensor", "spec"),
    [
        ("query/adder_kernel", (64, 64), 1, 2, P(None, "tensor")),
        ("fc1/kernel", (64, 256), 1, 2, P(None, "tensor")),
        ("fc1/bias", (256,), 1, 2, P("tensor")),
        ("value/norm/scale", (64,), 1, 2, P("tensor")),
        ("out/adder_kernel", (64, 64), 1, 2, P("tensor", None)),
        ("mlp/conv/adder_kernel", (3, 3, 1, 256), 1, 2, P(None, None, None, "tensor")),
        ("mlp/conv/norm/scale", (256,), 1, 2, P("tensor")),
        ("fc2/adder_kernel", (256, 64), 2, 2, P("tensor", "fsdp")),
        ("fc2/norm/bias", (64,), 2, 2, P()),
        ("fc1/adder_kernel", (64, 256), 2, 2, P("fsdp", "tensor")),
        ("fc1/adder_kernel", (64, 256), 2, 1, P(None, "fsdp")),
        ("head/kernel", (64, 1001), 2, 1, P("fsdp", None)),  # the largest axis that divides
        ("head/kernel", (63, 1001), 2, 1, P()),
        ("norm/scale", (64,), 2, 2, P()),
    ],
)
def test_rules(path, shape, fsdp, tensor, spec):
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    # An optimizer's state has its moments under the same names.
    assert specs({"mu": {"block_0": tree}, "block_0": tree}, fsdp, tensor) == [spec, spec]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh.fsdp": 3}, "mesh.data=-1 x mesh.fsdp=3 x mesh.tensor=1 does not fit 2 devices"),
        ({"mesh.data": 4}, "mesh.data=4 x mesh.fsdp=1 x mesh.tensor=1 does not fit 2 devices"),
        ({"mesh.tensor": 0}, "mesh.tensor=0 must be at least 1"),
        ({"mesh.data": -2}, "mesh.data=-2 must be at least 1, or -1 for all"),
        ({"mesh.tensor": 2, "model.num_heads": 1}, "mesh.tensor=2 does not divide the model's num_heads=1"),
        ({"mesh.tensor": 2, "model.mlp_dim": 99}, "mesh.tensor=2 does not divide the model's mlp_dim=99"),
    ],
)
def test_meshes_that_do_not_fit(fields, message):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        Trainer(config)


def test_a_batch_is_cut_over_data_and_fsdp_alone(tmp_path):
    mesh = sharding.make_mesh(config=MeshConfig(tensor=2))
    batch = sharding.put_batch({"image": np.arange(8).reshape(4, 2)}, mesh)["image"]
    assert [shard.data.shape for shard in batch.addressable_shards] == [(4, 2), (4, 2)]
    config = default_config()
    config.update_from_flattened_dict({"mesh.fsdp": 2, "batch_size": 33})
    with pytest.raises(ConfigError, match="batch_size=33 does not divide over 2 devices"):
        train(config, tmp_path, progress=False)
