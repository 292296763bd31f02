"""Two real processes, joined by jax.distributed over gloo, against one process with as many devices."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from adderflax.training import distributed, preemption, sharding
from adderflax.training.command_line import load_config
from adderflax.training.distributed import DistributedError
from adderflax.training.metrics import read_metrics
from adderflax.training.restore import load_model
from adderflax.training.trainer import train

ROOT = Path(__file__).parents[2]
# The sums of two processes are those of two devices of one, in whatever order gloo takes them.
TOLERANCE = 1e-5


CONFIG = "configs/digits_adder_vit.py"
SMALL = [
    *("--config.model.depth=1", "--config.model.embed_dim=16", "--config.model.patch_size=4"),
    *("--config.model.implementation=reference", "--config.total_steps=60", "--config.log_every=10"),
    *("--config.checkpoint_every=20", "--config.eval_every=60"),
]


def wait_for(processes, condition):
    """Until the condition holds, which it does before they end."""
    deadline = time.monotonic() + 1200
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_two(workdir):
    """The run in two processes of one CPU device each."""
    command = [
        sys.executable,
        "train.py",
        f"--config={CONFIG}",
        *SMALL,
        f"--workdir={workdir}",
        "--noprogress",
    ]
    environment = os.environ | {"XLA_FLAGS": ""}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [*command, address, "--num_processes=2", f"--process_id={index}"],
            cwd=ROOT,
            env=environment,
            **pipes,
        )
        for index in range(2)
    ]


def finish(processes):
    """What each of them printed; all have succeeded."""
    outputs = [process.communicate(timeout=1200) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [out for out, _ in outputs]


@pytest.mark.slow  # over a minute of both cores
def test_two_processes_train_die_resume_and_agree_with_one(tmp_path, capsys):
    two, one = tmp_path / "two", tmp_path / "one"
    # One of them is told to stop, and both do, after the same update.
    processes = start_two(two)
    wait_for(processes, lambda: read_metrics(two))
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=1200) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    (stopped,) = re.findall(r"Stopped by SIGTERM at step (\d+), saved", outputs[0][0])
    assert int(stopped) % 8 == 0 and (two / "checkpoints" / stopped / "manifest.json").exists()

    processes = start_two(two)
    saved = {path.name for path in (two / "checkpoints").iterdir()}
    wait_for(
        processes,
        lambda: any(
            path.name.isdigit() and path.name not in saved for path in (two / "checkpoints").iterdir()
        ),
    )
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert not (two / "summary.json").exists()

    first, second = finish(start_two(two))
    assert "Resumed from step " in first
    assert not [line for line in second.splitlines() if not line.startswith("[Gloo]")]
    train(load_config(CONFIG, SMALL), one, progress=False)  # this process has two devices

    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, two)]
    assert all(summary["test_examples"] == 359 for summary in summaries)
    assert len(summaries[1]["devices"]) == 2
    np.testing.assert_allclose(summaries[0]["test_loss"], summaries[1]["test_loss"], rtol=TOLERANCE)
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]
    logs = [[(line["step"], line.get("train_loss")) for line in read_metrics(path)] for path in (one, two)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]]
    losses = [[loss for _, loss in log if loss is not None] for log in logs]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE)
    parameters = [jax.tree.leaves(load_model(path)[1]) for path in (one, two)]
    for ours, theirs in zip(*parameters):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(abs(ours).max()))
    assert len(list((two / "checkpoints" / "60" / "data").glob("process_*-of-2.json"))) == 2
    # What two processes have saved, one goes on from.
    capsys.readouterr()
    train(load_config(CONFIG, [*SMALL, "--config.total_steps=62"]), two, extend=True, progress=False)
    assert "Resumed from step 60" in capsys.readouterr().out


def test_nobody_to_join():
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/digits_adder_vit.py", "--num_processes=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot join the others" in line and "--coordinator_address=HOST:PORT" in line


def test_processes_stop_at_the_same_step(monkeypatch):
    """Where another one was told to; they ask each other every eighth step, and after the last."""
    told, asked = [0, 0], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gather(own):
        asked.append(int(own))
        return np.array(told)

    monkeypatch.setattr(preemption.multihost_utils, "process_allgather", gather)
    with pytest.raises(preemption.Preempted), preemption.StopSignals() as signals:
        assert not any(signals.should_stop(step) for step in range(1, 9))
        told[1] = signal.SIGTERM
        assert [signals.should_stop(step) for step in range(9, 17)] == [False] * 7 + [True]
        signals.stop(16, lambda text: None)
    assert asked == [0, 0]
    with pytest.raises(preemption.Preempted), preemption.StopSignals() as signals:
        assert not signals.should_stop(17)


class Device:
    """A device of some process."""

    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("devices", "processes", "tensor", "shares"),
    [
        (4, 2, 1, [(0, 2), (1, 2)]),
        (8, 4, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (8, 4, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes hold the same rows
        (6, 2, 2, None),  # three devices each: one lies between two parts
    ],
)
def test_which_rows_a_process_reads(monkeypatch, devices, processes, tensor, shares):
    grid = [Device(number, number * processes // devices) for number in range(devices)]
    mesh = type("Mesh", (), {})()
    mesh.devices = np.array(grid).reshape(-1, 1, tensor)
    mesh.shape = dict(zip(sharding.AXES, mesh.devices.shape))
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        if shares is None:
            with pytest.raises(ValueError, match="mesh.tensor=2 does not fit"):
                sharding.process_share(mesh)
        else:
            assert sharding.process_share(mesh) == shares[index]


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_process_goes_first_and_its_failure_is_everybodys(monkeypatch, index):
    order = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(
        distributed.ocp.multihost, "get_barrier_sync_fn", lambda: lambda **_: order.append("wait")
    )
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda flag: flag)
    assert distributed.first_process_first(lambda: order.append("act") or 7, "test") == 7
    assert order == (["act", "wait"] if index == 0 else ["wait", "act"])

    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda flag: np.int32(1))

    def fail():
        raise OSError("no such data")

    with pytest.raises(OSError if index == 0 else DistributedError, match="no such data|first process"):
        distributed.first_process_first(fail, "test")


def test_an_address_without_a_port():
    with pytest.raises(DistributedError, match="--coordinator_address=HOST:PORT"):
        distributed.initialize("somewhere", 1, 0)
