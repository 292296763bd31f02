"""Programs compiled for TPUs by the TPU's own compiler, without a TPU.

Loading libtpu changes what a process is, so this runs in one of its own (`results`), or by hand:

    python tests/operators/tpu_compiler.py v5e:2x2 dense heads
    python tests/operators/tpu_compiler.py v6e:2x2 --schedule forward,1,4096,192,192

The first prints, of each program, the kernels and collectives that it consists of; the second, of
one kernel (method, B, M, K, N), the figures of `schedule`.
"""

import collections
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def unavailable() -> str | None:
    """Why nothing can be compiled for TPUs here, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (pip install libtpu)"


def results(topology: str, *arguments: str) -> dict:
    """Runs this file in a new process and returns what it prints."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # libtpu asks neither a metadata server nor its neighbors, and may be loaded twice.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, "--compile", topology, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the programs: each takes the devices of a topology and returns what to compile ----


def _value_and_gradients(x, y, implementation=None):
    import jax
    import jax.numpy as jnp

    from adderflax.operators import adder_matmul

    multiply = functools.partial(adder_matmul, grad_y="hardtanh", implementation=implementation)
    out, vjp = jax.vjp(multiply, x, y)
    return out, *vjp(jnp.sin(out))


def _single(shape_x, shape_y, dtype, devices, implementation=None):
    import jax

    place = jax.sharding.SingleDeviceSharding(devices[0])
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in (shape_x, shape_y)]
    return jax.jit(functools.partial(_value_and_gradients, implementation=implementation)).lower(*operands)


def _shard_map(check_vma, devices):
    import jax
    from jax.sharding import PartitionSpec

    mesh = _mesh(devices, ("data",), (4,), "Auto")
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(x, y):
        out, dx, dy = _value_and_gradients(x, y)
        return out, dx, dy if check_vma else jax.lax.psum(dy, "data")

    out_specs = (rows, rows, whole)
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole), out_specs=out_specs, check_vma=check_vma)
    return jax.jit(run).lower(*_cut(mesh, rows, whole))


def _partitioned(names, shape, axis_type, spec_y, devices):
    import jax
    from jax.sharding import PartitionSpec

    mesh = _mesh(devices, names, shape, axis_type)
    with jax.set_mesh(mesh):
        return jax.jit(_value_and_gradients).lower(*_cut(mesh, PartitionSpec("data"), PartitionSpec(*spec_y)))


def _mesh(devices, names, shape, axis_type):
    import jax

    types = (getattr(jax.sharding.AxisType, axis_type),) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def _cut(mesh, *specs):
    import jax

    return [
        jax.ShapeDtypeStruct(shape, "float32", sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec in zip(((1024, 64), (64, 256)), specs)
    ]


def _train_step(devices):
    import jax
    import jax.numpy as jnp
    import optax

    from adderflax.models import VisionTransformer, VisionTransformerConfig
    from adderflax.training import sharding
    from adderflax.training.state import abstract_state, make_train_step

    config = VisionTransformerConfig(
        image_size=24, patch_size=4, num_classes=10, embed_dim=64, depth=1, num_heads=2
    )
    model, optimizer = VisionTransformer(config), optax.sgd(0.1)
    mesh = sharding.make_mesh(devices)

    def augment(key, images, labels):
        return images.astype(jnp.float32) / 255, jax.nn.one_hot(labels, 10)

    rows = sharding.batch_sharding(mesh)
    shape = (128, config.image_size, config.image_size, config.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    with jax.set_mesh(mesh):
        step = make_train_step(model, optimizer, augment, schedule=optax.constant_schedule(0.1), mesh=mesh)
        return step.lower(abstract_state(model, optimizer, with_ema=False, mesh=mesh), batch)


def _attention(batch, tokens, heads, depth, devices, implementation="tpu"):
    import jax

    from adderflax.operators import adder_attention

    place = jax.sharding.SingleDeviceSharding(devices[0])
    operands = [jax.ShapeDtypeStruct((batch, tokens, heads, depth), "float32", sharding=place)] * 4

    def run(query, key, value, g):
        attend = functools.partial(adder_attention, implementation=implementation)
        out, vjp = jax.vjp(attend, query, key, value)
        return out, *vjp(g)

    return jax.jit(run).lower(*operands)


PROGRAMS = {
    "dense": functools.partial(_single, (512, 128), (128, 256), "float32"),
    "ragged": functools.partial(_single, (509, 150), (150, 67), "bfloat16"),
    "heads": functools.partial(_single, (128, 33, 32), (128, 32, 33), "bfloat16"),
    "shard_map": functools.partial(_shard_map, True),
    "shard_map without vma": functools.partial(_shard_map, False),
    "named sharding": functools.partial(_partitioned, ("data",), (4,), "Auto", ()),
    "explicit sharding": functools.partial(_partitioned, ("data",), (4,), "Explicit", ()),
    "columns cut too": functools.partial(_partitioned, ("data", "model"), (2, 2), "Auto", (None, "model")),
    "train step": _train_step,
    "attention 197": functools.partial(_attention, 8, 197, 6, 64),
    "attention 1025": functools.partial(_attention, 2, 1025, 3, 64),
    "composed attention 65": functools.partial(_attention, 32, 65, 3, 64, implementation="xla"),
}


def _contents(program: str) -> dict[str, int]:
    """How often each kernel and each collective occurs in a compiled program."""
    kernels = re.findall(r"%(adder_[a-z_]+)[.\d]* = [^\n]*custom_call_target=\"tpu_custom_call\"", program)
    collectives = re.findall(r" = [^\n]*? (all-reduce|all-gather|all-to-all)(?:-start)?\(", program)
    return dict(collections.Counter(kernels + collectives))


def has_map(program: str, tokens: int) -> bool:
    """Whether an array has tokens x tokens or more in its last dimensions, filled up or not."""
    shapes = re.findall(r"\b(?:f32|bf16)\[(?:\d+,)*(\d+),(\d+)\]", program)
    return any(min(map(int, shape)) >= tokens for shape in shapes)


# ---- the compiler's schedule of a kernel ----


def schedule(devices, method: str, batch: int, m: int, k: int, n: int) -> dict:
    """What the compiler made of the innermost loop of a kernel; a bundle is issued each cycle.

    Returns:
        kernel: its family. loop: bundles of the body. useful: share of the four vector slots that
        the terms themselves take there. filled: share of the computed terms that exist. cycles:
        that the kernel takes by the cost model (`_tpu_blocks`, `_tpu_batch`), fitted to schedules of
        whole kernels, and no fewer than its innermost loop. whole: share of the slots that the terms
        take in these.
    """
    import jax

    from adderflax.operators import _tpu, _tpu_batch, _tpu_blocks, _tpu_matrix
    from adderflax.operators._tpu_common import LANES, SUBLANES, ceil_div
    from adderflax.operators.rules import Rule

    rule = () if method == "forward" else (Rule("hardtanh"),)
    shapes = ((batch, m, k), (batch, k, n)) + ((batch, m, n),) * len(rule)
    place = jax.sharding.SingleDeviceSharding(devices[0])
    operands = [jax.ShapeDtypeStruct(shape, "float32", sharding=place) for shape in shapes]
    forms = getattr(_tpu_matrix, f"{method}_forms")(*shapes[:2], *rule)
    cycles = _tpu._cycles(forms, *operands[:2])
    operations = 4 if rule else 3
    if cycles[0] <= cycles[1]:
        kernel, problem = _tpu_matrix, _tpu_matrix.cheapest(forms)
        _, rows, lane_tiles = _tpu_blocks.choose_tile(problem)
        steps = min(problem.depth, _tpu_blocks.CHUNK)
        registers = rows // SUBLANES * lane_tiles
        padded = ceil_div(problem.rows, rows) * rows * ceil_div(problem.lanes, lane_tiles * LANES)
        computed = batch * padded * lane_tiles * LANES * problem.depth
    elif method == "gradient_y":
        raise ValueError("gradient_y of a batch sums 24 rows at a time, too few for a loop to be found by")
    else:
        kernel, steps = _tpu_batch, _tpu_batch._UNROLL
        sizes = (_tpu_batch.gradient_sizes if rule else _tpu_batch.forward_sizes)(m, k, n)
        registers = sizes.tile_rows * sizes.tile_depth
        rows = ceil_div(m, sizes.tile_rows) * sizes.tile_rows
        computed = ceil_div(batch, LANES) * LANES * rows * (sizes.k * n if rule else k * sizes.n)
    ideal = steps * registers * operations / 4

    run = functools.partial(getattr(kernel, method), **({"rule": rule[0]} if rule else {}))
    jax.jit(lambda *arrays: run(*arrays)).lower(*operands).compile()
    (dump,) = [
        path
        for path in Path(os.environ["TPU_DUMP"]).glob("*adder*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    ]
    loop = min(bundles for bundles in _runs(dump.read_text()) if bundles >= ideal)
    terms = batch * m * k * n
    lanes = LANES * SUBLANES
    cycles = max(min(cycles), computed / lanes * loop / (steps * registers))
    return {
        "kernel": kernel.__name__.rsplit(".")[-1],
        "loop": loop,
        "useful": round(ideal / loop, 3),
        "filled": round(terms / computed, 3),
        "cycles": round(cycles),
        "whole": round(terms / lanes * operations / 4 / cycles, 3),
    }


def _runs(bundles: str) -> list[int]:
    """Lengths of the stretches of bundles at one depth of loops."""
    depths = [line.count(">") for line in re.findall(r"(?m)^\s*0x[0-9a-f]+\s*\w*\s*:([ >]*)\{", bundles)]
    edges = [0, *(i for i in range(1, len(depths)) if depths[i] != depths[i - 1]), len(depths)]
    return [end - start for start, end in zip(edges, edges[1:])]


def _compile(topology: str, *arguments: str) -> dict:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    if arguments[0] == "--schedule":
        method, *lengths = arguments[1].split(",")
        return schedule(devices, method, *map(int, lengths))
    found = {}
    for name in arguments:
        program = PROGRAMS[name](devices).compile().as_text()
        found[name] = _contents(program)
        if "attention" in name:
            found[name]["map"] = has_map(program, int(name.rsplit(" ")[-1]))
    return found


def main(arguments: list[str]) -> None:
    if arguments[0] != "--compile":
        print(json.dumps(results(*arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="tpu-schedule-") as directory:
        if "--schedule" in arguments:
            os.environ["TPU_DUMP"] = directory
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        print(json.dumps(_compile(*arguments[1:])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
