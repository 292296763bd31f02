"""The script for Cloud TPU against a stand-in for gcloud: what it asks for, in order, and when it stops."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Keeps the queue's state in a file, and ends each training with the next of the given codes.
GCLOUD = """#!/usr/bin/env bash
cd "$(dirname "$0")"
echo "$*" | tr '\\n' ' ' >> log; echo >> log
case "$*" in
  *"queued-resources describe"*)
    if [ -e unreachable ]; then rm unreachable; echo "ERROR: the network is gone" >&2; exit 1; fi
    [ -s state ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    cat state ;;
  *"queued-resources create"*) echo ACTIVE > state ;;
  *"queued-resources delete"*)
    if [ -e busy ]; then rm busy; exit 1; fi
    : > state ;;
  *"uv pip install"*) exit "$(cat installing)" ;;
  *"tpu-vm describe"*) [ "$(cat state)" = ACTIVE ] && echo READY ;;
  *systemd-run*)
    code=$(head -n 1 codes); sed -i 1d codes
    if [ "$code" != "${code#gone}" ]; then echo SUSPENDED > state; fi
    exit "${code#gone}" ;;
esac
"""


@pytest.fixture
def watch(tmp_path):
    """Runs `watch` with trainings that end in these codes; "gone75" also takes the slice away.

    What it is given besides are hindrances: "unreachable" fails the first question after the slice's state,
    "busy" the first deletion.
    """
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the script sends the checkout's HEAD, and this is no checkout")

    def run(*codes, hindrances=(), installing=0):
        for hindrance in hindrances:
            (tmp_path / hindrance).touch()
        (tmp_path / "installing").write_text(str(installing))
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "state").touch()
        gcloud = tmp_path / "gcloud"
        gcloud.write_text(GCLOUD)
        gcloud.chmod(0o755)
        slice_ = {"TPU": "adder", "ZONE": "here", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2", "POLL": "0"}
        done = subprocess.run(
            [ROOT / "scripts" / "tpu_vm.sh", "watch", "--config", "configs/x.py:multiply", "--workdir=a b"],
            env=os.environ | slice_ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        wanted = ("create", "delete", "scp", "uv pip install", "systemd-run")
        lines = (tmp_path / "log").read_text().splitlines()
        return done, [word for line in lines for word in wanted if word in line], lines

    return run


def test_a_preempted_run_goes_on_until_it_has_finished(watch):
    done, steps, lines = watch("gone75", "255", "0")
    assert done.returncode == 0, done.stderr
    once = ["scp", "uv pip install", "systemd-run"]
    assert steps == ["create", *once, "delete", "create", *once, *once]
    (created, _) = [line for line in lines if "create" in line]
    assert "adder --node-id=adder --accelerator-type=v5litepod-16 --runtime-version=v2 --spot" in created
    assert all(line.rstrip().endswith("--zone=here") for line in lines)
    trained = next(line for line in lines if "systemd-run" in line)
    assert "--worker=all" in trained
    assert r"train.py --distributed --noprogress --config configs/x.py:multiply --workdir=a\ b" in trained


def test_a_run_that_fails_by_itself_is_not_repeated(watch):
    done, steps, _ = watch("1")
    assert done.returncode == 1 and "train.py ended with code 1" in done.stderr
    assert steps.count("systemd-run") == 1 and "delete" not in steps


def test_what_passes_does_not_end_the_watch(watch):
    """A question that fails asks for no second slice, and a deletion that fails is repeated."""
    done, steps, _ = watch("gone75", "0", hindrances=("unreachable", "busy"))
    assert done.returncode == 0 and "the network is gone" in done.stderr, done.stderr
    once = ["scp", "uv pip install", "systemd-run"]
    assert steps == ["create", *once, "delete", "delete", "create", *once]


def test_an_installation_that_fails_is_named(watch):
    done, steps, _ = watch(installing=2)
    assert done.returncode == 2 and "The installation ended with code 2" in done.stderr
    assert steps == ["create", "scp", "uv pip install"]


def test_help(watch):
    done = subprocess.run(
        [ROOT / "scripts" / "tpu_vm.sh"],
        env=os.environ | {"TPU": "a", "ZONE": "b"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "watch ARGUMENTS" in done.stderr and "set -euo" not in done.stderr
