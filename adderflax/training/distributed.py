"""Several processes as one run: joining them, and letting the first one go first."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_Result = TypeVar("_Result")
# How long the others wait for the first process, which may have to download and prepare a data set.
_PATIENCE_HOURS = 24


class DistributedError(RuntimeError):
    """Processes that do not find each other, or of which the first one has failed."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of its run; the first thing to do, before any device is asked for.

    Afterwards `jax.devices` are the devices of all processes. Only the first process keeps its standard
    output; errors of all go to standard error.

    Args:
      coordinator_address: HOST:PORT at which the first process listens; None, like the other arguments,
        where the cluster tells: Cloud TPU, Slurm, Open MPI, Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      DistributedError: nothing tells who the others are, or they do not answer.
    """
    # It would swallow SIGTERM, also where nobody asks it: while data is prepared, or programs are compiled.
    # `adderflax.training.preemption` hears signals in the loop, and agrees on the step among the processes.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (IndexError, ValueError, RuntimeError) as error:  # an address without a port: IndexError
        raise DistributedError(
            f"This process cannot join the others of a distributed run: {str(error).splitlines()[0]} On Cloud"
            " TPU, Slurm and Open MPI --distributed suffices; elsewhere start the same command in every"
            " process with --coordinator_address=HOST:PORT (of the first one), --num_processes=N and"
            " --process_id=0 to N - 1. Without these flags a run takes this machine's devices alone."
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def of_first_process(found: int) -> int:
    """What the first process has found: another host may see a shared directory as it was before."""
    return found if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(found)))


def first_process_first(action: Callable[[], _Result], name: str) -> _Result:
    """Does something in the first process while the others wait, then in them.

    Args:
      action: what to do.
      name: of the action, the same in all processes.

    Returns:
      What `action` returned in this process.

    Raises:
      DistributedError: in the others, where it failed in the first one, which raises what `action` raised.
    """
    if jax.process_count() == 1:
        return action()
    failure = result = None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    # By the coordinator and not by a collective, which would hold the devices and give up sooner.
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"adderflax_{name}", timeout_ms=_PATIENCE_HOURS * 3_600_000)
    failed = of_first_process(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise DistributedError("The first process of the run has failed; its message tells why.")
    return action() if jax.process_index() else result
