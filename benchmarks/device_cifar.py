"""Trains configs/cifar10_adder_vit.py and its multiplying twin on a GPU machine that is lent in short calls.

    python -m benchmarks.device_cifar pack --data_dir ../shared/tfds    what the machine lacks, into .device/
    python -m benchmarks.device_cifar plan                              the calls, in their order
    python -m benchmarks.device_cifar estimate                          seconds an epoch to expect

Each call runs a command of at most 10 minutes over a copy of the checkout, takes at most 64 MiB along, brings
8 files of 16 MiB back from $OUT, and reaches no network; what lies outside the checkout stays from call to
call until the machine is given back. So the data and the wheels travel in pieces (`unpack`), which are joined
and checked there; `probe` times both models on that GPU and from this sets one number of epochs for both,
which fits the minutes; `train` trains them in turn, stops by SIGTERM when its seconds are over (exit code 75,
everything saved) and goes on in the next call.

After each call $OUT holds, of every model that it trained, the evaluated weights of the newest checkpoint
(float16, under 16 MiB) and the run's metrics.jsonl, summary.json and other small files. It does not hold
what resuming elsewhere would take: parameters, averages and Adam's two moments are 82 MiB a model, more
than a call carries. One machine must do it all, in its 30 minutes; on a second one the runs begin again.

The config may be changed by --config.a.b=value behind `probe` and `train`, alike in each call. RandAugment
stays on: a process makes 5,000 images/s (results/input.md), the 12 workers here up to 60,000, and the
estimate expects 7,200 of the adder model and 16,000 of the twin. `probe` times without it, on digits enlarged
to 32 pixels, because it runs before the images have arrived.
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

from benchmarks.device_estimate import EXAMPLES, Rates, configured_counts, epochs_within, seconds_an_epoch
from benchmarks.device_kit import MIB, REPOSITORY, KitError, pack, unpack

KIT = REPOSITORY / ".device"
# There, outside the checkout, which each call brings anew.
FAR = Path(os.environ.get("ADDERFLAX_DEVICE_DIR", "/var/tmp/adderflax"))
CONFIG = "configs/cifar10_adder_vit.py"
MODELS = {"adder": CONFIG, "multiply": f"{CONFIG}:multiply"}
RETURNED = 16 * MIB  # a file that a call brings back
WORKERS = 12  # of the machine's 16 cores
PREEMPTED = 75  # exit code of train.py when a signal stopped it
# A model that could train for fewer seconds than its start takes is left to the next call.
WORTH_STARTING, SAVING = 60.0, 45.0


# --- the runs ---


def train_command(name: str, workdir: Path, overrides: Sequence[str]) -> list[str]:
    """The command that begins or resumes the run of "adder" or "multiply"."""
    command = [sys.executable, "train.py", f"--config={MODELS[name]}", f"--workdir={workdir}", "--noprogress"]
    return command + list(overrides)


def run_until(deadline: float, command: Sequence[str], far: Path = FAR, **environment: str) -> int:
    """Runs a command; at the deadline (of `time.monotonic`) SIGTERM asks it to save and end.

    Returns:
      Its exit code, PREEMPTED also where it had nothing to save yet; negative where it had to be killed.
    """
    path = os.pathsep.join([str(far / "site"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
    environment["JAX_COMPILATION_CACHE_DIR"] = str(far / "cache")
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
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


def probe(minutes: float, implementations: Sequence[str], overrides: Sequence[str], far: Path = FAR) -> dict:
    """Times 100 updates of both models and writes `far/recipe.json`, which `train` follows.

    Args:
      minutes: which all pieces of both trainings together may take.
      implementations: of the adder operators, in order of preference: one that fails is passed over.
      overrides: --config.a.b=value for every run.
      far: where the recipe goes.

    Returns:
      The recipe: implementation, images_per_second by model, epochs.

    Raises:
      KitError: a model cannot be trained there.
    """
    speeds, chosen = {}, {}
    for name in MODELS:
        for chosen[name] in implementations:
            workdir = far / "probe" / f"{name}-{chosen[name]}"
            shutil.rmtree(workdir, ignore_errors=True)
            timed = ["data.name=digits", "data.image_size=32", "augment.randaugment_layers=0"]
            timed += ["total_steps=100", "log_every=20", f"model.implementation={chosen[name]}"]
            command = train_command(name, workdir, [*overrides, *(f"--config.{field}" for field in timed)])
            if run_until(time.monotonic() + 150.0, command, far) == 0:
                break
            print(f"{name} with {chosen[name]!r} failed", flush=True)
        else:
            raise KitError(f"No implementation of {', '.join(implementations)} trains {name}: see above.")
        summary = json.loads((workdir / "summary.json").read_text())
        speeds[name] = summary["images_per_second"]
    epochs = min(epochs_within(60 * minutes, speeds.values()), int(summary["config"]["epochs"]))
    recipe = {"implementation": chosen["adder"], "images_per_second": speeds, "epochs": epochs}
    (far / "recipe.json").write_text(json.dumps(recipe))
    return recipe


def train(seconds: float, epochs: int | None, overrides: Sequence[str], far: Path = FAR) -> int:
    """Trains both models in turn, from wherever they are, for so many seconds, and fills $OUT.

    Args:
      seconds: after which the run at hand is asked to save and end.
      epochs: of each model, the same in every call; None follows the recipe of `probe`.
      overrides: --config.a.b=value for every run.
      far: where the recipe, the data and the runs lie.

    Returns:
      0: both are finished; 75: the next call goes on; otherwise the exit code of the run that failed.

    Raises:
      KitError: neither `epochs` nor a recipe says how long to train.
    """
    deadline = time.monotonic() + seconds
    recipe = far / "recipe.json"
    if not (epochs or recipe.exists()):
        raise KitError("How many epochs? Give --epochs, or let `probe` choose them first.")
    followed = {"implementation": "gpu"} | (json.loads(recipe.read_text()) if recipe.exists() else {})
    fields = {
        "epochs": epochs or followed["epochs"],
        "model.implementation": followed["implementation"],
        "data.data_dir": far / "tfds",
        "data.workers": WORKERS,
    }
    overrides = [*(f"--config.{name}={value}" for name, value in fields.items()), *overrides]
    failed = 0
    for name in MODELS:
        workdir = far / "runs" / name
        if (workdir / "summary.json").exists():
            continue
        if deadline - time.monotonic() < WORTH_STARTING:
            return PREEMPTED
        status = run_until(deadline, train_command(name, workdir, overrides), far)
        bring_back(name, workdir, far)
        if status == PREEMPTED:
            return PREEMPTED
        failed = failed or status
    return failed


def bring_back(name: str, workdir: Path, far: Path = FAR) -> None:
    """Lays a run's figures, and its evaluated weights where a checkpoint is, into $OUT."""
    out = Path(os.environ.get("OUT") or far / "out")
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{name}.tar.gz", "w:gz") as tar:
        for file in sorted([*workdir.glob("*.json"), *workdir.glob("*.jsonl")]):
            tar.add(file, f"{name}/{file.name}")
    if (far / "recipe.json").exists():
        shutil.copyfile(far / "recipe.json", out / "recipe.json")
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        return
    # On the processor, in a process of its own: there is no need to wait for the GPU.
    command = [
        sys.executable,
        "-m",
        "benchmarks.device_cifar",
        "export",
        str(workdir),
        str(out / f"{name}.npz"),
    ]
    if run_until(time.monotonic() + SAVING, command, far, JAX_PLATFORMS="cpu"):
        print(f"The weights of {name} could not be brought back", flush=True)


def export(workdir: Path, file: Path) -> None:
    """Writes the evaluated weights of a run's newest checkpoint (`adderflax.training.restore.write_weights`).

    Raises:
      KitError: the file is too large to be brought back, or a weight too large for float16.
    """
    from absl import logging

    from adderflax.training.restore import write_weights

    logging.set_verbosity(logging.ERROR)  # orbax warns that a directory opened for reading is read-only
    try:
        write_weights(workdir, file)
    except ValueError as error:
        raise KitError(str(error)) from error
    if file.stat().st_size > RETURNED:
        raise KitError(f"{file} has {file.stat().st_size / MIB:.1f} MiB; a call brings back files of 16.")


# --- the command line ---


def estimate(minutes: float, overrides: Sequence[str]) -> None:
    """Prints the seconds of an epoch of both models, and the epochs that so many minutes a model allow."""
    speeds = {}
    for name, file in MODELS.items():
        parts = seconds_an_epoch(*configured_counts(file, overrides))
        total = sum(parts.values())
        speeds[name] = EXAMPLES / total
        print(f"{file}: {total:.1f} s an epoch, {speeds[name]:,.0f} images/s")
        for part, seconds in parts.items():
            print(f"  {part:34s}{seconds:6.2f} s")
        alone = epochs_within(60 * minutes, [speeds[name]], starts=2)
        print(f"  {minutes:g} minutes allow {alone} epochs")
    both = epochs_within(120 * minutes, speeds.values())
    print(f"{2 * minutes:g} minutes allow {both} epochs of each. Assumed, not measured: {Rates()}")


def calls(pieces: int, minutes: float, overrides: Sequence[str] = ()) -> list[dict[str, object]]:
    """The device calls of a whole lease: command, timeout_s and carry of each, in order."""
    script = "python3 -m benchmarks.device_cifar"
    fields = "".join(f" {override}" for override in overrides)
    trains = f"{script} train --seconds"
    commands = [(f"{script} unpack 1 && {script} probe --minutes {minutes:g}{fields}", 480, [1])]
    commands += [(f"{script} unpack {number}", 120, [number]) for number in range(2, pieces)]
    commands += [(f"{script} unpack {pieces} && {trains} 480{fields}", 600, [pieces])]
    commands += [(f"{trains} 510{fields}", 600, [])] * 2
    return [
        {"command": command, "timeout_s": limit, "carry": [f".device/{number}" for number in carry]}
        for command, limit, carry in commands
    ]


def plan(minutes: float, overrides: Sequence[str], kit: Path = KIT) -> None:
    """Prints the calls for what `pack` laid ready."""
    pieces = sum(entry.name.isdigit() for entry in kit.iterdir()) if kit.is_dir() else 0
    if not pieces:
        raise KitError(f"{kit} is empty: begin with `python -m benchmarks.device_cifar pack --data_dir DIR`.")
    for number, call in enumerate(calls(pieces, minutes, overrides), 1):
        print(f"{number}. {json.dumps(call)}")
    print(
        "Each within 30 s of the one before; the last one again until its exit code is 0 (75: more to do);"
        " then give_back. Copy what a training call brought back: the next call replaces it."
    )


# Subcommands that take --config.a.b=value.
_CONFIGURED = ("plan", "estimate", "probe", "train")


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
    for name in ("plan", "probe"):
        add[name].add_argument("--minutes", type=float, default=20.0, help="for both trainings (default 20)")
    add["estimate"].add_argument("--minutes", type=float, default=12.0, help="for each model (default 12)")
    add["probe"].add_argument("--implementations", nargs="+", default=["gpu", "xla"], help="default gpu xla")
    add["train"].add_argument("--seconds", type=float, required=True, help="of this call")
    add["train"].add_argument("--epochs", type=int, help="of each model (default: as `probe` found)")
    add["export"].add_argument("workdir", type=Path)
    add["export"].add_argument("file", type=Path)
    arguments, overrides = parser.parse_known_args(argv)
    values = vars(arguments)
    function, takes_overrides = values.pop("function"), values.pop("subcommand") in _CONFIGURED
    if wrong := [text for text in overrides if not (takes_overrides and text.startswith("--config."))]:
        parser.error(f"unknown argument {wrong[0]}; fields are set by --config.a.b=value")
    if takes_overrides:
        values["overrides"] = overrides
    try:
        result = function(**values)
    except (KitError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    if function in (pack, probe):
        print(result)
    return result if function is train else 0


if __name__ == "__main__":
    sys.exit(main())
