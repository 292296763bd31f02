"""Trains configs/cifar10_adder_vit.py and its multiplying twin on a GPU machine that is lent in short calls.

    python -m benchmarks.device_cifar pack --data_dir ../shared/tfds    what the machine lacks, into .device/
    python -m benchmarks.device_cifar plan multiply=50 taught=50        the calls, in their order
    python -m benchmarks.device_cifar estimate                          seconds an epoch to expect

Each call runs a command of at most 10 minutes over a copy of the checkout, takes at most 64 MiB along, brings
8 files of 16 MiB back from $OUT, and reaches no network; what lies outside the checkout stays from call to
call until the machine is given back. So the data and the wheels travel in pieces (`unpack`), which are joined
and checked there; `probe` times an update of the models and runs the whole trainer once, briefly; `train`
trains one run after the other, each for its number of epochs, stops by SIGTERM when its seconds are over
(exit code 75, everything saved) and goes on in the next call:

    python3 -m benchmarks.device_cifar train --seconds 510 multiply=50 taught=50

The runs are "multiply", the twin; "adder"; "taught", the adder model that learns from the finished twin
besides the labels; and "warm", which begins with that twin's converted weights where the others are random.
The finished twin of the recipe is weights/cifar10_twin: with
`taught=80 --config.distillation.teacher=weights/cifar10_twin` a lease is the adder model's alone.

After each call $OUT holds, of every model that it trained, the evaluated weights of the newest checkpoint
(float16, under 16 MiB) and the run's metrics.jsonl, summary.json and other small files. It does not hold
what resuming elsewhere would take: parameters, averages and Adam's two moments are some 60 MiB a model, about
what a call carries. One machine must do it all before its lease ends; on a second one the runs begin again.

The config may be changed by --config.a.b=value behind `probe` and `train`, alike in each call.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device_estimate import (
    CALLS,
    EXAMPLES,
    STARTS,
    Rates,
    configured_counts,
    epochs_within,
    seconds_an_epoch,
)
from benchmarks.device_kit import MIB, REPOSITORY, KitError, pack, reader_may_leave, unpack

KIT = REPOSITORY / ".device"
# There, outside the checkout, which each call brings anew.
FAR = Path(os.environ.get("ADDERFLAX_DEVICE_DIR", "/var/tmp/adderflax"))
CONFIG = "configs/cifar10_adder_vit.py"
MODELS = {"multiply": f"{CONFIG}:multiply", "adder": CONFIG}
PUPILS = {"taught": f"{CONFIG}:taught", "warm": f"{CONFIG}:warm"}
RUNS = MODELS | PUPILS
_TEACHER = "distillation.teacher"
RETURNED = 16 * MIB  # a file that a call brings back
CHECKS = ("check-forward", "check-gradient_x", "check-gradient_y", "check-attention")
WORKERS = 12  # of the machine's 16 cores
PREEMPTED = 75  # exit code of train.py when a signal stopped it
# A model that could train for fewer seconds than its start takes is left to the next call.
WORTH_STARTING, SAVING = 45.0, 45.0
# Seconds that the side-by-side part of `probe` may take, and each timing after it.
COMPILING, TIMING = 150.0, 40.0


# --- the runs ---


def train_command(name: str, workdir: Path, fields: dict[str, object], overrides: Sequence[str]) -> list[str]:
    """The command that begins or resumes a run of RUNS."""
    command = [sys.executable, "train.py", f"--config={RUNS[name]}", f"--workdir={workdir}", "--noprogress"]
    return command + [f"--config.{field}={value}" for field, value in fields.items()] + list(overrides)


def start(
    command: Sequence[str], far: Path = FAR, log: Path | None = None, **environment: str
) -> subprocess.Popen:
    """Starts a command, with the wheels in reach and the cache of compiled programs, into a log if named."""
    path = os.pathsep.join([str(far / "site"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
    environment["JAX_COMPILATION_CACHE_DIR"] = str(far / "cache")
    if log is None:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


def finish(child: subprocess.Popen, seconds: float) -> int:
    """Waits for so many seconds; a child that takes longer is killed. Its exit code, negative if killed."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def run_until(deadline: float, command: Sequence[str], far: Path = FAR, **environment: str) -> int:
    """Runs a command; at the deadline (of `time.monotonic`) SIGTERM asks it to save and end.

    Returns:
      Its exit code, PREEMPTED also where it had nothing to save yet; negative where it had to be killed.
    """
    child = start(command, far, **environment)
    try:
        return child.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
    try:
        status = child.wait(SAVING)
    except subprocess.TimeoutExpired:
        child.kill()
        status = child.wait()
    return PREEMPTED if status == -signal.SIGTERM else status


def probe(dtypes: Sequence[str], overrides: Sequence[str], far: Path = FAR) -> int:
    """Checks the CUDA kernels, runs the whole trainer for 60 updates, and times an update of both models.

    The trainer runs on digits enlarged to 32 pixels, because the images have not arrived yet, with
    RandAugment in worker processes. Checks, trainer and the compilation of all updates go side by side; then
    each update is timed alone, and after them the kernels.

    Args:
      dtypes: values of model.dtype to time.
      overrides: --config.a.b=value for every run.
      far: where the wheels are; logs go to `far/probe`.

    Returns:
      0, or the exit code of a command that failed.
    """
    logs, quick = far / "probe", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    quick["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    steps = {
        f"{name}-{dtype}": [sys.executable, "-m", "benchmarks.step", f"--config={config}", "--json"]
        + [*overrides, f"--config.model.dtype={dtype}"]
        for name, config in MODELS.items()
        for dtype in dtypes
    }
    shutil.rmtree(logs, ignore_errors=True)
    fields = {"data.name": "digits", "data.image_size": 32, "data.workers": WORKERS, "total_steps": 60}
    trainer = train_command("adder", logs / "trainer", fields | {"log_every": 10}, overrides)
    kernels = [sys.executable, "benchmarks/device_gpu.py"]
    children = {
        "checks": start([*kernels, *CHECKS], far, logs / "checks.log", **quick),
        "trainer": start(trainer, far, logs / "trainer.log", **quick),
    }
    children |= {name: start(command, far, logs / f"{name}.cold", **quick) for name, command in steps.items()}
    deadline = time.monotonic() + COMPILING
    statuses = {name: finish(child, deadline - time.monotonic()) for name, child in children.items()}
    for name, command in steps.items():
        if statuses[name] == 0:
            statuses[name] = finish(start(command, far, logs / f"{name}.log", **quick), TIMING)
    dense = start([*kernels, "time-dense"], far, logs / "time-dense.log", OUT=str(logs), **quick)
    statuses["time-dense"] = finish(dense, 2 * TIMING)
    for name, status in statuses.items():
        log = (logs / f"{name}.log") if (logs / f"{name}.log").exists() else logs / f"{name}.cold"
        print(f"{name}: exit status {status}\n{log.read_text()[-3000:]}", flush=True)
    if "OUT" in os.environ:
        with tarfile.open(Path(os.environ["OUT"]) / "probe.tar.gz", "w:gz") as tar:
            for file in sorted([*logs.glob("*.log"), *logs.glob("*.cold"), *logs.glob("*.json")]):
                tar.add(file, f"probe/{file.name}")
    return next((status for status in statuses.values() if status), 0)


def train(seconds: float, runs: dict[str, float], overrides: Sequence[str], far: Path = FAR) -> int:
    """Trains runs in turn, from wherever they are, for so many seconds, and fills $OUT.

    Args:
      seconds: after which the run at hand is asked to save and end.
      runs: epochs of each, by a name of RUNS; the same in every call.
      overrides: --config.a.b=value for every run.
      far: where the data and the runs lie.

    Returns:
      0: all are finished; 75: the next call goes on; otherwise the exit code of the run that failed.
    """
    deadline, exports = time.monotonic() + seconds, {}
    for name, epochs in runs.items():
        workdir = far / "runs" / name
        if (workdir / "summary.json").exists():
            continue
        if deadline - time.monotonic() < WORTH_STARTING:
            status = PREEMPTED
            break
        fields = {"epochs": epochs, "data.data_dir": far / "tfds", "data.workers": WORKERS}
        if name in PUPILS:
            named = [word.partition("=")[2] for word in overrides if word.startswith(f"--config.{_TEACHER}=")]
            fields[_TEACHER] = named[-1] if named else far / "runs" / "multiply"
        if name == "warm":
            fields["warm_start.source"] = fields[_TEACHER]
        status = run_until(deadline, train_command(name, workdir, fields, overrides), far)
        exports[name] = bring_back(name, workdir, far)
        if status:
            break
    else:
        status = 0
    for name, child in exports.items():
        if child and finish(child, SAVING):
            print(f"The weights of {name} could not be brought back", flush=True)
    return status


def bring_back(name: str, workdir: Path, far: Path = FAR) -> subprocess.Popen | None:
    """Lays a run's figures into $OUT, and begins to lay its evaluated weights there, if it has a checkpoint.

    Returns:
      The process that writes the weights, on the processor, while the next run has the GPU; or None.
    """
    out = Path(os.environ.get("OUT") or far / "out")
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{name}.tar.gz", "w:gz") as tar:
        # TensorBoard's events know when each line was written.
        for file in sorted([*workdir.glob("*.json*"), *workdir.glob("tensorboard/*")]):
            tar.add(file, f"{name}/{file.relative_to(workdir)}")
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        return None
    command = [sys.executable, "-m", "benchmarks.device_cifar", "export"]
    return start([*command, str(workdir), str(out / f"{name}.npz")], far, JAX_PLATFORMS="cpu")


def export(workdir: Path, file: Path) -> None:
    """Writes the evaluated weights of a run's newest checkpoint (`adderflax.training.restore.write_weights`).

    Raises:
      KitError: the file is too large to be brought back, or a weight too large for float16.
    """
    from adderflax.training.restore import write_weights

    try:
        write_weights(workdir, file)
    except ValueError as error:
        raise KitError(str(error)) from error
    if file.stat().st_size > RETURNED:
        raise KitError(f"{file} has {file.stat().st_size / MIB:.1f} MiB; a call brings back files of 16.")


# --- the command line ---


def estimate(minutes: float, overrides: Sequence[str]) -> None:
    """Prints the seconds of an epoch of both models, and the epochs that so many minutes a model allow."""
    from adderflax.training.command_line import load_config

    speeds = {}
    for name, file in MODELS.items():
        parts = seconds_an_epoch(*configured_counts(file, overrides))
        total = sum(parts.values())
        speeds[name] = EXAMPLES / total
        dtype = load_config(file, overrides).model.dtype or "float32"
        print(f"{file}, {dtype}: {total:.1f} s an epoch, {speeds[name]:,.0f} images/s")
        for part, seconds in parts.items():
            print(f"  {part:34s}{seconds:6.2f} s")
        alone = epochs_within(60 * minutes, [speeds[name]], starts=2)
        print(f"  {minutes:g} minutes allow {alone} epochs, beside two processes' {STARTS:g} s of their own")
    both = epochs_within(120 * minutes, speeds.values())
    print(f"{2 * minutes:g} minutes allow {both} epochs of each, beside {CALLS} processes")
    speeds = ", ".join(f"{name.replace('_', ' ')} {speed:.3g}" for name, speed in Rates()._asdict().items())
    print(f"Speeds a second, measured and assumed: {speeds}")


def calls(
    pieces: int, runs: dict[str, float], overrides: Sequence[str] = (), probed: bool = False
) -> list[dict[str, object]]:
    """The device calls of a whole lease: command, timeout_s and carry of each, in order.

    Args:
      pieces: how many `pack` made.
      runs: epochs of each, by a name of RUNS.
      overrides: --config.a.b=value for every run.
      probed: whether the first call also probes.
    """
    script = "python3 -m benchmarks.device_cifar"
    fields = "".join(f" {override}" for override in overrides)
    trained = " ".join(f"{name}={epochs:g}" for name, epochs in runs.items())
    trains = f"{script} train --seconds {600 - 2 * SAVING:g} {trained}{fields}"
    probing = (f" && {script} probe{fields}", 300) if probed else ("", 120)
    commands = [(f"{script} unpack 1{probing[0]}", probing[1], [1])]
    commands += [(f"{script} unpack {number}", 120, [number]) for number in range(2, pieces)]
    commands += [(f"{script} unpack {pieces} && {trains}", 600, [pieces]), (trains, 600, [])]
    return [
        {"command": command, "timeout_s": limit, "carry": [f".device/{number}" for number in carry]}
        for command, limit, carry in commands
    ]


def plan(runs: dict[str, float], overrides: Sequence[str], probed: bool = False, kit: Path = KIT) -> None:
    """Prints the calls for what `pack` laid ready, the first with a probe if asked for."""
    pieces = sum(entry.name.isdigit() for entry in kit.iterdir()) if kit.is_dir() else 0
    if not pieces:
        raise KitError(f"{kit} is empty: begin with `python -m benchmarks.device_cifar pack --data_dir DIR`.")
    for number, call in enumerate(calls(pieces, runs, overrides, probed), 1):
        print(f"{number}. {json.dumps(call)}")
    print(
        "Each within 30 s of the one before; the last one again until its exit code is 0 (75: more to do);"
        " then give_back. Copy what a training call brought back: the next call replaces it."
    )


def epochs_of(text: str) -> tuple[str, float]:
    """Reads "NAME=EPOCHS"."""
    name, _, epochs = text.partition("=")
    try:
        if name not in RUNS or not 0 < float(epochs) < 1e6:
            raise ValueError
    except ValueError:
        allowed = ", ".join(RUNS)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=EPOCHS, NAME one of {allowed}") from None
    return name, float(epochs)


# Subcommands that take --config.a.b=value.
_CONFIGURED = ("plan", "estimate", "probe", "train")


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="subcommand", required=True)
    functions = (pack, plan, estimate, unpack, probe, train, export)
    add = {function.__name__: commands.add_parser(function.__name__) for function in functions}
    for function in functions:
        add[function.__name__].set_defaults(function=function)
    add["pack"].add_argument("--data_dir", type=Path, required=True, help="where cifar10 is prepared")
    add["unpack"].add_argument("number", type=int, help="of the piece, from 1")
    add["pack"].set_defaults(kit=KIT)
    add["unpack"].set_defaults(kit=KIT, far=FAR)
    for name in ("plan", "train"):
        add[name].add_argument("runs", nargs="+", type=epochs_of, help=f"NAME=EPOCHS: {', '.join(RUNS)}")
    add["plan"].add_argument("--probed", action="store_true", help="let the first call probe, some 3 minutes")
    add["estimate"].add_argument("--minutes", type=float, default=12.0, help="for each model (default 12)")
    add["probe"].add_argument("--dtypes", nargs="+", default=["float32"], help="default float32")
    add["train"].add_argument("--seconds", type=float, required=True, help="of this call")
    add["export"].add_argument("workdir", type=Path)
    add["export"].add_argument("file", type=Path)
    arguments, overrides = parser.parse_known_args(argv)
    values = vars(arguments)
    function, takes_overrides = values.pop("function"), values.pop("subcommand") in _CONFIGURED
    if wrong := [text for text in overrides if not (takes_overrides and text.startswith("--config."))]:
        parser.error(f"unknown argument {wrong[0]}; fields are set by --config.a.b=value")
    if takes_overrides:
        values["overrides"] = overrides
    if "runs" in values:
        values["runs"] = dict(values["runs"])
    try:
        result = function(**values)
    except BrokenPipeError:
        raise  # of the output, which is no error
    except (KitError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    if function is pack:
        print(result)
    return result if function in (probe, train) else 0


if __name__ == "__main__":
    sys.exit(main())
