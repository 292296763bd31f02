"""The training loop: model, data, optimizer, checkpoints and figures composed, and nothing else."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from adderflax import data as data_lib
from adderflax.models.families import build_model
from adderflax.training import distributed, divergence, environment, inheritance, profiling, sharding
from adderflax.training import workdir as workdir_lib
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import RunConfig, as_config_error, older_defaults
from adderflax.training.metrics import MetricsWriter, last_speed
from adderflax.training.preemption import StopSignals
from adderflax.training.restore import (
    config_here,
    data_from,
    finished_summary,
    load_model,
    require_implementation,
)
from adderflax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
)
from adderflax.training.steplog import DivergenceError, StepLog, progress_bar
from adderflax.training.update import configured_update
from adderflax.training.workdir import WorkdirError


class Trainer:
    """A run's parts, built once from its configuration: what `train` and `evaluate` share.

    Attributes:
      config: the typed configuration.
      dataset: the images.
      model: the Linen module.
      total_steps: number of updates of the whole run.
      mesh: the devices of all processes.
      teacher_digest: of the teacher's weights, if there is a teacher (`inheritance.digest`).
    """

    def __init__(self, config: ConfigDict | dict[str, Any]):
        """Builds the parts.

        Raises:
          ConfigError: the configuration cannot be run.
          adderflax.data.DatasetNotReadyError: the data set is not there and cannot be prepared.
        """
        self.config = RunConfig.parse(config)
        require_implementation(self.config)
        with as_config_error():
            self.mesh = sharding.make_mesh(config=self.config.mesh)
            # What is not there is refused before data is read, which may mean downloading it.
            self._teacher = inheritance.load_teacher(self.config.distillation)
            self.teacher_digest = inheritance.digest(self._teacher)
            self.dataset = distributed.first_process_first(
                lambda: data_lib.load_dataset(self.config.data), "load_dataset"
            )
            model = self.config.model_config(self.dataset.info)
            heads = getattr(model, "num_heads", None)
            hidden = heads and model.resolved().mlp_dim
            sharding.require_tensor_fits(self.mesh, heads, hidden)
            self.model = build_model(model)
            inheritance.require_pupil(self._teacher, self.dataset.info, self.model)
            self._share = dict(zip(("process_index", "process_count"), sharding.process_share(self.mesh)))
        info = self.dataset.info
        self.total_steps = self.config.num_steps(info)
        self._update = configured_update(
            self.config, self.model, info, self.mesh, self.total_steps, teacher=self._teacher
        )
        self.optimizer, self.train_step = self._update.optimizer, self._update.step
        self._state_options = {"with_ema": self.config.ema_decay > 0, "mesh": self.mesh}
        self.eval_step = make_eval_step(
            self.model, lambda images: data_lib.normalize_batch(images, info), mesh=self.mesh
        )

    def new_state(self) -> TrainState:
        """The state at step 0.

        Raises:
          ConfigError: the model that `warm_start` names cannot be used.
        """
        run = self.config
        with as_config_error():
            inherited = inheritance.inherited_params(
                run.warm_start, self.model.config, self.dataset, run.data
            )
        return init_state(self.model, self.optimizer, seed=run.seed, params=inherited, **self._state_options)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, to restore into."""
        return abstract_state(self.model, self.optimizer, **self._state_options)

    def train_batches(self) -> Any:
        """The endless, checkpointable grain iterator over training batches."""
        with as_config_error():
            return data_lib.train_iterator(
                self.dataset,
                self.config.data,
                self.config.augment,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                **self._share,
            )

    def find_culprit(self, state: TrainState, batch: dict[str, Any]) -> str:
        """Which layer went first in the update from `state` on a host batch, in a sentence."""
        return divergence.find_culprit(
            self.model,
            state,
            sharding.put_batch(batch, self.mesh),
            self._update.augment,
            accumulation_steps=self.config.accumulation_steps,
            anneal_steps=self._update.anneal_steps,
            teacher=self._teacher,
        )

    def evaluate(self, variables: dict[str, Any], part: str, *, progress: bool = False) -> dict[str, float]:
        """Figures of a model's variables over "validation" or "test", every image counted once.

        Args:
          variables: as `TrainState.evaluated_variables` or `adderflax.training.restore.load_model` give them.
          part: of the data set.
          progress: whether to draw a bar.

        Returns:
          ``{part}_loss`` in nats, ``{part}_accuracy`` in 0..1, ``{part}_accuracy_top5`` above ten classes,
          and ``{part}_examples``.
        """
        # A batch of evaluation divides over the devices; what pads it has weight 0.
        shares = sharding.batch_shares(self.mesh)
        batch_size = math.ceil(self.config.batch_size / shares) * shares
        batches = data_lib.evaluation_batches(
            self.dataset, part, self.config.data, batch_size=batch_size, **self._share
        )
        count = math.ceil(len(self.dataset.part(part)) / batch_size)
        sums = []
        silent = not progress or jax.process_index() > 0
        for batch in progress_bar(batches, total=count, unit="batch", disable=silent):
            sums.append(self.eval_step(variables, sharding.put_batch(batch, self.mesh)))
            # Loads the next batch while this one is computed, but never queues more than two on a device.
            jax.block_until_ready(sums[-2:-1])
        total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
        figures = {
            f"{part}_loss": total["loss"] / total["examples"],
            f"{part}_accuracy": total["correct"] / total["examples"],
            f"{part}_examples": round(total["examples"]),
        }
        if self.dataset.info.num_classes > 10:
            figures[f"{part}_accuracy_top5"] = total["correct_top5"] / total["examples"]
        return figures


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    extend: bool = False,
    progress: bool = True,
    profile_steps: range | None = None,
) -> dict[str, Any]:
    """Trains a run to its end, from wherever its workdir is, and evaluates it once on the test split.

    Args:
      config: the run, as `adderflax.training.config.default_config` lays it out.
      workdir: its directory; a run that is there is resumed.
      extend: accept another number of steps than the workdir was begun with.
      progress: whether to draw a progress bar.
      profile_steps: updates of which a trace is written (`adderflax.training.profiling.profiled`).

    Returns:
      The summary, which is also written to ``summary.json``: figures of the evaluated parameters on the test
      split, steps, best_step, parameters, images_per_second of training alone, seconds of this process,
      devices and the configuration.

    Raises:
      ConfigError: the configuration cannot be run.
      adderflax.data.DatasetNotReadyError: the data set is not there and cannot be prepared.
      adderflax.training.workdir.WorkdirError: the workdir cannot be written, is being written by
        another process, holds another run, one of another data set or teacher than is here today, one that
        has left out more updates than are allowed, or figures without checkpoints, or all its checkpoints
        are damaged.
      DivergenceError: the loss, the gradient or the parameters became infinite or NaN.
      adderflax.training.preemption.Preempted: SIGTERM or SIGINT came; the last update is saved, if any.
    """
    started = time.monotonic()
    run = RunConfig.parse(config)
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    # Everything that can be refused is refused before data is read, which may mean downloading it.
    with as_config_error():
        mesh = sharding.make_mesh(config=run.mesh)
        sharding.require_divisible(run.batch_size, mesh, run.accumulation_steps)
    with contextlib.ExitStack() as held:
        first_process = jax.process_index() == 0

        def hold():
            # The first process writes; it holds the directory for all.
            if first_process:
                held.enter_context(workdir_lib.writing(workdir))
                workdir_lib.open_workdir(workdir, plain, extend=extend, defaults=older_defaults(plain))
            return Path(workdir).absolute()

        workdir = distributed.first_process_first(hold, "open_workdir")
        begun = bool(distributed.of_first_process(workdir_lib.has_checkpoints(workdir)))
        if begun and (summary := _finished(run, workdir)):
            print(f"Finished at step {summary['steps']}, nothing left to do", flush=True)
            print(_line(summary["steps"], summary), flush=True)
            return summary
        if not begun:
            with as_config_error():
                inheritance.require_source(run.warm_start)
        trainer = Trainer(config)
        # Data is there: whoever interrupts a download means the download.
        stopping = held.enter_context(contextlib.ExitStack())
        signals = stopping.enter_context(StopSignals())
        if begun:
            _require_same_sources(workdir, trainer)
        total = trainer.total_steps
        # Kernels that XLA cannot partition by itself need to know the mesh.
        held.enter_context(jax.set_mesh(trainer.mesh))
        batches = held.enter_context(contextlib.closing(trainer.train_batches()))
        # The last thing that can refuse a new run: nothing is written before.
        state = None if begun else trainer.new_state()
        checkpointer = held.enter_context(Checkpointer(workdir, keep_latest=run.keep_checkpoints))
        first = checkpointer.latest_step or 0
        if first > total:
            raise WorkdirError(
                f"The workdir {workdir} is at step {first} already, past the {total} steps asked for: a run"
                " can be extended, not cut short. Choose another directory with --workdir."
            )
        if first:
            state = checkpointer.restore(trainer.abstract_state(), batches)
            print(f"Resumed from step {first}", flush=True)
            # Every further update would be left out.
            if (left_out := int(state.skipped)) > run.skip_nonfinite_steps:
                raise WorkdirError(
                    f"The run in {workdir} has left out {left_out} updates that were not finite, and"
                    f" skip_nonfinite_steps={run.skip_nonfinite_steps} allows fewer. Go on with"
                    f" --config.skip_nonfinite_steps={left_out} or more."
                )
        signals.stop_before_updates()
        if first_process:
            workdir_lib.write_info(workdir, trainer.dataset.info)
            workdir_lib.write_config(workdir, plain)
            if trainer.teacher_digest is not None:
                workdir_lib.write_teacher(workdir, trainer.teacher_digest)
        environment.record_start(workdir, first)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(f"{parameters:,} parameters, steps {first} to {total}, workdir {workdir}", flush=True)
        if idle := run.idle_fields(trainer.model.config, state.params):
            print(f"Without effect in this run: {', '.join(idle)}", flush=True)
        with (
            MetricsWriter(workdir, first) as writer,
            StepLog(
                writer,
                first=first,
                total=total,
                batch_size=run.batch_size,
                log_every=run.log_every,
                allowed_skips=run.skip_nonfinite_steps,
                progress=progress and first_process,
            ) as log,
        ):
            steps = profiling.profiled(range(first + 1, total + 1), profile_steps, workdir)
            # Closed here: the traceback of what ends the loop would keep the trace open.
            with contextlib.closing(steps):
                state = _update(trainer, state, batches, steps, log, checkpointer, workdir, signals)
        stopping.close()
        summary = trainer.evaluate(state.evaluated_variables, "test") | {
            "steps": total,
            "best_step": checkpointer.best_step,
            "parameters": parameters,
            "images_per_second": log.images_per_second or last_speed(workdir),
            "seconds": time.monotonic() - started,
            "devices": [device.device_kind for device in jax.devices()],
            "config": plain,
        }
        if first_process:
            workdir_lib.write_summary(workdir, summary)
    print(_line(total, summary), flush=True)
    return summary


def _finished(run: RunConfig, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended whole, which needs neither its data nor its teacher any more."""
    summary = finished_summary(workdir, run)
    steps = distributed.of_first_process(summary["steps"] if summary else 0)
    if not steps:
        return None
    # What is damaged is computed again.
    with Checkpointer(workdir, keep_latest=run.keep_checkpoints) as checkpointer:
        return (summary or {"steps": steps}) if checkpointer.latest_step == steps else None


def _update(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[dict[str, Any]],
    steps: Iterable[int],
    log: StepLog,
    checkpointer: Checkpointer,
    workdir: Path,
    signals: StopSignals,
) -> TrainState:
    """The loop: one update for each of `steps`, evaluating and saving where it is due."""
    run = trainer.config
    try:
        for step in steps:
            batch = next(batches)
            state, metrics = trainer.train_step(state, sharding.put_batch(batch, trainer.mesh))
            log.push(step, metrics, batch)
            last, stops = step == trainer.total_steps, signals.should_stop(step)
            evaluates = trainer.dataset.validation is not None and (last or step % run.eval_every == 0)
            if not (evaluates or last or stops) and step % run.checkpoint_every:
                continue
            # Nothing that is not finite is ever saved: this raises first.
            log.flush()
            with log.paused():
                scores = trainer.evaluate(state.evaluated_variables, "validation") if evaluates else None
                if scores:
                    log.write_scores(step, scores)
                    log.note(_line(step, scores))
                checkpointer.save(step, state, batches, scores)
            if stops:
                checkpointer.wait()
                signals.stop(step, log.note)
        # A signal does not cut the last save short either.
        checkpointer.wait()
    except DivergenceError as error:
        raise divergence.explain(error, workdir, lambda batch: trainer.find_culprit(state, batch)) from error
    return state


def evaluate(
    workdir: str | Path,
    config: ConfigDict | None = None,
    *,
    data_dir: str | None = None,
    best: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluates a workdir's newest checkpoint, or its file of weights, on the test split.

    Args:
      workdir: the run's directory.
      config: the run's configuration; None reads the one that the directory was begun with.
      data_dir: where prepared data sets are on this machine; None looks where the configuration says.
      best: take the checkpoint with the best validation accuracy instead of the newest.
      progress: whether to draw a bar.

    Returns:
      steps (not of a file of weights), test_loss, test_accuracy, test_examples, and test_accuracy_top5 above
      ten classes.

    Raises:
      WorkdirError: the directory holds no run, another run, no checkpoint yet, none that was validated where
        `best` asks for it, or a run that has learned from another data set than is here today.
    """
    if config is not None:
        workdir_lib.require_same(workdir, config.to_dict(), defaults=older_defaults(config.to_dict()))
    described = data_from(config_here(workdir) if config is None else config.to_dict(), data_dir)
    if best and not workdir_lib.has_checkpoints(workdir):
        load_model(workdir, best=True)  # tells why there is none, before data is read
    # A teacher is needed no more.
    trainer = Trainer(described | {"distillation": {}})
    _require_same_sources(workdir, trainer)
    with jax.set_mesh(trainer.mesh), Checkpointer(workdir, read_only=True) as checkpointer:
        step = checkpointer.best_step if best else checkpointer.latest_step
        if step is None:  # a file of weights, or nothing to evaluate
            _, variables, _ = load_model(workdir, best=best)
            return trainer.evaluate(variables, "test", progress=progress)
        state = checkpointer.restore_state(trainer.abstract_state(), step)
        figures = trainer.evaluate(state.evaluated_variables, "test", progress=progress)
        return {"steps": int(state.step)} | figures


def _require_same_sources(workdir: Path, trainer: Trainer) -> None:
    """Data and teacher are those of the workdir's run; the first process's verdict is that of all."""

    def compare():
        if jax.process_index() == 0:
            workdir_lib.require_same_data(workdir, trainer.dataset.info)
            if (teacher := trainer.config.distillation.teacher) is not None:
                workdir_lib.require_same_teacher(workdir, teacher, trainer.teacher_digest)

    distributed.first_process_first(compare, "require_same_sources")


def _line(step: int, figures: dict[str, Any]) -> str:
    shown = (f"{name} {figures[name]:.4f}" for name in figures if name.endswith(("loss", "accuracy")))
    return f"step {step}: {', '.join(shown)}"
