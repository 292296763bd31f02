"""Writing figures: one JSON object a line, and TensorBoard events beside them."""

import json
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl`` and ``workdir/tensorboard``; a context manager.

    Lines after `step`, which a killed run wrote past its last checkpoint, are cut off first: the file then
    reads as if the run had never been interrupted. Of several processes the first one alone writes.
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
        scratch = self._path.with_suffix(".jsonl.tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._file.close()
            self._tensorboard.close()

    def write(self, step: int, **figures: float) -> None:
        """Writes one line ``{"step": step, **figures}`` and the same scalars to TensorBoard."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step} | figures) + "\n")
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step)


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of ``workdir/metrics.jsonl`` in order; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
