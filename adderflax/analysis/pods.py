"""A run's update compiled for a TPU pod by the real TPU compiler, on a machine that has no TPU.

libtpu compiles for a described topology; what comes back cannot be run, but its memory and its
collectives are those of the program that the pod would run.
"""

import collections
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adderflax.analysis.configured import image_set
from adderflax.models.families import build_model
from adderflax.training import sharding
from adderflax.training.config import ConfigDict, ConfigError, RunConfig, as_config_error
from adderflax.training.state import abstract_state
from adderflax.training.update import configured_update

GIB = 2**30
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


class Pod(NamedTuple):
    """A slice of TPUs.

    Attributes:
      topology: its name for libtpu.
      memory: HBM of one chip in bytes.
    """

    topology: str
    memory: int


PODS = {
    "v5e-16": Pod("v5e:4x4", 16 * GIB),
    "v5e-256": Pod("v5e:16x16", 16 * GIB),
    "v6e-64": Pod("v6e:8x8", 32 * GIB),
}
# Of a run; their number decides only constants of the program.
_STEPS = 1000
# The smallest slice that has collectives, for trials.
SMALLEST = {"v5e-4": Pod("v5e:2x2", 16 * GIB)}


def missing_compiler() -> str | None:
    """Why nothing can be compiled for TPUs here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return (
            "libtpu, the TPU compiler, is not installed here; `pip install libtpu` at the version that"
            " jax[tpu] asks for brings it, for Linux on x86, and no TPU is needed"
        )
    return None


def versions() -> dict[str, str]:
    """Versions of what decides the outcome."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def compile_update(config: ConfigDict, pod_name: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Compiles the update of a configured run for a pod.

    Chooses JAX's platform and sets environment variables that libtpu reads when it is first loaded: call it
    in a process of its own.

    Args:
      config: the run; its data set is not opened.
      pod_name: one of `PODS` or `SMALLEST`.
      known: rows of earlier calls; the one of the same program and compiler is returned at once.

    Returns:
      A row: program (a fingerprint), kernels (calls of Pallas kernels in it), libtpu and jax (versions),
      pod, chips, batch_per_chip, parameters; arguments, temporaries and memory of one chip in bytes;
      collectives as {kind: [count, bytes of the results on one chip]}; seconds of compilation. Where the
      compiler refuses the program for want of memory, "refused" holds its reason and the figures of the
      compiled program are missing.

    Raises:
      ConfigError: the configuration cannot be run on that many chips.
    """
    os.environ.update(
        # libtpu asks neither a metadata server nor its neighbors, and may be loaded twice.
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    pod = (PODS | SMALLEST)[pod_name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology).devices
    run = RunConfig.parse(config)
    if run.distillation.teacher is not None:
        raise ConfigError(
            f"distillation.teacher={run.distillation.teacher!r} computes on every batch too, which would be"
            " left out here: only runs without a teacher are compiled ahead of time."
        )
    model = build_model(run.model_config(image_set(run.data)))
    with as_config_error():
        mesh = sharding.make_mesh(devices, run.mesh)
        sharding.require_divisible(run.batch_size, mesh, run.accumulation_steps)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered, state = _lower(run, model, mesh)
    program = lowered.as_text()
    row = versions() | {
        "program": hashlib.sha256(program.encode()).hexdigest()[:16],
        "kernels": program.count("tpu_custom_call"),
        "pod": pod_name,
        "chips": len(devices),
        "batch_per_chip": run.batch_size / sharding.batch_shares(mesh),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "memory": pod.memory,
    }
    for other in known:
        if all(other[name] == row[name] for name in ("program", "libtpu", "pod")):
            return other | row
    begun = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"refused": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    return row | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": count_collectives(compiled.as_text()),
        "seconds": round(time.monotonic() - begun),
    }


def _lower(run, model, mesh):
    info = image_set(run.data)
    update = configured_update(run, model, info, mesh, _STEPS)
    state = abstract_state(model, update.optimizer, with_ema=run.ema_decay > 0, mesh=mesh)
    rows = sharding.batch_sharding(mesh)
    images = (run.batch_size, info.image_size, info.image_size, info.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(images, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((run.batch_size,), jnp.int32, sharding=rows),
    }
    return update.step.lower(state, batch), state


def count_collectives(program: str) -> dict[str, list[int]]:
    """Counts the collectives of a compiled program.

    Args:
      program: its HLO, as `as_text` of a compiled function gives it.

    Returns:
      {kind: [count, bytes of the results on one device]}. A collective in a loop counts once.
    """
    counts = collections.defaultdict(lambda: [0, 0])
    seen = set()
    for line in program.splitlines():
        found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if not found:
            continue
        result, kind, start = found.groups()
        # A collective that is fused with computation appears in the text once for each of its stages.
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and channel[1] in seen:
            continue
        seen.add(channel and channel[1])
        parts = re.findall(r"(\w+?)(\d+)\[([\d,]*)\]", result)
        if start and kind in ("all-gather", "collective-permute"):
            parts = parts[1:2]  # operand, result, and counters
        counts[kind][0] += 1
        counts[kind][1] += sum(
            int(bits) // 8 * math.prod(map(int, filter(None, shape.split(",")))) for _, bits, shape in parts
        )
    return dict(counts)


def as_page(rows: list[dict[str, Any]], command: str) -> str:
    """The table as a page of its own, with the command and what was measured how."""
    compilers = sorted({f"jax {row['jax']}, libtpu {row['libtpu']}" for row in rows})
    return f"""# What ImageNet runs take on TPU pods

    {command}

Compiled ahead of time by the TPU compiler ({"; ".join(compilers)}), not run. Each row is the whole update
of a configuration: augmentation on the device, forward, backward, optimizer. The batch is that of the
configuration, over all chips. Arguments are state and batch, temporaries everything else in HBM at its
fullest; bytes of a collective are those of its results on one chip. The last column divides the HBM that
the arguments leave by the temporaries of one example: an estimate, on which the compiler has the last word.

{as_table(rows)}
"""


def as_table(rows: list[dict[str, Any]]) -> str:
    """The table of rows that carry their "config" too; sizes are those of one chip."""
    lines = [
        "| configuration | parameters | pod | batch a chip | arguments | temporaries | of HBM |"
        " collectives of one update, bytes on a chip | batch a chip that fits, about |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        start = f"| {row['config']} | {parameters} | {row['pod']} | {row['batch_per_chip']:g} |"
        if "refused" in row:
            lines.append(f"{start} does not fit: {row['refused']} | | | | |")
            continue
        used = (row["arguments"] + row["temporaries"]) / row["memory"]
        collectives = ", ".join(
            f"{kind} {count} x, {_size(total)}" for kind, (count, total) in sorted(row["collectives"].items())
        )
        lines.append(
            f"{start} {_size(row['arguments'])} | {_size(row['temporaries'])} | {used:.1%} |"
            f" {collectives} | {largest_batch(row, rows)} |"
        )
    return "\n".join(lines)


def largest_batch(row: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Estimated examples that a chip's memory holds.

    Temporaries grow with the batch; what they take for one example is read off the row of the same
    configuration with the most of them on a chip, because small batches lie in VMEM for a large part.
    """
    others = [other for other in rows if other["config"] == row["config"] and "temporaries" in other]
    widest = max(others, key=lambda other: other["batch_per_chip"])
    per_example = widest["temporaries"] / widest["batch_per_chip"]
    return math.floor((row["memory"] - row["arguments"]) / per_example)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
