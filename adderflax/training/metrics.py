"""Writing figures: one JSON object a line, and TensorBoard events beside them."""

import json
import os
import time
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from adderflax.files import write_whole


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl`` and ``workdir/tensorboard``; a context manager.

    Lines after `step`, which a killed run wrote past its last checkpoint, are cut off first: the file then
    reads as if the run had never been interrupted. Of several processes the first one alone writes.

    Both are written before `write` returns. tensorboardX's own SummaryWriter leaves that to a thread, which a
    full disk ends silently: the run would then wait for it forever.
    """

    def __init__(self, workdir: str | Path, step: int):
        """Opens the files.

        Args:
          workdir: the run's directory.
          step: the step the run starts from; 0 for a new one.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", buffering=1)
        directory = Path(workdir) / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}")
        # Of earlier files TensorBoard shows nothing from this step on.
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._file.close()
            self._events.close()

    def write(self, step: int, **figures: float) -> None:
        """Writes one line ``{"step": step, **figures}`` and the same scalars to TensorBoard.

        Raises:
          OSError: the disk is full, or cannot be written for another reason.
        """
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step} | figures) + "\n")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of ``workdir/metrics.jsonl`` in order; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def last_speed(workdir: str | Path) -> float | None:
    """The throughput that was logged last, images a second, or None."""
    speeds = [line["images_per_second"] for line in read_metrics(workdir) if "images_per_second" in line]
    return speeds[-1] if speeds else None
