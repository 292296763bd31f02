"""Reading the figures of each update: finite or stop, the progress bar, the log, the throughput."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from tqdm import tqdm

from adderflax.training.metrics import MetricsWriter


class DivergenceError(RuntimeError):
    """The loss, the gradient or the parameters are no longer finite."""


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
        learning_rate: Callable[[int], float],
        progress: bool,
    ):
        """Starts the bar and the clock.

        Args:
          writer: where the log goes.
          first: updates already done.
          total: updates of the whole run.
          batch_size: examples of one update.
          log_every: write a line every so many updates.
          learning_rate: rate of the update that follows so many updates.
          progress: whether to draw a bar.
        """
        self._writer, self._batch_size, self._log_every = writer, batch_size, log_every
        self._total, self._learning_rate = total, learning_rate
        self._bar = tqdm(
            initial=first,
            total=total,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
        )
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

    def push(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray) -> None:
        """Takes the figures of update `step` on the examples `indices`, and reads the previous ones.

        Raises:
          DivergenceError: the previous update's loss, gradient or parameters were not finite.
        """
        self.flush()
        self._pending = (step, metrics, indices)

    def flush(self) -> None:
        """Reads the figures that are still on the devices.

        Raises:
          DivergenceError: the update's loss, gradient or parameters were not finite.
        """
        if self._pending is None:
            return
        (step, metrics, indices), self._pending = self._pending, None
        figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._tick()
        self.require_finite(step, figures, indices)
        speed = self.images_per_second
        self._bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.3f}"
            + (f", {speed:.0f} images/s" if speed else ""),
            refresh=False,
        )
        self._bar.update()
        if step % self._log_every == 0 or step == self._total:
            line = {f"train_{name}": value for name, value in figures.items()}
            line["learning_rate"] = self._learning_rate(step - 1)
            if speed:
                line["images_per_second"] = speed
            self._writer.write(step, **line)

    @staticmethod
    def require_finite(step: int, figures: dict[str, float], indices: np.ndarray) -> None:
        """Raises DivergenceError, naming the update's examples, unless every figure is finite."""
        if not all(math.isfinite(value) for value in figures.values()):
            shown = ", ".join(f"{name} {value}" for name, value in figures.items())
            examples = ", ".join(map(str, indices[:8])) + (
                f" and {len(indices) - 8} more" if len(indices) > 8 else ""
            )
            raise DivergenceError(
                f"Update {step} is not finite: {shown}. It was computed on training examples {examples}."
                " The run stops; the checkpoints in its workdir are from earlier updates and intact. Lower"
                " optimizer.learning_rate, raise optimizer.warmup_fraction or clip with optimizer.clip_norm,"
                " in another workdir."
            )

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
