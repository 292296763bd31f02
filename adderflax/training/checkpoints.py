"""Checkpoints of a run through orbax: asynchronous, atomic, checked before use, latest and best kept."""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from adderflax import extras

try:
    import grain
except ModuleNotFoundError as error:
    raise extras.missing(error) from None

from adderflax.training.manifest import find_damage, write_manifest
from adderflax.training.workdir import WorkdirError, first_line

# The figure that ranks checkpoints; larger is better.
BEST_METRIC = "validation_accuracy"
# Checkpoints that are no longer kept are renamed into here before their files go, one by one.
_REMOVED = "removed"


class Checkpointer:
    """Saves and restores a run under ``workdir/checkpoints``; a context manager that waits for saves.

    State, data iterator and validation figures are one atomic checkpoint, so they always belong to the same
    step, and what was best so far is known from the checkpoints alone. Each carries a manifest of its files.
    """

    def __init__(self, workdir: str | Path, *, keep_latest: int = 2, read_only: bool = False):
        """Opens the directory, creating it if needed, and checks every file of every checkpoint.

        A damaged checkpoint is reported by name and not used: as if it had never been saved. Opening for
        writing renames it into ``workdir/damaged``.

        Args:
          workdir: the run's directory.
          keep_latest: how many of the newest checkpoints are kept besides the best one.
          read_only: only restore. Opening for writing removes half-written checkpoints, which in a run that
            is still going on are those being written.

        Raises:
          WorkdirError: there are checkpoints and all of them are damaged; nothing has been renamed.
        """
        self._workdir = Path(workdir).absolute()
        self._directory = self._workdir / "checkpoints"
        # The figures of every usable checkpoint, by step; None where it was not evaluated.
        self._figures = {step: self._read_figures(step) for step in self._usable_steps(read_only)}
        self._saving: int | None = None
        # max_to_keep with best_fn would delete the newest steps, from which a run resumes.
        preservation = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(
                    get_metric_fn=_ranking, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        with _silent_about_readers() if read_only else contextlib.nullcontext():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation,
                best_fn=_ranking,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                # A reader leaves damaged checkpoints where they are: orbax must not read their figures.
                lightweight_initialize=read_only,
                # A kill between two deleted files must not leave something that looks like a checkpoint.
                todelete_subdir=_REMOVED,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=("state", "data")
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.wait()
            self._manager.close()
        except Exception:
            # Of two errors the first one explains: the one that is stopping the run already.
            if kind is None:
                raise

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return max(self._figures, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best validation accuracy, or None if none was evaluated."""
        evaluated = [step for step, figures in self._figures.items() if figures is not None]
        return max(evaluated, key=lambda step: (_ranking(self._figures[step]), step), default=None)

    def save(self, step: int, state: Any, data: Any, metrics: dict[str, float] | None) -> None:
        """Starts an asynchronous save; a step that is already saved is left as it is.

        Args:
          step: number of updates that `state` has seen.
          state: pytree of arrays.
          data: the grain iterator, positioned after the last batch that `state` has seen.
          metrics: validation figures of `state`, or None where it was not evaluated.

        Raises:
          WorkdirError: this save could not be started or the previous one not be finished.
        """
        if self.latest_step == step:
            return
        self.wait()
        self._saving = step
        with self._naming_failure():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
                ),
                metrics=metrics,
                force=True,
            )
        self._figures[step] = metrics

    def restore(self, state: Any, data: Any, step: int | None = None) -> Any:
        """Restores a checkpoint; `data` is repositioned in place.

        Args:
          state: pytree of arrays or of `jax.ShapeDtypeStruct` with shardings, which the result gets.
          data: the grain iterator.
          step: which checkpoint; None is the newest.
        """
        step = self.latest_step if step is None else step
        restored = self.restore_state(state, step)
        # Every process has taken the same number of batches: the first one's file serves any number of them.
        (position,) = (self._directory / str(step) / "data").glob("process_0-of-*.json")
        data.set_state(json.loads(position.read_text()))
        return restored

    def restore_state(self, state: Any, step: int | None = None) -> Any:
        """Restores the state alone, for evaluation.

        A field of `state`, a dataclass or dictionary, that is None stays None where the checkpoint is older
        than the field.

        Raises:
          WorkdirError: the checkpoint is of another model, damaged, or removed meanwhile.
        """
        step = self.latest_step if step is None else step
        fields = dict(vars(state) if dataclasses.is_dataclass(state) else state)
        try:
            saved = ocp.StandardCheckpointHandler().metadata(self._directory / str(step) / "state").tree
            wanted = {name: value for name, value in fields.items() if value is not None or name in saved}
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            )
        except (KeyError, OSError, TypeError, ValueError) as error:
            if find_damage(self._directory / str(step)) is not None:  # it was whole when this was opened
                raise WorkdirError(
                    f"Checkpoint {step} of {self._directory} is not whole any more: a run that goes on there"
                    " has removed it, and the same command again takes a newer one."
                ) from error
            raise WorkdirError(
                f"Checkpoint {step} of {self._directory} does not fit the model that config.json and"
                f" dataset.json beside it describe: {' '.join(str(error).split())[:200]}. Put back the files"
                " that came with it."
            ) from error
        fields |= restored["state"]
        return type(state)(**fields)

    def wait(self) -> None:
        """Blocks until the running save has been committed.

        Raises:
          WorkdirError: it could not be; the earlier checkpoints are all there.
        """
        with self._naming_failure():
            self._manager.wait_until_finished()
        # What the save displaced is moved by then.
        self._empty_removed()

    @contextlib.contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed, self._saving = self._saving, None
            self._figures.pop(failed, None)
            kept = f"checkpoint {self.latest_step} is intact" if self._figures else "none was saved before"
            reason = "the disk is full" if "No space left" in str(error) else first_line(error)
            raise WorkdirError(
                f"Checkpoint {failed} could not be written to {self._directory}: {reason}. The run stops;"
                f" {kept}. Make room or mend the disk; the same command goes on from there."
            ) from error

    def _seal(self) -> None:
        # Orbax calls this in the one process that commits: every file is written, nothing is renamed yet.
        (unfinished,) = self._directory.glob(f"{self._saving}.*")
        write_manifest(unfinished)

    def _read_figures(self, step: int) -> dict[str, float] | None:
        metrics = self._directory / str(step) / "metrics"
        try:
            return ocp.JsonCheckpointHandler("metrics").restore(metrics) if metrics.exists() else None
        except FileNotFoundError:  # removed meanwhile
            return None

    def _usable_steps(self, read_only: bool) -> list[int]:
        """Checks every checkpoint, reports the damaged ones and, for writing, sets them aside."""
        entries = self._directory.iterdir() if self._directory.is_dir() else ()
        steps = sorted((int(entry.name) for entry in entries if entry.name.isdigit()), reverse=True)
        steps = _of_first_process(steps)
        damages = self._find_damages(steps)
        told = "; ".join(f"checkpoint {step} ({damage})" for step, damage in damages.items())
        if steps and len(damages) == len(steps):
            # Most of the commands that only read are given the directory in another way.
            other = "give another run's directory" if read_only else "choose another directory with --workdir"
            raise WorkdirError(
                f"Every checkpoint in {self._directory} is damaged: {told}. Nothing has been changed there."
                f" Put back a copy of one, or {other}{'' if read_only else ' to begin again'}."
            )
        if damages and jax.process_index() == 0:
            print(f"Damaged in {self._directory}: {told}. Using the others.", file=sys.stderr, flush=True)
            if not read_only:
                for step in damages:
                    print(f"Checkpoint {step} is now {self._set_aside(step)}", file=sys.stderr, flush=True)
        if not read_only:
            self._empty_removed()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("adderflax_checkpoints_checked")
        # What is gone by now was removed by the run that goes on while this process reads.
        there = [step for step in steps if (self._directory / str(step)).is_dir()]
        return [step for step in _of_first_process(there) if step not in damages]

    def _find_damages(self, steps: list[int]) -> dict[int, str]:
        """The damaged ones among the checkpoints: every process hears what the first one found."""
        damages = {}
        if jax.process_index() == 0:
            for step in steps:
                checkpoint = self._directory / str(step)
                if (damage := find_damage(checkpoint)) and checkpoint.is_dir():
                    damages[step] = damage
        return {step: damages.get(step, "") for step in _of_first_process(list(damages))}

    def _set_aside(self, step: int) -> Path:
        aside = self._workdir / "damaged"
        aside.mkdir(exist_ok=True)
        count = sum(entry.name.split("-")[0] == str(step) for entry in aside.iterdir())
        return (self._directory / str(step)).rename(aside / (f"{step}-{count + 1}" if count else str(step)))

    def _empty_removed(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)


def _of_first_process(steps: list[int]) -> list[int]:
    """What the first process has found: another host may see a shared directory as it was before."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    told = np.int32(steps if jax.process_index() == 0 else [0] * count)
    return multihost_utils.broadcast_one_to_all(told).tolist() if count else []


def _ranking(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


@contextlib.contextmanager
def _silent_about_readers() -> Iterator[None]:
    """Keeps orbax from warning, three times, that a directory which was opened to read is read-only."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
