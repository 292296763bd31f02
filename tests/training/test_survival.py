"""A run that is killed, told to stop, damaged or out of disk ends with the bits of one that was not."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from adderflax.training import preemption
from adderflax.training import workdir as workdir_lib
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import default_config
from adderflax.training.metrics import read_metrics
from adderflax.training.trainer import Trainer, train
from adderflax.training.workdir import WorkdirError

# A server that imports everything once and forks: a killed process is followed within a second or two.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["adderflax.training.trainer", "sklearn.datasets"])


def tiny_config(**fields):
    """Real digits, one block of width 16, everything that is random switched on."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 32,
            "total_steps": 60,
            "eval_every": 20,
            "checkpoint_every": 10,
            "log_every": 1,
            "ema_decay": 0.9,
            "model.patch_size": 4,
            "model.embed_dim": 16,
            "model.num_heads": 2,
            "model.depth": 1,
            "model.drop_path_rate": 0.1,
            "model.implementation": "xla",
            "augment.crop_padding": 1,
        }
        | fields
    )
    return config


def _train(config, workdir, log):
    os.dup2(os.open(log, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.setsid()  # a process group of its own, as a terminal's command has
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests with &
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    train(config, workdir, progress=False)


class Running:
    """`train` in a process of its own."""

    def __init__(self, config, workdir):
        self._log = tempfile.NamedTemporaryFile("r", prefix="train-", suffix=".log")
        self.process = PROCESSES.Process(target=_train, args=(config, str(workdir), self._log.name))
        self.process.start()

    @property
    def log(self):
        """What it has printed."""
        return Path(self._log.name).read_text()

    def wait(self):
        self.process.join(1200)
        return self.process.exitcode

    def kill_when(self, condition):
        """Sends SIGKILL as soon as the condition holds; False if the process ended before it did."""
        while not condition():
            if not self.process.is_alive():
                assert self.process.exitcode == 0, self.log
                return False
            time.sleep(0.003)
        self.process.kill()
        return self.wait() == -signal.SIGKILL


def last_logged(workdir):
    lines = read_metrics(workdir)
    return lines[-1]["step"] if lines else 0


def unfinished_saves(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def whole_state(workdir, config):
    """Every array of the newest checkpoint: step, parameters, average, optimizer's state and key."""
    with Checkpointer(workdir, read_only=True) as checkpointer:
        state = checkpointer.restore_state(Trainer(config).abstract_state())
    return jax.device_get(jax.tree.leaves(state.replace(key=jax.random.key_data(state.key))))


def assert_same_state(workdir, undisturbed, config):
    for ours, theirs in zip(whole_state(workdir, config), whole_state(undisturbed, config), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_same_run(workdir, undisturbed, config):
    assert_same_state(workdir, undisturbed, config)
    figures = [
        [{name: line[name] for name in line if name != "images_per_second"} for line in read_metrics(path)]
        for path in (workdir, undisturbed)
    ]
    assert figures[0] == figures[1]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (workdir, undisturbed)]
    for name in ("test_loss", "test_accuracy", "best_step", "steps"):
        assert summaries[0][name] == summaries[1][name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run of `tiny_config`, never disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    running = Running(tiny_config(), workdir)
    assert running.wait() == 0, running.log
    return workdir


def chaos(workdir, config, *, kills, seed):
    """Trains to the end under so many SIGKILLs at random steps, every third in the middle of a save."""
    rng = random.Random(seed)
    for count in range(kills):
        if count % 3 == 1:
            assert any(kill_amid_save(workdir, config) for _ in range(10)), "every save outran its kill"
        else:
            target = last_logged(workdir) + rng.randint(1, 8)
            if count == kills - 1:
                # So late that an average that was lost is not forgotten before the end.
                target = max(target, 2 * config.total_steps // 3)
            running = Running(config, workdir)

            def due(target=target, first=count == 0):
                # But for the first kill something has been saved: the end must be a resumed run's.
                return last_logged(workdir) >= target and (first or workdir_lib.has_checkpoints(workdir))

            assert running.kill_when(due), running.log
    last = Running(config, workdir)
    assert last.wait() == 0, last.log
    assert "Resumed from step" in last.log


def kill_amid_save(workdir, config):
    """Whether the kill left a half-written save behind."""
    running = Running(config, workdir)
    # What the last kill left is gone by then: this is a save of this process.
    begun = " parameters, steps "
    assert running.kill_when(lambda: begun in running.log and unfinished_saves(workdir)), running.log
    return bool(unfinished_saves(workdir))


def test_three_kills(tmp_path, undisturbed):
    chaos(tmp_path / "run", tiny_config(), kills=3, seed=0)
    assert_same_run(tmp_path / "run", undisturbed, tiny_config())


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    config = tiny_config(total_steps=600)
    calm = Running(config, tmp_path / "calm")
    assert calm.wait() == 0, calm.log
    began = time.monotonic()
    chaos(tmp_path / "run", config, kills=50, seed=1)
    print(f"50 kills, 16 of them amid a save, survived in {time.monotonic() - began:.0f} s")
    assert_same_run(tmp_path / "run", tmp_path / "calm", config)


def test_told_to_stop(tmp_path, undisturbed):
    """SIGTERM saves where the run stands; going on gives the bits of a run that was not stopped."""
    workdir, config = tmp_path / "run", tiny_config(eval_every=60, checkpoint_every=60)
    running = Running(config, workdir)
    while last_logged(workdir) < 30:  # an average that was lost before would be forgotten at the end
        assert running.process.is_alive(), running.log
        time.sleep(0.005)
    # Twice, as `timeout` does: the process and its group.
    os.kill(running.process.pid, signal.SIGTERM)
    time.sleep(0.05)  # else the two merge
    os.killpg(running.process.pid, signal.SIGTERM)
    assert running.wait() == 75, running.log
    (step,) = re.findall(r"Stopped by SIGTERM at step (\d+), saved; the same command goes on", running.log)
    assert int(step) < 60
    with Checkpointer(workdir, read_only=True) as checkpointer:
        assert checkpointer.latest_step == last_logged(workdir) == int(step)
    again = Running(config, workdir)
    assert again.wait() == 0 and f"Resumed from step {step}\n" in again.log, again.log
    assert_same_state(workdir, undisturbed, config)


def children(pid):
    listed = (task.joinpath("children") for task in Path(f"/proc/{pid}/task").iterdir())
    return [int(child) for file in listed for child in file.read_text().split()]


def test_data_workers_outlive_ctrl_c_but_not_their_trainer(tmp_path):
    """Ctrl-C reaches the whole process group, and SIGKILL the trainer alone."""
    config = tiny_config(**{"data.cache": False, "data.workers": 1, "eval_every": 60})
    for number, exit_code in ((signal.SIGINT, 75), (signal.SIGKILL, -signal.SIGKILL)):
        running = Running(config, tmp_path / "run")
        start = last_logged(tmp_path / "run")
        while last_logged(tmp_path / "run") < start + 2:
            assert running.process.is_alive(), running.log
            time.sleep(0.005)
        workers = children(running.process.pid)
        assert workers
        if number == signal.SIGINT:
            os.killpg(running.process.pid, number)
        else:
            running.process.kill()
        assert running.wait() == exit_code, running.log
        assert "Traceback" not in running.log
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_second_signal_exits_at_once(tmp_path):
    workdir = tmp_path / "run"
    running = Running(tiny_config(), workdir)
    while not last_logged(workdir):
        assert running.process.is_alive(), running.log
        time.sleep(0.01)
    # Both arrive when it goes on: it has no time to finish a step between them.
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(running.process.pid, number)
    assert running.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT), running.log
    assert "Stopped by" not in running.log


def test_handlers_are_put_back(request):
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    os.setsid()  # a process group of its own, as a terminal's command has
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.StopSignals() as signals:
        assert not signals.should_stop(1)
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    # One that nobody asked for any more, as in the last validation, ends the run as any other does.
    with pytest.raises(preemption.Preempted) as caught, preemption.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        while not signals.should_stop(1):
            time.sleep(0.01)
    assert caught.value.code == 75
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("method", ["train_batches", "new_state"])
def test_a_signal_before_the_first_update_ends_the_run(method, tmp_path, monkeypatch, capfd, request):
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    computed = getattr(Trainer, method)

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # where KeyboardInterrupt would be raised
        return computed(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(preemption.Preempted) as caught:
        patched.setattr(Trainer, method, interrupted)
        train(tiny_config(), tmp_path / "run", progress=False)
    assert caught.value.code == 75
    told = "\nSIGINT: stopping before the next step; a second signal exits at once\n"
    assert told + "Stopped by SIGINT before an update" in capfd.readouterr().err
    assert not workdir_lib.has_checkpoints(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _hold(workdir, ready):
    """A writer with a worker of the kind that inherits everything."""
    with workdir_lib.writing(workdir):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        ready.put(worker.pid)
        time.sleep(600)


@pytest.mark.parametrize(
    ("signals", "exits"),
    [
        ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 0.1)], None),
        ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 0.3)], 128 + signal.SIGTERM),
        ([(signal.SIGTERM, 0.0), (signal.SIGINT, 0.1)], 128 + signal.SIGINT),
        ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 0.1), (signal.SIGTERM, 0.3)], 128 + signal.SIGTERM),
    ],
    ids=["at once", "later", "another", "both"],
)
def test_which_signal_is_a_second_one(monkeypatch, signals, exits):
    class Exited(Exception):
        pass

    def leave(code):
        raise Exited(code)

    times = iter(time for _, time in signals)
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(preemption.os, "_exit", leave)
    reading, writing = os.pipe()
    os.write(writing, bytes([number for number, _ in signals] + [0]))
    os.close(writing)
    stop, found = preemption.StopSignals(), None
    try:
        stop._watch(reading)
    except Exited as exited:
        (found,) = exited.args
    assert found == exits and stop._received == signal.SIGTERM


def test_a_signal_counts_though_nobody_reads_that_it_came(monkeypatch):
    def write(*_):
        raise BrokenPipeError

    reading, writing = os.pipe()
    os.write(writing, bytes([signal.SIGTERM, 0]))
    os.close(writing)
    monkeypatch.setattr(preemption.os, "write", write)
    stop = preemption.StopSignals()
    stop._watch(reading)
    assert stop._received == signal.SIGTERM


def test_a_second_writer_is_refused_and_the_lock_dies_with_the_first(tmp_path, undisturbed):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    ready = PROCESSES.Queue()
    writer = PROCESSES.Process(target=_hold, args=(workdir, ready))
    writer.start()
    worker = ready.get(timeout=600)
    try:
        with pytest.raises(WorkdirError, match=f"being written by process {writer.pid} on .*--workdir"):
            train(tiny_config(), workdir, progress=False)
        with Checkpointer(workdir, read_only=True) as reader:
            assert reader.latest_step == 60
        writer.kill()
        writer.join()
        os.kill(worker, 0)  # still there
        with workdir_lib.writing(workdir):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def newest_file(workdir, pattern):
    """The largest file of the newest checkpoint that fits."""
    return max((workdir / "checkpoints" / "60").rglob(pattern), key=lambda file: file.stat().st_size)


def cut(workdir):
    file = newest_file(workdir, "ocdbt.process_0/d/*")
    os.truncate(file, file.stat().st_size // 2)
    return "has .* bytes instead of"


def flip(workdir):
    """One bit of an array: orbax itself restores other values without a word."""
    file = newest_file(workdir, "ocdbt.process_0/d/*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    return "has the right size but other contents"


def lose_figures(workdir):
    """Unnoticed, another checkpoint would be the best one."""
    shutil.rmtree(workdir / "checkpoints" / "60" / "metrics")
    return "metrics/metrics is missing"


def lose_most(workdir):
    """A copy that was broken off."""
    for entry in list((workdir / "checkpoints" / "60").iterdir()):
        if entry.name != "state":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return "manifest.json is missing"


@pytest.mark.parametrize("damage", [cut, flip, lose_figures, lose_most])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, undisturbed, capfd, damage):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    what = damage(workdir)
    best = json.loads((workdir / "summary.json").read_text())["best_step"]
    left = (50, best if best < 60 else None)
    damaged = sorted((workdir / "checkpoints" / "60").rglob("*"))
    with Checkpointer(workdir, read_only=True) as reader:
        assert (reader.latest_step, reader.best_step) == left
    assert re.search(rf"Damaged in {workdir}/checkpoints: checkpoint 60 \(.*{what}", capfd.readouterr().err)
    assert sorted((workdir / "checkpoints" / "60").rglob("*")) == damaged  # a reader moves nothing
    with Checkpointer(workdir) as writer:
        assert (writer.latest_step, writer.best_step) == left
    assert f"Checkpoint 60 is now {workdir}/damaged/60" in capfd.readouterr().err
    assert len(list((workdir / "damaged" / "60").rglob("*"))) == len(damaged)


def test_a_damaged_checkpoint_is_computed_again(tmp_path, undisturbed, capfd):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    flip(workdir)
    again = Running(tiny_config(), workdir)
    assert again.wait() == 0 and "Resumed from step 50" in again.log, again.log
    assert_same_run(workdir, undisturbed, tiny_config())
    assert (workdir / "damaged" / "60").is_dir()


def test_when_everything_is_damaged_nothing_is_touched(tmp_path, undisturbed):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    before = sorted(workdir.rglob("*"))
    for opened in (lambda: Checkpointer(workdir), lambda: Checkpointer(workdir, read_only=True)):
        with pytest.raises(WorkdirError, match=r"Every checkpoint .* checkpoint 60 .* checkpoint 50 .*"):
            opened()
    assert sorted(workdir.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def fill(disk):
    with contextlib.suppress(OSError), (disk / "ballast").open("wb") as ballast:
        while True:
            ballast.write(bytes(4096))
            ballast.flush()


def test_a_save_that_finds_no_room(small_disk):
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    state = {"w": np.arange(300_000, dtype=np.float32) % 9973}
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, state, data, None)
    message = "Checkpoint 2 could not be written .*: the disk is full.*checkpoint 1 is intact.*same command"
    with pytest.raises(WorkdirError, match=message), Checkpointer(small_disk) as checkpointer:
        fill(small_disk)
        checkpointer.save(2, state, data, None)
        checkpointer.wait()
    (small_disk / "ballast").unlink()
    with Checkpointer(small_disk) as checkpointer:
        assert checkpointer.latest_step == 1
        checkpointer.save(2, state, data, None)
        checkpointer.wait()
        np.testing.assert_array_equal(checkpointer.restore_state(state)["w"], state["w"])


def test_a_full_disk(small_disk, undisturbed):
    workdir = small_disk / "run"
    running = Running(tiny_config(), workdir)
    while not workdir_lib.has_checkpoints(workdir):
        assert running.process.is_alive(), running.log
        time.sleep(0.005)
    fill(small_disk)
    assert running.wait() == 1
    last_line = running.log.splitlines()[-1]
    assert re.search("WorkdirError: .*(disk is full|No space left).*the same command goes on", last_line)
    (small_disk / "ballast").unlink()
    again = Running(tiny_config(), workdir)
    assert again.wait() == 0 and "Resumed from step" in again.log, again.log
    assert "Damaged" not in again.log
    assert_same_run(workdir, undisturbed, tiny_config())
