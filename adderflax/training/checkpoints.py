"""Checkpoints of state and data iterator through orbax: asynchronous, atomic, latest and best kept."""

from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

# The figure that ranks checkpoints; larger is better.
BEST_METRIC = "validation_accuracy"


class Checkpointer:
    """Saves and restores a run under ``workdir/checkpoints``; a context manager that waits for saves.

    State and data iterator are one atomic checkpoint, so they always belong to the same step.
    """

    def __init__(self, workdir: str | Path, *, keep_latest: int = 2, read_only: bool = False):
        """Opens the directory, creating it if needed.

        Args:
          workdir: the run's directory.
          keep_latest: how many of the newest checkpoints are kept besides the best one.
          read_only: only restore. Opening for writing removes half-written checkpoints, which in a run that
            is still going on are those being written.
        """
        # max_to_keep with best_fn would delete the newest steps, from which a run resumes.
        preservation = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(
                    get_metric_fn=_ranking, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation,
            best_fn=_ranking,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(
            Path(workdir).absolute() / "checkpoints",
            options=options,
            item_names=("state", "data"),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best validation accuracy, or None if none was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, data: Any, metrics: dict[str, float] | None) -> None:
        """Starts an asynchronous save; a step that is already saved is left as it is.

        Args:
          step: number of updates that `state` has seen.
          state: pytree of arrays.
          data: the grain iterator, positioned after the last batch that `state` has seen.
          metrics: validation figures of `state`, or None where it was not evaluated.
        """
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
            ),
            metrics=metrics,
            force=True,
        )

    def restore(self, state: Any, data: Any, step: int | None = None) -> Any:
        """Restores a checkpoint; `data` is repositioned in place.

        Args:
          state: pytree of arrays or of `jax.ShapeDtypeStruct` with shardings, which the result gets.
          data: the grain iterator.
          step: which checkpoint; None is the newest.
        """
        step = self.latest_step if step is None else step
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(data)
            ),
        )
        return restored["state"]

    def restore_state(self, state: Any, step: int | None = None) -> Any:
        """Restores the state alone, for evaluation."""
        step = self.latest_step if step is None else step
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
        return restored["state"]

    def wait(self) -> None:
        """Blocks until the running save has been committed."""
        self._manager.wait_until_finished()


def _ranking(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]
