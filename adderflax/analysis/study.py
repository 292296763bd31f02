"""Studies: runs times seeds, each finished one a line of a JSON-lines file.

A study is described by a Python file with a function ``runs()`` that returns a list of `Run`, and
if it likes a function ``comparisons()`` that returns a list of `Comparison`; its docstring opens
the study's page.

The lines are the study's memory. What has its line is not run again, what was interrupted is
resumed by the trainer, and a line that the description would no longer produce is an error.
"""

import dataclasses
import datetime
import fcntl
import json
import os
import re
import runpy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from adderflax.analysis.configured import inference_ledger
from adderflax.analysis.diversity import measure_workdir
from adderflax.analysis.pricing import CONVENTIONS, energy
from adderflax.training import environment, trainer
from adderflax.training.command_line import load_config
from adderflax.training.config import ConfigDict, ConfigError, RunConfig, default_config
from adderflax.training.metrics import read_metrics
from adderflax.training.steplog import DivergenceError
from adderflax.training.workdir import FREE_FIELDS, differing_fields, flatten, has_checkpoints, read_info

# Where the data lies and how a machine computes is no part of what a run is.
_MACHINE_FIELDS = FREE_FIELDS - {
    *("eval_every", "checkpoint_every", "keep_checkpoints", "skip_nonfinite_steps"),
    "distillation.teacher",
}


class StudyError(RuntimeError):
    """A study that cannot go on, with what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One row of a study, trained once for each seed.

    Attributes:
      name: what the row is called; also the directory of its runs.
      config: configuration file as train.py takes it, such as "configs/digits_adder_vit.py:vit".
      overrides: configuration fields that are changed, such as {"model.identity": False}.
      seeds: values of the field `seed`.

    Raises:
      ValueError: the name cannot be a directory's, or the seeds are no different whole numbers.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"The run name {self.name!r} must begin with a letter or digit and consist of"
                " letters, digits, '.', '_' and '-': it names a directory."
            )
        given = tuple(self.seeds) if isinstance(self.seeds, Iterable) else ()
        whole = all(type(seed) is int and seed >= 0 for seed in given)
        if not given or not whole or len(set(given)) < len(given):
            raise ValueError(
                f"seeds={self.seeds!r} of run {self.name!r} must be different whole numbers from 0"
                " on, at least one, as (0, 1, 2)."
            )

    def configuration(self, seed: int) -> ConfigDict:
        """The complete configuration for a seed.

        Raises:
          StudyError: the file cannot be loaded, or a field does not exist or cannot have the value.
        """
        try:
            config = load_config(self.config)
            config.unlock()  # so that what does not exist is told by `RunConfig.parse`, with what does
            config.update_from_flattened_dict(dict(self.overrides) | {"seed": seed})
            RunConfig.parse(config)
        except (ConfigError, KeyError, OSError, TypeError, ValueError) as error:
            raise StudyError(
                f"Run {self.name!r} cannot be configured from {self.config}, seen from {os.getcwd()}:"
                f" {str(error).rstrip('.')}. Correct `config` or `overrides`; the fields are those of"
                " adderflax/training/config.py."
            ) from error
        return config


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference that the page states: `run` minus `base`, seed by seed.

    Attributes:
      label: what the difference shows.
      run: name of a run.
      base: name of the run that is subtracted.
    """

    label: str
    run: str
    base: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A study description, loaded.

    Attributes:
      name: name of its file without the ending.
      title: first line of its docstring.
      text: the rest of it.
      runs: its rows.
      comparisons: its differences.
    """

    name: str
    title: str
    text: str
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]

    def pending(self, lines: list[dict[str, Any]]) -> list[tuple[Run, int]]:
        """Runs and seeds that have no line, the first seeds of all runs before the second ones.

        Raises:
          StudyError: a line's configuration is another one than the description's today.
        """
        done = {(line["name"], line["seed"]): line for line in lines}
        turns = range(max(len(run.seeds) for run in self.runs))
        pairs = [(run, run.seeds[i]) for i in turns for run in self.runs if i < len(run.seeds)]
        for run, seed in pairs:
            config = run.configuration(seed)
            if line := done.get((run.name, seed)):
                _require_same(line, config)
        return [(run, seed) for run, seed in pairs if (run.name, seed) not in done]


def load_study(file: str | Path) -> Study:
    """Loads a study description.

    Raises:
      StudyError: there is no such file, or it does not describe a study.
    """
    path = Path(file)
    if not path.is_file():
        raise StudyError(f"There is no study description {path}; studies/ has some.")
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise StudyError(
            f"{path} is not Python: {error}. A study is a file such as those in studies/."
        ) from None
    if "runs" not in names:
        raise StudyError(f"{path} has no function runs(), which returns a list of `Run`.")
    runs = tuple(names["runs"]())
    comparisons = tuple(names["comparisons"]()) if "comparisons" in names else ()
    known = [run.name for run in runs]
    if not runs or len(set(known)) < len(known):
        raise StudyError(f"runs() of {path} must name at least one run, and each once; it names {known}.")
    for comparison in comparisons:
        for name in (comparison.run, comparison.base):
            if name not in known:
                raise StudyError(
                    f"The comparison {comparison.label!r} of {path} names the run {name!r}, which"
                    f" is none of {', '.join(known)}."
                )
    title, _, text = (names["__doc__"] or path.stem).strip().partition("\n")
    return Study(path.stem, title.rstrip("."), text.strip(), runs, comparisons)


def _require_same(line: dict[str, Any], config: ConfigDict) -> None:
    differing = differing_fields(_of_the_run(line["config"]), _flat(config), _flat(default_config()))
    if differing:
        raise StudyError(
            f"The finished line of run {line['name']!r}, seed {line['seed']}, was computed with"
            f" another configuration than the description now gives: {'; '.join(differing.values())}. Give"
            " the changed run another name, take the change back, or delete the line and the run's"
            " directory to run it anew."
        )


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Every field that says what a run is, by its dotted name, as JSON would read it back."""
    return _of_the_run(flatten(config.to_dict()))


def _of_the_run(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _MACHINE_FIELDS}


def read_lines(file: str | Path) -> list[dict[str, Any]]:
    """The lines of a results file; a last one that was cut short is left out.

    Raises:
      StudyError: a line is no result, or there are two of the same run and seed.
    """
    path = Path(file)
    lines, seen = [], {}
    content = _whole_lines(path.read_bytes()) if path.exists() else b""
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            key = (line["name"], line["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"Line {number} of {path} is not the JSON object of a finished run ({error!r})."
                " Restore it from version control, or delete it to have the run done again."
            ) from error
        if key in seen:
            raise StudyError(
                f"Lines {seen[key]} and {number} of {path} are both of run {key[0]!r}, seed"
                f" {key[1]}, perhaps from a merge. Delete one of them."
            )
        seen[key] = number
        lines.append(line)
    return lines


def _whole_lines(content: bytes) -> bytes:
    """A file's content without what a kill left of its last line."""
    end = content.rfind(b"\n") + 1
    try:
        # An editor may leave away the last line break: a piece of a JSON object never parses.
        json.loads(content[end:])
        return content + b"\n"
    except ValueError:
        return content[:end]


class Results:
    """A results file opened by the one process that appends to it; a context manager.

    A kill leaves whole lines and at most one piece of a line, which the next process cuts off.
    """

    def __init__(self, file: str | Path):
        """Opens and locks the file, creating it if needed.

        Raises:
          StudyError: another process has it open.
        """
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            # The kernel lets go of the lock however this process ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise StudyError(
                f"Another process is at work on {path}. Wait for it or stop it: two would train the"
                " same runs."
            ) from error
        content = path.read_bytes()
        whole = _whole_lines(content)
        self._file.truncate(min(len(whole), len(content)))
        self._file.write(whole[len(content) :])

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Writes a line and waits until it is on the disk."""
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())


def run_study(
    study: Study,
    workdir: str | Path,
    results: str | Path,
    *,
    images: int = 30,
    data_dir: str | None = None,
    keep_checkpoints: bool = False,
    progress: bool = True,
) -> None:
    """Trains, measures and records every run that has no line yet.

    Args:
      study: what to run.
      workdir: its runs are trained in ``workdir/<study>/<run>-seed<seed>``.
      results: the JSON-lines file.
      images: test images that `adderflax.analysis.diversity` measures each run on.
      data_dir: where prepared data sets are, instead of where the configurations say.
      keep_checkpoints: keep the checkpoints of a run whose line is written.
      progress: whether to draw progress bars.

    Raises:
      StudyError: the description, the results file or the number of images do not allow it.
      adderflax.data.DatasetNotReadyError: a data set is not there and cannot be prepared.
      adderflax.training.workdir.WorkdirError: an unfinished run's directory holds another run.
    """
    if images < 1:
        raise StudyError(f"images={images} must be at least 1: ranks are measured on them.")
    with Results(results) as file:
        pending = study.pending(read_lines(results))
        commit = environment.commit()
        print(f"Study {study.name}: {len(pending)} runs to do, results in {results}", flush=True)
        for number, (run, seed) in enumerate(pending, 1):
            print(f"[{number}/{len(pending)}] {run.name}, seed {seed}", flush=True)
            config = run.configuration(seed)
            if data_dir is not None:
                config.data.data_dir = data_dir
            directory = Path(workdir) / study.name / f"{run.name}-seed{seed}"
            if (directory / "summary.json").exists() and not has_checkpoints(directory):
                print(f"{directory} has no checkpoints any more: trained anew", flush=True)
                shutil.rmtree(directory)
            line = {
                "name": run.name,
                "seed": seed,
                "config_file": run.config,
                "overrides": dict(run.overrides),
                # The trainer's seconds are those of its last process alone.
                "resumed": (directory / "config.json").exists(),
            }
            try:
                summary = trainer.train(config, directory, progress=progress)
                line |= _rounded(_measure(summary, config, directory, images, data_dir))
            except DivergenceError as error:
                print(f"diverged: {error}", flush=True)
                line["diverged"] = str(error)
            line |= {
                "commit": commit,
                "machine": _machine(),
                "jax": jax.__version__,
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "config": {name: v for name, v in _flat(config).items() if v is not None},
            }
            file.append(line)
            if not keep_checkpoints and (directory / "checkpoints").exists():
                shutil.rmtree(directory / "checkpoints")
            # Each run compiles its own programs; those of a long study would fill the memory.
            jax.clear_caches()


def _measure(
    summary: dict[str, Any], config: ConfigDict, directory: Path, images: int, data_dir: str | None
) -> dict[str, Any]:
    """Figures, diversity and energy of a finished run."""
    figures = {name: value for name, value in summary.items() if name not in ("config", "devices")}
    # The last figures of training and validation stand in the log.
    for logged in read_metrics(directory):
        figures |= {k: v for k, v in logged.items() if k.startswith(("train_", "validation_"))}
    # A set that is smaller is measured whole.
    images = min(images, read_info(directory).test_examples)
    diversity, _ = measure_workdir(directory, images=images, data_dir=data_dir)
    if diversity is not None:
        spectra = {name: values.tolist() for name, values in diversity.spectra().items()}
        diversity = diversity.figures(heads=False) | {"spectra": spectra}
    ledger = inference_ledger(RunConfig.parse(config).model_config(read_info(directory)))
    millijoules = {convention: energy(ledger, convention).total for convention in CONVENTIONS}
    return {"figures": figures, "diversity": diversity, "energy_mJ": millijoules}


def _rounded(tree: Any) -> Any:
    """Numbers to six digits: more would only fill the file."""
    return jax.tree.map(lambda x: float(f"{x:.6g}") if isinstance(x, float) else x, tree)


def _machine() -> str:
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{environment.processor()}, {os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"
