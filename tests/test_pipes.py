"""Output whose reader leaves: commands end quietly, training goes on, and all else that fails is told."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from adderflax import pipes
from benchmarks.device_estimate import Counts

ROOT = Path(__file__).parent.parent


def run(*arguments, code=None, unbuffered=False):
    """(status, standard error) of a command that writes to a pipe without a reader."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    try:
        done = subprocess.run(
            [sys.executable, *arguments, *(["-c", code] if code else [])],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def guarded(body, guard="reader_may_leave"):
    # Without the package, whose import of jax takes seconds.
    load = "from importlib.util import *; spec = spec_from_file_location('pipes', 'adderflax/pipes.py')\n"
    load += "import os, sys; pipes = module_from_spec(spec); spec.loader.exec_module(pipes)\n"
    return f"{load}with pipes.{guard}():\n    {body}\n"


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("body", ["print('a')", "print('a' * 100_000)", "print('a'); print('b', flush=True)"])
def test_the_end_is_quiet(body, unbuffered):
    assert run(code=guarded(body), unbuffered=unbuffered) == (pipes.STATUS, "")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    ("body", "ended"),
    [
        ("print('a')", (0, "")),
        ("print('a' * 100_000, flush=True); print('b'); sys.exit(75)", (75, "")),
        ("print('a', flush=True); print('b', file=sys.stderr, flush=True)", (0, "b\n")),
        ("os.dup2(1, 2); print('a', file=sys.stderr, flush=True); print('b')", (0, "")),
        ("os.write(1, b'a')", (1, "BrokenPipeError: [Errno 32] Broken pipe\n")),
    ],
)
def test_what_must_be_finished_goes_on(body, ended, unbuffered):
    status, told = run(code=guarded(body, "reader_may_leave_unheeded"), unbuffered=unbuffered)
    assert (status, told[-len(ended[1]) :]) == ended


def test_what_must_be_finished_needs_no_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pipes.reader_may_leave_unheeded():
        print("a", flush=True)


@pytest.mark.parametrize("stdout", [io.StringIO(), None])
def test_without_a_file_there_is_no_reader_to_leave(stdout, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(BrokenPipeError, match="of another"), pipes.reader_may_leave():
        raise BrokenPipeError("of another")


def test_what_fails_besides_is_told():
    assert run(code=guarded("print('a'); sys.exit('error: b')")) == (1, "error: b\n")
    status, told = run(code=guarded("print('a'); 1 / 0"))
    assert status == 1 and told.endswith("ZeroDivisionError: division by zero\n")
    assert "BrokenPipe" not in told


def test_other_pipes_and_full_disks_are_no_readers_that_left():
    other = guarded("ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b'a')")
    with open("/dev/full", "w") as full:
        for code, stdout, expected in (
            (other, subprocess.DEVNULL, "BrokenPipeError: [Errno 32] Broken pipe"),
            (other, subprocess.PIPE, "BrokenPipeError: [Errno 32] Broken pipe"),
            (guarded("print('a')"), full, "OSError: [Errno 28] No space left on device"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            assert done.returncode and done.stderr.splitlines()[-1] == expected


def test_a_real_command_and_head():
    command = f"'{sys.executable}' -m adderflax.energy --config configs/digits_adder_vit.py | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("configs/digits_adder_vit.py: ") and done.stdout.count("\n") == 1
    assert not done.stderr


def test_a_script_without_the_package():
    assert run("benchmarks/device_gpu.py", "--help") == (pipes.STATUS, "")


def fake(value):
    return lambda *_, **__: value


@contextlib.contextmanager
def nobody_reads(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        yield


CIFAR = "weights/cifar10_twin"
DIGITS = ["--config", "configs/digits_adder_vit.py"]
# Of each command the arguments, and what stands for its work.
COMMANDS = {
    "adderflax.energy": (DIGITS, {}),
    "adderflax.diversity": (
        [CIFAR],
        {"measure_workdir": fake((type("", (), {"figures": fake({})}), None)), "as_text": fake("a")},
    ),
    "adderflax.export": ([CIFAR, "nowhere"], {"export_workdir": fake({"operations": []})}),
    "adderflax.predict": ([CIFAR, "docs/run_page.png"], {"predict": fake([{"cat": 1.0}])}),
    "adderflax.report": ([CIFAR], {"write_run_page": fake("report.html")}),
    "adderflax.study": (["studies/rank_digits.py", "--report"], {"write_page": fake("page.md")}),
    "adderflax.pods": ([], {"pods.missing_compiler": fake("no compiler")}),
    "adderflax.data.prepare": (["digits"], {}),
    "benchmarks.operators": (["--page"], {"write_page": fake([])}),
    "benchmarks.step": (DIGITS, {"split_step": fake({"step": 1.0})}),
    "benchmarks.templates": ([], {"agreement": fake(0.0)}),
    "benchmarks.device_cifar": (["estimate"], {"configured_counts": fake((Counts(1, 1, 1, 1, 1), 1))}),
    "benchmarks.input": ([], {"measure": fake({}), "as_markdown": fake("a")}),
}


@pytest.mark.parametrize("name", COMMANDS)
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_every_command_that_prints_a_table(name, monkeypatch, tmp_path):
    module, (arguments, work) = importlib.import_module(name), COMMANDS[name]
    for attribute, replacement in work.items():
        monkeypatch.setattr(f"{name}.{attribute}", replacement)
    monkeypatch.chdir(ROOT)
    output = [f"--output={tmp_path / 'figures'}"] if name == "benchmarks.input" else []
    monkeypatch.setattr(sys, "argv", [name, *arguments, *output])
    with nobody_reads(monkeypatch), pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == pipes.STATUS


def test_a_study_goes_on(monkeypatch):
    done = []

    def run_study(*_, **__):
        for run in range(3):
            print(run, flush=True)
            done.append(run)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("adderflax.study.run_study", run_study)
    monkeypatch.setattr("adderflax.study.write_page", fake("page.md"))
    with nobody_reads(monkeypatch):
        importlib.import_module("adderflax.study").main(["studies/rank_digits.py"])
    assert done == [0, 1, 2]
