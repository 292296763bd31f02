"""train.py and predict from the command line, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = ["--config.model.depth=1", "--config.model.embed_dim=16", "--config.model.patch_size=4"]


def command(*arguments, **keywords):
    # A proxy that refuses at once: where there is a network, nothing is downloaded either.
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    alone = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1")}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | alone | offline
    return dict(args=[sys.executable, *arguments], cwd=ROOT, env=environment, text=True) | keywords


def run(*arguments):
    return subprocess.run(**command(*arguments), capture_output=True, timeout=240)


def without_reader(*arguments, **keywords):
    """The process of a command whose output, errors included, nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        return subprocess.Popen(**command(*arguments), **{"stdout": nobody, "stderr": nobody} | keywords)


def error(*arguments):
    """The one paragraph that a mistake ends in."""
    done = run("train.py", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def digits(*arguments):
    return ["train.py", "--config", "configs/digits_adder_vit.py", *SMALL, *arguments]


def test_train_kill_resume_evaluate_predict(tmp_path):
    workdir = tmp_path / "run"
    arguments = digits(
        f"--workdir={workdir}",
        "--config.total_steps=400",
        "--config.checkpoint_every=20",
        "--config.eval_every=400",
        "--config.log_every=10",
    )
    process = subprocess.Popen(**command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    checkpoints = workdir / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists()

    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from step " in resumed.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 400 and summary["test_examples"] == 359
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]
    assert steps == sorted(steps) and steps[0] == 10 and steps[-1] == 400

    evaluated = run("train.py", f"--workdir={workdir}", "--eval_only")
    assert json.loads(evaluated.stdout)["test_accuracy"] == summary["test_accuracy"], evaluated.stderr

    unread = without_reader("train.py", f"--workdir={workdir}", "--eval_only", stderr=subprocess.PIPE)
    assert (unread.communicate()[1].count("Traceback"), unread.returncode) == (0, 128 + signal.SIGPIPE)

    noise = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    predicted = run(
        "-m", "adderflax.predict", str(workdir), str(tmp_path / "noise.png"), "--json", "--top=10"
    )
    probabilities = json.loads(predicted.stdout)["probabilities"]
    assert sorted(probabilities) == [str(digit) for digit in range(10)], predicted.stderr
    assert abs(sum(probabilities.values()) - 1) < 1e-5
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)

    missing = run("-m", "adderflax.predict", str(workdir), str(tmp_path / "none.png"))
    assert missing.returncode == 1 and "none.png" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:300])
    cut = run("-m", "adderflax.predict", str(workdir), str(tmp_path / "cut.png"), str(tmp_path / "noise.png"))
    assert cut.stdout.startswith(f"{tmp_path / 'noise.png'}: ") and cut.stdout.count("\n") == 1
    assert cut.returncode == 1 and "cut.png cannot be read" in cut.stderr and "Traceback" not in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.modle.identity=False"], "no field 'modle'. Did you mean 'model'?"),
        (["--config.seed=abc"], "--config.seed=abc: invalid literal for int()"),
        (["--config.model.arithmetic=add"], "arithmetic='add' is not known; choose one of 'adder'"),
        (
            ["--config=configs/cifar10_adder_vit.py"],
            "--config is given 2 times: configs/digits_adder_vit.py, ",
        ),
        (
            ["--config.model.implementation=gpu"],
            "='gpu' does not run on this platform, cpu: choose one of 'refe",
        ),
        (["--config.data.image_size=9"], "image_size=9 is not a multiple of patch_size=4"),
        (["--config.batch_size=5000"], "batch_size=5000"),
        (["--data_dir=sets"], "--data_dir goes with --eval_only. To train, set --config.data.data_dir"),
        (["--best"], "--best goes with --eval_only: training goes on from the newest checkpoint"),
        (["--eval_only", "--extend"], "--extend and --profile_steps go with training, which --eval_only"),
        (["--eval_only", "--profile_steps=2:3"], "--extend and --profile_steps go with training, which"),
        (["--config.epochs=inf"], "epochs=inf must be finite and greater than 0"),
        (["--config.seed=4294967296"], "seed=4294967296 must be below 2^32"),
        (["--config.optimizer.beta1=1.0"], "optimizer.beta1=1.0 must lie in [0, 1)"),
        (["--workdir=/proc/run"], "The workdir /proc/run cannot be written"),
        (["extra"], "Unexpected argument 'extra'; flags begin with --"),
    ],
)
def test_mistakes(tmp_path, arguments, expected):
    assert expected in error(*digits(f"--workdir={tmp_path}", *arguments)[1:])
    assert not list(tmp_path.iterdir())


def test_an_unknown_argument_of_a_configuration():
    told = error("--config=configs/cifar10_adder_vit.py:nosuch")
    assert (
        "'nosuch' is not known; choose one of 'adder', 'multiply', 'vit', 'custom', 'taught', 'warm'." in told
    )


def test_help_that_nobody_reads_ends_quietly():
    unread = without_reader("train.py", "--help", stderr=subprocess.PIPE)
    assert (unread.communicate()[1], unread.returncode) == ("", 128 + signal.SIGPIPE)


def test_a_training_that_nobody_reads_goes_on_until_it_is_told_to_stop(tmp_path):
    """Ctrl-C, which ends ``tee`` in ``train.py | tee log`` too, must not cost what has not been saved."""
    steps = ["--config.total_steps=100000", "--config.eval_every=20", "--config.checkpoint_every=100000"]
    unread = without_reader(*digits(f"--workdir={tmp_path}", "--config.log_every=1", *steps))
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and "validation_loss" in metrics.read_text()):
        assert unread.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    unread.send_signal(signal.SIGTERM)
    assert unread.wait() == 75
    assert any((tmp_path / "checkpoints").iterdir())


TFDS = ROOT.parent / "shared" / "tfds"


@pytest.mark.slow
@pytest.mark.skipif(not TFDS.exists(), reason=f"{TFDS} with the real image sets is not there")
@pytest.mark.parametrize(
    ("config", "overrides", "examples"),
    [
        ("cifar10_adder_vit", ["--config.total_steps=40", "--config.batch_size=64"], 10_000),
        ("imagenette_adder_deit_ti", ["--config.total_steps=3", "--config.batch_size=8"], 393),
    ],
)
def test_real_images(tmp_path, config, overrides, examples):
    done = run(
        "train.py",
        f"--config=configs/{config}.py",
        f"--config.data.data_dir={TFDS}",
        f"--workdir={tmp_path}",
        "--config.model.depth=1",
        "--config.log_every=1",
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["test_examples"] == examples
    losses = [json.loads(line).get("train_loss") for line in (tmp_path / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert np.isfinite(losses).all()
    if config.startswith("cifar10"):
        assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_an_evaluation_that_is_interrupted_ends_quietly():
    # Raised in this thread: another one that took it would leave this one waiting.
    interrupted = """
import runpy, signal, sys
from adderflax.training import trainer
trainer.evaluate = lambda *a, **k: signal.raise_signal(signal.SIGINT)
sys.argv = ["train.py", "--workdir=runs/any", "--eval_only"]
runpy.run_path("train.py", run_name="__main__")
"""
    done = run("-c", interrupted)
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr


def test_missing_configuration():
    assert "--config is missing" in error()
    assert "no configuration file configs/no_such.py" in error("--config", "configs/no_such.py")


def test_a_mistake_in_the_configuration(tmp_path):
    file = tmp_path / "half_written.py"
    file.write_text("def get_config(:\n")
    assert error("--config", str(file)) == f"error: {file} line 1: invalid syntax."


def test_missing_data_set(tmp_path):
    places = [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}"]
    message = error("--config", "configs/cifar10_adder_vit.py", *places)
    assert "cifar10" in message and "configs/digits_adder_vit.py" in message
    # A finished run, on a machine that keeps its sets elsewhere.
    message = error("--workdir=weights/cifar10_twin", "--eval_only", f"--data_dir={tmp_path / 'sets'}")
    assert f"data.data_dir='{tmp_path / 'sets'}'" in message


def test_a_workdir_without_a_run(tmp_path):
    assert "is not a run's workdir" in error(f"--workdir={tmp_path}", "--eval_only")
