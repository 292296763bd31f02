"""The two pieces that grain's pipelines lack here: shares of batches, and countable workers."""

import dataclasses
import multiprocessing
import os
import threading
from typing import Any

import grain
from absl import flags


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's contiguous share of every batch.

    Attributes:
      batch_size: images in a batch of all processes together.
      process_index: which process this is.
      process_count: how many there are.
    """

    batch_size: int
    process_index: int
    process_count: int

    @property
    def size(self) -> int:
        """Images of a batch that this process gets."""
        return self.batch_size // self.process_count


class ShareDataset(grain.MapDataset):
    """Maps a process's own numbering of records onto the numbering of all processes.

    With contiguous shares the batches of all processes, laid end to end, are the batch that
    one process alone would have made.
    """

    def __init__(self, records: grain.MapDataset, share: Share):
        super().__init__(records)
        self._records = records
        self._share = share

    def __len__(self) -> int:
        return len(self._records) // self._share.process_count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        share = self._share
        batch, place = divmod(index, share.size)
        return self._records[batch * share.batch_size + share.process_index * share.size + place]


class WorkerIterator(grain.DatasetIterator):
    """Makes batches in worker processes; its state is the number of batches taken.

    The state that grain keeps for workers only fits the same number of them. This one is that
    of the thread-based iterator, so a run may resume with more workers, fewer, or none.
    Workers start when the first batch is asked for.
    """

    def __init__(self, batches: grain.MapDataset, options: grain.MultiprocessingOptions):
        super().__init__()
        self._batches = batches
        self._options = options
        self._taken = 0
        self._running: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        self._assert_not_closed()
        self._start()
        batch = next(self._running)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the number of the next batch."""
        return {"next_index": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from that batch."""
        self._stop()
        self._taken = state["next_index"]

    def start_prefetch(self) -> None:
        """Starts the workers on the next batches."""
        self._start()
        self._running.start_prefetch()

    def close(self) -> None:
        """Ends the workers."""
        self._stop()
        super().close()

    def _start(self) -> None:
        if self._running is None:
            if not flags.FLAGS.is_parsed():
                # Grain's workers read absl flags, also in programs that have none of their own.
                flags.FLAGS.mark_as_parsed()
            alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            rest = self._batches[self._taken :].to_iter_dataset(alone)
            self._running = iter(rest.mp_prefetch(self._options, _end_with_parent))

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _end_with_parent(*_: int) -> None:
    """Lets a worker end when its parent does: one that is killed cannot tell its workers to."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
