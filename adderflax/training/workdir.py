"""A run's directory: its configuration, its data set's description, and whether a run may go on in it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from adderflax.data import DatasetInfo
from adderflax.files import write_whole

# The description of an integer model: a directory that has it is no run's (`adderflax.export` writes it).
INTEGERS = "integers.json"
# What may differ between the run that began a workdir and the one that goes on in it: where the data lies,
# how fast it is read, how often figures are written, how much divergence is borne (the trainer sees to it
# that no less is than there was), and where the teacher lies, whose weights are told apart by themselves.
# Everything else changes what is computed.
FREE_FIELDS = {
    "data.data_dir",
    "data.workers",
    "data.cache",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "skip_nonfinite_steps",
    "distillation.teacher",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "model.remat",
    "model.implementation",
}
# Of TFRecord files, whether they are held in memory decides which images validate, and the others' order.
_FREE_UNLESS_TFRECORD = {"data.cache"}
# The directories that this process writes: its own lock would not stop it.
_held: set[Path] = set()

# What a write can fail with although the directory was writable when the run began.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class WorkdirError(RuntimeError):
    """A workdir that cannot be used for what was asked, with what to do."""


@contextlib.contextmanager
def writing(workdir: str | Path) -> Iterator[Path]:
    """Makes the caller the one writer of a directory, which is created if needed.

    The lock ends with the process, however it ends, and belongs to it alone: a POSIX record lock passes to no
    data worker, whether forked or spawned. Readers need none. What fails inside before it has written
    anything leaves nothing that was not there before, but where writers get into each other's way.

    Args:
      workdir: the run's directory.

    Yields:
      Its absolute path.

    Raises:
      WorkdirError: the directory cannot be written, something else writes it, or its disk is full.
    """
    path = Path(workdir).absolute()
    # Before the file is opened: to close it again would give the lock away.
    if (real := path.resolve()) in _held:
        raise _being_written(path, "this process")
    with leaving_nothing_empty(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_new = not (file := path / "lock").exists()
            lock = file.open("ab+", buffering=0)
        except (FileExistsError, NotADirectoryError) as error:
            raise WorkdirError(
                f"The workdir {path} cannot be written: it is a file, or lies below one. Choose a directory"
                " with --workdir."
            ) from error
        except OSError as error:
            raise WorkdirError(
                f"The workdir {path} cannot be written ({error.strerror or error}): checkpoints and figures"
                " go there. Choose another with --workdir, or change its permissions."
            ) from error
        with lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A writer that failed in between may have removed what was opened: it would lock nobody out.
                if not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                    raise FileNotFoundError
            except (BlockingIOError, FileNotFoundError, PermissionError):
                try:
                    holder = file.read_text().strip()
                except OSError:  # it has just been removed
                    holder = ""
                raise _being_written(path, holder or "another process") from None
            _held.add(real)
            try:
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {platform.node()}\n".encode())
                yield path
            except BaseException as error:
                if is_new:
                    with contextlib.suppress(OSError):
                        file.unlink()
                if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
                    raise
                raise WorkdirError(
                    f"The disk of the workdir {path} cannot be written: {error.strerror}. The run stops; what"
                    " was saved before is intact. Make room or mend the disk; the same command goes on from"
                    " there."
                ) from error
            finally:
                _held.discard(real)


@contextlib.contextmanager
def leaving_nothing_empty(path: Path) -> Iterator[None]:
    """Removes what was made of a directory's path, as far as it is empty, where what is done inside fails."""
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _being_written(path: Path, holder: str) -> WorkdirError:
    return WorkdirError(
        f"The workdir {path} is being written by {holder}: two runs in one directory would destroy each"
        " other's checkpoints. Wait for that one or stop it, or choose another directory with --workdir."
    )


def open_workdir(
    workdir: str | Path,
    config: dict[str, Any],
    *,
    extend: bool = False,
    defaults: dict[str, Any] | None = None,
) -> Path:
    """Checks that a run of this configuration may begin or go on in a directory, and changes nothing there.

    Args:
      workdir: the run's directory, held by `writing`.
      config: the configuration as a plain dictionary of JSON values.
      extend: accept another number of steps than the one the directory was begun with. The schedule is
        that of the new number, so the learning rate jumps where the old one had already fallen; so does the
        exponent that `anneal_fraction` lowers.
      defaults: as `require_same` takes them.

    Returns:
      The absolute path.

    Raises:
      WorkdirError: the directory holds a run of another configuration.
    """
    path = Path(workdir).absolute()
    # What was begun but never saved holds nothing to protect: a mistyped first command can be corrected.
    begun = has_checkpoints(path)
    if not begun and (path / "weights.npz").exists():
        raise WorkdirError(
            f"{path} holds a trained model as one file of weights, weights.npz, which a run there would hide."
            " Choose another directory with --workdir; to go on from that model name it as"
            " --config.warm_start.source."
        )
    if not begun and (path / "summary.json").exists():
        raise WorkdirError(
            f"{path} holds the figures of a run that has ended, and no checkpoint of it: a run there would"
            " replace them. Choose another directory with --workdir, or delete that one."
        )
    if holds_integers(path):
        raise WorkdirError(
            f"{path} holds a model that was exported as integers, {INTEGERS}, to which a run there would not"
            " belong. Choose another directory with --workdir."
        )
    if begun and not (path / "config.json").exists():
        raise WorkdirError(
            f"The workdir {path} has checkpoints but no config.json, so nothing says which model they belong"
            " to. Choose another with --workdir, or restore its config.json."
        )
    if begun:
        require_same(path, config, extend=extend, defaults=defaults)
    return path


def has_checkpoints(workdir: str | Path) -> bool:
    """Whether a complete checkpoint is there."""
    checkpoints = Path(workdir) / "checkpoints"
    return checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The configuration that a workdir was begun with.

    Raises:
      WorkdirError: there is none, or it cannot be read.
    """
    return _read_json(workdir, "config.json")


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Stores the configuration that the directory's run goes on with, once nothing can refuse it any more."""
    _write_json(workdir / "config.json", config)


def write_info(workdir: Path, info: DatasetInfo) -> None:
    """Stores the data set's description, with which images are prepared for this run's model."""
    _write_json(workdir / "dataset.json", dataclasses.asdict(info))


def read_info(workdir: str | Path) -> DatasetInfo:
    """The description that `write_info` stored.

    Raises:
      WorkdirError: there is none, or it is not one.
    """
    try:
        return DatasetInfo(**_read_json(workdir, "dataset.json"))
    except (TypeError, ValueError) as error:
        raise _unreadable(Path(workdir) / "dataset.json", error) from error


def differing_info(there: DatasetInfo, now: DatasetInfo, names: Iterable[str]) -> list[str]:
    """Which of these fields of two descriptions differ; means and deviations by more than rounding."""

    def same(name):
        old, new = getattr(there, name), getattr(now, name)
        return np.allclose(old, new, rtol=1e-5) if name in ("mean", "std") else np.array_equal(old, new)

    return [name for name in names if not same(name)]


def require_same_data(workdir: str | Path, info: DatasetInfo) -> None:
    """Raises WorkdirError if the workdir's run has learned from another data set than `info` describes."""
    if not (Path(workdir) / "dataset.json").exists():  # lost, and written again by the next training
        return
    there = read_info(workdir)
    names = [field.name for field in dataclasses.fields(info)]
    if differing := differing_info(there, info, names):
        told = "; ".join(
            f"{name} ({getattr(there, name)!r} there, {getattr(info, name)!r} now)" for name in differing
        )
        raise WorkdirError(
            f"The run in {Path(workdir).absolute()} has learned from another data set than {info.name!r} is"
            f" here today: {told}. Put back the data, give its directory as data.data_dir, or choose another"
            " directory with --workdir."
        )


def write_teacher(workdir: Path, digest: str) -> None:
    """Stores by which weights a run is taught, in ``teacher.json``."""
    _write_json(workdir / "teacher.json", {"sha256": digest})


def require_same_teacher(workdir: str | Path, teacher: str, digest: str | None) -> None:
    """Raises WorkdirError if the workdir's run was taught by other weights than the ones with this digest.

    Where it does not say by which, or the digest is not known, the teacher's path must be the same.
    """
    told = Path(workdir) / "teacher.json"
    if told.exists() and digest is not None:
        same = _read_json(workdir, told.name).get("sha256") == digest
    else:
        same = read_config(workdir).get("distillation", {}).get("teacher") == teacher
    if not same:
        raise WorkdirError(
            f"The run in {Path(workdir).absolute()} was taught by another model than distillation.teacher"
            f" names today, {teacher!r}. Put the teacher back, name the directory where it lies now, or"
            " choose another directory with --workdir."
        )


def write_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Stores the run's final figures in ``summary.json``."""
    _write_json(workdir / "summary.json", summary)


def read_summary(workdir: Path, *, steps: int) -> dict[str, Any] | None:
    """The figures that `write_summary` stored for a run of so many steps, or None."""
    if not (workdir / "summary.json").exists():
        return None
    summary = _read_json(workdir, "summary.json")
    return summary if summary["steps"] == steps else None


def holds_integers(directory: str | Path) -> bool:
    """Whether an export of integers (`adderflax.analysis.integer_files`) is there, in place of a run."""
    return (Path(directory) / INTEGERS).exists()


def require_same(
    workdir: str | Path,
    config: dict[str, Any],
    *,
    extend: bool = False,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Raises WorkdirError unless the workdir's run computes what `config` describes (see `open_workdir`).

    Args:
      workdir: the run's directory.
      config: the configuration as a plain dictionary of JSON values.
      extend: accept another number of steps.
      defaults: a whole configuration, nested as `config` is. A field that is younger than the workdir's run
        had, in effect, its default when the run began. A field that exists no more is never filled in.
    """
    path = Path(workdir).absolute()
    new, old = flatten(config), flatten(read_config(workdir))
    free = FREE_FIELDS | ({"total_steps", "epochs"} if extend else set())
    if "tfrecord" in (old.get("data.backend"), new.get("data.backend")):
        free -= _FREE_UNLESS_TFRECORD
    differing = differing_fields(old, new, flatten(defaults or {}))
    differing = {name: text for name, text in differing.items() if name not in free}
    if not differing:
        return
    lengthens = differing.keys() <= {"total_steps", "epochs"}
    raise WorkdirError(
        f"The workdir {path} holds a run of another configuration: {'; '.join(differing.values())}. Choose"
        " another directory with --workdir, give the same configuration to resume that run, or delete the"
        " directory." + (" To go on with another number of steps, add --extend." if lengthens else "")
    )


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Every field of a nested configuration by its dotted name, with its value as JSON would give it back."""
    return traverse_util.flatten_dict(json.loads(json.dumps(config)), sep=".")


def differing_fields(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Which fields of two flat configurations differ, by name: "NAME (VALUE there, VALUE now)".

    Args:
      old: of what is there.
      new: of what is wanted now.
      defaults: a field that is younger than `old` had, in effect, its default. One that exists no more is
        never filled in.
    """
    old = {name: defaults[name] for name in new if name in defaults} | dict(old)

    def told(flat, name):
        return repr(flat[name]) if name in flat else "no such field"

    return {
        name: f"{name} ({told(old, name)} there, {told(new, name)} now)"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def _read_json(workdir: str | Path, name: str) -> dict[str, Any]:
    file = Path(workdir) / name
    try:
        if not isinstance(found := json.loads(file.read_text()), dict):
            raise ValueError(f"it holds a {type(found).__name__} where named values belong")
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise WorkdirError(
            f"{Path(workdir).absolute()} is not a run's workdir: it has no {name}. Give the directory that"
            " train.py --workdir was given, of a run that has begun; train.py prints it when it starts."
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> WorkdirError:
    return WorkdirError(
        f"{file} cannot be read: {str(error).removesuffix('.')}. Put back a copy of it, or give the directory"
        " of another run."
    )


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing, as a failed assertion."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
