"""The script for a lent GPU machine: what travels arrives whole, and its calls and estimates add up."""

import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import device_cifar as script
from benchmarks import device_estimate, device_kit


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A packing of 50 kB of noise and one small wheel in pieces of 20 kB: (kit, data)."""
    data = tmp_path / "tfds" / "cifar10" / "noise"
    data.parent.mkdir(parents=True)
    data.write_bytes(np.random.default_rng(0).bytes(50_000))
    monkeypatch.setattr(device_kit, "PIECE", 20_000)
    monkeypatch.setattr(
        device_kit, "download_wheels", lambda folder: (folder / "a.whl").write_bytes(b"a" * 5000)
    )
    monkeypatch.setattr(device_kit, "install_wheels", lambda wheels, site: site.mkdir())
    kit = tmp_path / "kit"
    assert device_kit.pack(tmp_path / "tfds", kit) == 3
    return kit, data


def test_pieces_are_joined_in_any_order(packed, tmp_path):
    kit, data = packed
    far = tmp_path / "far"
    for number in range(1, 4):
        carried = sum(file.stat().st_size for file in (kit / str(number)).rglob("*") if file.is_file())
        assert carried < 20_000 + 1000  # the manifest
    assert [device_kit.unpack(number, kit, far) for number in (3, 1, 2)] == [False, False, True]
    assert (far / "tfds" / "cifar10" / "noise").read_bytes() == data.read_bytes()
    assert (far / "site").is_dir()


def test_damage_and_mixed_packings_are_refused(packed, tmp_path):
    kit, _ = packed
    far, part = tmp_path / "far", kit / "2" / "part"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(device_kit.KitError, match="Piece 2 arrived damaged"):
        device_kit.unpack(2, kit, far)
    with pytest.raises(device_kit.KitError, match="no piece 4"):
        device_kit.unpack(4, kit, far)
    part.write_bytes(whole)
    for number in (1, 2):
        device_kit.unpack(number, kit, far)
    (far / "parts" / "1").write_bytes(b"of another packing")
    with pytest.raises(device_kit.KitError, match="do not belong together"):
        device_kit.unpack(3, kit, far)
    assert not (far / "tfds").exists()


def test_the_machine_takes_every_call():
    fields = ["--config.model.dtype=bfloat16", "--config.augment.randaugment_layers=0"]
    calls = script.calls(3, {"multiply": 60.0, "taught": 60.0}, fields, probed=True)
    # A lease is short: nothing is probed unasked.
    unasked = script.calls(3, {"multiply": 60.0, "taught": 60.0}, fields)
    assert unasked[0]["command"] == calls[0]["command"].partition(" && ")[0] and unasked[1:] == calls[1:]
    for call in calls:
        assert len(call["command"]) < 2000 and call["timeout_s"] <= 600
        words = call["command"].split()
        if "--seconds" in words:
            # Behind the last update: saving it, and exporting the weights.
            seconds = float(words[words.index("--seconds") + 1])
            assert seconds + 2 * script.SAVING <= call["timeout_s"]
        assert ("train" in words or "probe" in words) == (fields[0] in words)
    assert [path for call in calls for path in call["carry"]] == [f".device/{n}" for n in (1, 2, 3)]
    # What travels is what git knows of, and a piece.
    files = subprocess.run(["git", "ls-files"], cwd=device_kit.REPOSITORY, capture_output=True, text=True)
    if files.returncode == 0:
        sizes = [(device_kit.REPOSITORY / name).stat().st_size for name in files.stdout.splitlines()]
        assert sum(sizes) + device_kit.PIECE < device_kit.CARRIED
    pins = (device_kit.REPOSITORY / "requirements.txt").read_text()
    assert all(f"\n{name}==" in pins for name in device_kit.WHEELS)


def test_the_deadline_asks_a_run_to_save(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)"
    status = script.run_until(time.monotonic() + 0.5, [sys.executable, "-c", code], tmp_path)
    assert status == script.PREEMPTED
    assert (
        script.run_until(time.monotonic() + 60, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 3
    )


def test_the_models_are_trained_in_turn_and_resumed(tmp_path, monkeypatch):
    statuses, seen, back = [75, 0, 1, 0], [], []

    def run(deadline, command, far):
        seen.append(command)
        if not statuses[0]:
            workdir = Path(next(word for word in command if "--workdir" in word).partition("=")[2])
            workdir.mkdir(parents=True)
            (workdir / "summary.json").write_text("{}")
        return statuses.pop(0)

    monkeypatch.setattr(script, "run_until", run)
    monkeypatch.setattr(script, "bring_back", lambda name, *_: back.append(name))
    runs = {"multiply": 7.0, "taught": 5.0}
    # The twin is stopped: the one that it is to teach must wait for it.
    assert script.train(500.0, runs, ["--config.seed=1"], tmp_path) == script.PREEMPTED
    assert script.train(500.0, runs, ["--config.seed=1"], tmp_path) == 1  # the other fails
    assert script.train(500.0, runs, ["--config.seed=1"], tmp_path) == 0
    assert back == ["multiply", "multiply", "taught", "taught"] and seen[0] == seen[1] and seen[2] == seen[3]
    assert {"--config.epochs=7.0", "--config.seed=1", f"--config={script.CONFIG}:multiply"} <= set(seen[0])
    teacher = f"--config.distillation.teacher={tmp_path / 'runs' / 'multiply'}"
    assert {"--config.epochs=5.0", teacher, f"--config={script.CONFIG}:taught"} <= set(seen[2])
    assert teacher not in seen[0] and not any("warm_start" in word for word in seen[2])
    (tmp_path / "runs" / "taught" / "summary.json").unlink()
    assert script.train(script.WORTH_STARTING - 1, runs, [], tmp_path) == script.PREEMPTED and len(seen) == 4


@pytest.mark.parametrize("named", [None, "weights/cifar10_twin"])
def test_a_warm_run_begins_with_its_teachers_weights(tmp_path, monkeypatch, named):
    seen = []
    monkeypatch.setattr(script, "run_until", lambda deadline, command, far: seen.extend(command) or 0)
    monkeypatch.setattr(script, "bring_back", lambda *_: None)
    overrides = [f"--config.distillation.teacher={named}"] if named else []
    assert script.train(500.0, {"warm": 3.0}, overrides, tmp_path) == 0
    teacher = named or tmp_path / "runs" / "multiply"
    expected = {f"--config.{field}={teacher}" for field in ("distillation.teacher", "warm_start.source")}
    assert expected | {f"--config={script.CONFIG}:warm"} <= set(seen)


def test_a_child_that_takes_too_long_is_killed(tmp_path):
    sleeper = script.start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    assert script.finish(sleeper, 0.2) == -9
    log = tmp_path / "logs" / "a.log"
    assert script.finish(script.start([sys.executable, "-c", "print('said')"], tmp_path, log), 60) == 0
    assert log.read_text() == "said\n"


def test_the_commands_of_the_documentation_are_understood(monkeypatch, capsys):
    monkeypatch.setattr(device_kit, "pack", lambda **_: 1)
    told = re.findall(r"python3? -m benchmarks.device_cifar (\w+)([^\n]*?)(?:   |\n)", script.__doc__)
    assert [name for name, _ in told] == ["pack", "plan", "estimate", "train"]
    for name, arguments in told:
        called = {}

        def function(name=name, called=called, **values):
            called[name] = values
            return 0

        function.__name__ = name
        monkeypatch.setattr(script, name, function)
        script.main([name, *arguments.split()])
        assert name in called


def test_runs_are_named_with_their_epochs(capsys):
    assert script.epochs_of("taught=2.5") == ("taught", 2.5)
    for text in ("adder", "vit=3", "adder=0", "adder=many"):
        with pytest.raises(SystemExit):
            script.main(["train", "--seconds", "1", text])
        assert (
            f"{text!r} is not NAME=EPOCHS, NAME one of multiply, adder, taught, warm"
            in capsys.readouterr().err
        )


def test_the_probe_compiles_side_by_side_and_times_alone(tmp_path, monkeypatch, capsys):
    running, alone, failing = set(), [], set()

    class Child:
        def __init__(self, command, far, log, **environment):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"said by {log.name}")
            self.log = log
            running.add(log.name)

        def wait(self, seconds):
            assert 0 < seconds <= 2 * script.COMPILING
            running.discard(self.log.name)
            alone.append((self.log.name, not running))
            return 3 if self.log.name in failing else 0

    monkeypatch.setattr(script, "start", Child)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert script.probe(["float32"], [], tmp_path) == 0
    timed = [name for name, by_itself in alone if name.endswith(".log") and by_itself]
    assert timed == ["multiply-float32.log", "adder-float32.log", "time-dense.log"]
    assert "adder-float32: exit status 0\nsaid by adder-float32.log" in capsys.readouterr().out
    with tarfile.open(tmp_path / "probe.tar.gz") as tar:
        assert "probe/checks.log" in tar.getnames()
    failing.add("multiply-float32.cold")
    assert script.probe(["float32"], [], tmp_path) == 3


def test_the_estimate_adds_up():
    counts = device_estimate.Counts(
        linear=10**9, scores=10**7, products=10**8, product_bytes=10**6, elementwise_bytes=10**8
    )
    rates = device_estimate.Rates(1e13, 5e12, 1e12, 4e13, 2e14, 4e12, 0.25, 2.56e-3)
    parts = device_estimate.seconds_an_epoch(counts, 256, rates)
    an_image = [1e-4, 2e-4, 5e-5, 3e-5, 3e-6, 1.875e-5, 1e-5]
    assert list(parts.values()) == pytest.approx([49_000 * seconds for seconds in an_image])
    # Small products take as long as their bytes.
    bound = device_estimate.seconds_an_epoch(counts._replace(product_bytes=8 * 10**6), 256, rates)
    assert bound["products"] == pytest.approx(49_000 * 6e-6)
    # 3 starts of 108 s leave 900 s, of which updates get 810; 5 s and 3 s an epoch.
    assert device_estimate.epochs_within(1224.0, [9_800.0, 49_000 / 3]) == 101
    assert device_estimate.epochs_within(10.0, [9_000.0]) == 1


def test_what_comes_back_is_small_and_finite(tmp_path, monkeypatch):
    from adderflax.training import restore

    value = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    monkeypatch.setattr(
        restore, "load_model", lambda *_, **__: (None, {"params": {"fc1": {"kernel": value}}}, None)
    )
    script.export(tmp_path, tmp_path / "adder.npz")
    with np.load(tmp_path / "adder.npz") as saved:
        assert saved["params/fc1/kernel"].dtype == np.float16
        np.testing.assert_allclose(saved["params/fc1/kernel"], value, rtol=2**-11)
    monkeypatch.setattr(script, "RETURNED", 100)
    with pytest.raises(device_kit.KitError, match="a call brings back"):
        script.export(tmp_path, tmp_path / "adder.npz")

    ran = []
    monkeypatch.setattr(script, "start", lambda command, *_, **__: ran.append(command[3:]) or "a child")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "adder").mkdir()
    (tmp_path / "adder" / "metrics.jsonl").write_text("{}\n")
    # A run without a checkpoint has no weights.
    assert script.bring_back("adder", tmp_path / "adder", tmp_path) is None and not ran
    with tarfile.open(tmp_path / "out" / "adder.tar.gz") as tar:
        assert [Path(name).name for name in tar.getnames()] == ["metrics.jsonl"]
    (tmp_path / "adder" / "checkpoints" / "10").mkdir(parents=True)
    assert script.bring_back("adder", tmp_path / "adder", tmp_path) == "a child"
    assert ran == [["export", str(tmp_path / "adder"), str(tmp_path / "out" / "adder.npz")]]
