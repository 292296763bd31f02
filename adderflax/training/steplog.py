"""Reading the figures of each update: finite or stop, the progress bar, the log, the throughput."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from adderflax.training.metrics import MetricsWriter


class DivergenceError(RuntimeError):
    """The loss, the gradient or the parameters are no longer finite.

    Attributes:
      step: the update.
      batch: the host batch whose loss or gradient is not finite; None where it is something else.
    """

    def __init__(self, message: str, *, step: int | None = None, batch: dict[str, np.ndarray] | None = None):
        super().__init__(message)
        self.step, self.batch = step, batch


def progress_bar(*arguments: Any, **keywords: Any) -> tqdm:
    """tqdm's bar: a log file gets a line now and then, a terminal a moving bar."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(*arguments, dynamic_ncols=True, mininterval=interval, **keywords)


class StepLog:
    """Takes each update's device scalars and reads them one update late.

    While the devices compute update t the host waits for the figures of t - 1 at most, so it is free to
    prepare the next batch. `flush` reads what is left; it is called before anything is saved, so a state
    that is not finite never reaches a checkpoint. A context manager that closes the bar.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        first: int,
        total: int,
        batch_size: int,
        log_every: int,
        allowed_skips: int,
        progress: bool,
    ):
        """Starts the bar and the clock.

        Args:
          writer: where the log goes.
          first: updates already done.
          total: updates of the whole run.
          batch_size: examples of one update.
          log_every: write a line every so many updates.
          allowed_skips: how many updates of the whole run may be left out.
          progress: whether to draw a bar.
        """
        self._writer, self._batch_size, self._log_every = writer, batch_size, log_every
        self._total, self._allowed_skips = total, allowed_skips
        self._bar = progress_bar(initial=first, total=total, unit="step", disable=not progress)
        self._pending: tuple | None = None
        self._since: float | None = None
        self._steps = 0
        self._seconds = 0.0

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def images_per_second(self) -> float | None:
        """Training throughput without compilation, evaluation and saving; None before the second update."""
        return self._steps * self._batch_size / self._seconds if self._seconds else None

    def push(self, step: int, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
        """Takes the figures of update `step` on the host batch `batch`, and reads the previous ones.

        Raises:
          DivergenceError: the previous update was not finite and could not be left out.
        """
        self.flush()
        self._pending = (step, metrics, batch)

    def flush(self) -> None:
        """Reads the figures that are still on the devices.

        Raises:
          DivergenceError: the update was not finite and could not be left out.
        """
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped, learning_rate = int(figures.pop("skipped")), figures.pop("learning_rate")
        finite = bool(figures.pop("finite"))
        self._tick()
        if not finite:
            if skipped > self._allowed_skips:
                raise DivergenceError(_not_finite(step, figures), step=step, batch=batch)
            self._writer.write(step, skipped_updates=skipped)
            told = _not_finite(step, figures)
            self.note(f"{told} It is left out, as number {skipped} of at most {self._allowed_skips}.")
            self._bar.update()
            return
        speed = self.images_per_second
        self._bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.3f}"
            + (f", {speed:.0f} images/s" if speed else ""),
            refresh=False,
        )
        self._bar.update()
        if step % self._log_every == 0 or step == self._total:
            line = {f"train_{name}": value for name, value in figures.items()}
            line["learning_rate"] = learning_rate
            if speed:
                line["images_per_second"] = speed
            self._writer.write(step, **line)

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes the figures of an evaluation after update `step`.

        Raises:
          DivergenceError: one is not finite.
        """
        if not all(math.isfinite(value) for value in scores.values()):
            raise DivergenceError(_not_finite(step, scores), step=step)
        self._writer.write(step, **scores)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the throughput clock, for evaluation and saving."""
        begun = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - begun

    def _tick(self) -> None:
        now = time.monotonic()
        # The first update of a process compiles; the clock starts when it is done.
        if self._since is not None:
            self._steps += 1
            self._seconds += now - self._since
        self._since = now


def _not_finite(step: int, figures: dict[str, float]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in figures.items())
    return f"Update {step} is not finite: {told}."
