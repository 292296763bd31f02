"""What a run was computed with: one entry of ``workdir/environment.json`` for each start of a process."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import adderflax
from adderflax.files import write_whole

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def record_start(workdir: str | Path, step: int) -> None:
    """Appends this process's environment to ``environment.json``; does nothing but in the first process.

    Args:
      workdir: the run's directory.
      step: the step that this process starts from.
    """
    if jax.process_index():
        return
    file = Path(workdir) / "environment.json"
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entries = [*read_starts(workdir), {"started": started, "step": step} | describe()]
    write_whole(file, json.dumps(entries, indent=1) + "\n")


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """What `record_start` wrote, in order; empty where there is nothing or nothing legible."""
    try:
        return json.loads((Path(workdir) / "environment.json").read_text())
    except (OSError, ValueError):
        # A description of the past is never worth stopping a run for.
        return []


def describe() -> dict[str, Any]:
    """This process's environment, as plain JSON.

    Returns:
      host, system, processor, cores, python, packages (name to version), adderflax (its version), commit (of
      the checkout, or None), devices (kind to number, over all processes) and processes.
    """
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "adderflax": adderflax.__version__,
        "commit": commit(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Name of this machine's processor."""
    try:
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, "+changes" where the library differs from it; None without git."""
    package = Path(adderflax.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside some other checkout.
        if not git("ls-files", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
