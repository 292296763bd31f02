"""What lies between a run and the compiler: traces of chosen steps, and programs kept between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from adderflax.training.config import ConfigError


def parse_steps(text: str) -> range:
    """Reads "10:15" as the updates 10 to 15, the last one included, and "10" as that one.

    Raises:
      ConfigError: the text is no such pair, or no update lies in it.
    """
    first, _, last = text.partition(":")
    try:
        steps = range(int(first), int(last or first) + 1)
    except ValueError:
        steps = range(0)
    if not steps or steps[0] < 1:
        raise ConfigError(
            f"--profile_steps={text} names no updates to profile: give the first and the last one, counted"
            " from 1, such as --profile_steps=10:15, or a single one."
        )
    return steps


def profiled(steps: range, chosen: range | None, workdir: str | Path) -> Iterator[int]:
    """Goes through `steps` and writes a `jax.profiler` trace of those that are also in `chosen`.

    The trace lies under ``workdir/profile``: ``*.xplane.pb`` for TensorBoard and XProf, ``*.trace.json.gz``
    for ui.perfetto.dev. The devices are waited for at its beginning and its end, so that it holds those
    updates and only those.

    Args:
      steps: the updates of this process.
      chosen: which of them to trace; None traces none.
      workdir: the run's directory.

    Yields:
      Each of `steps`. The trace ends with the last of them or when the generator is closed: where an error
      may end the loop, give it to `contextlib.closing`, or a traceback keeps it open.
    """
    directory = Path(workdir) / "profile"
    wanted = range(max(steps.start, chosen.start), min(steps.stop, chosen.stop)) if chosen else range(0)
    if chosen and not wanted:
        print(
            f"No update is profiled: {chosen.start} to {chosen.stop - 1} are not among this process's"
            f" {steps.start} to {steps.stop - 1}",
            flush=True,
        )
    with contextlib.ExitStack() as trace:
        for step in steps:
            if wanted and step == wanted.start:
                _wait_for_devices()
                jax.profiler.start_trace(str(directory))
                trace.callback(jax.profiler.stop_trace)
            if step in wanted:
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    yield step
            else:
                yield step
            if wanted and step == wanted.stop - 1:
                _wait_for_devices()
                trace.close()
                print(f"Profile of updates {wanted.start} to {step} in {directory}", flush=True)


def keep_compiled_programs() -> Path | None:
    """Turns JAX's persistent compilation cache on, for every command that computes with a model.

    Programs that took a second or more to compile are kept in ``$JAX_COMPILATION_CACHE_DIR`` where that is
    set, else in ``adderflax/jax`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. JAX's key covers its own
    version, the compiler's flags, the devices and, on a CPU, its instruction set, so that machines can share
    a home directory. ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off; the directory may be deleted at any
    time.

    Returns:
      The directory, or None where there is none: the cache is off, or no directory can be written.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:  # a path or an address, which JAX opens by itself
        return Path(jax.config.jax_compilation_cache_dir)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The specification wants a path that is not absolute to be passed over.
        directory = (cache if cache.is_absolute() else Path.home() / ".cache") / "adderflax" / "jax"
        # What is in it is run: nobody else may write there.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home is known
        return None
    if not os.access(directory, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _wait_for_devices() -> None:
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
