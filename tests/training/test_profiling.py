"""Traces of chosen steps, and the place where compiled programs are kept."""

import contextlib
import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adderflax.training import profiling
from adderflax.training.config import ConfigError
from adderflax.training.profiling import keep_compiled_programs, parse_steps, profiled


@pytest.mark.parametrize(
    ("text", "steps"), [("10:15", range(10, 16)), ("3", range(3, 4)), ("1:1", range(1, 2))]
)
def test_steps(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["15:10", "0:3", "a:b", "", ":4", "1:2:3"])
def test_mistaken_steps(text):
    with pytest.raises(ConfigError, match=rf"--profile_steps={text} names no updates"):
        parse_steps(text)


def traced(workdir):
    """The numbers of the updates that the trace holds."""
    (file,) = workdir.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {}))


def test_the_chosen_steps_are_traced(tmp_path, capsys):
    seen = []
    for step in profiled(range(4, 10), range(2, 7), tmp_path):
        jax.block_until_ready(jnp.ones(4) + step)
        seen.append(step)
    assert seen == [4, 5, 6, 7, 8, 9] and traced(tmp_path) == [4, 5, 6]
    assert f"Profile of updates 4 to 6 in {tmp_path}" in capsys.readouterr().out
    assert list(profiled(range(4, 6), range(1, 3), tmp_path / "none")) == [4, 5]
    assert "1 to 2 are not among this process's 4 to 5" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_an_error_ends_the_trace(tmp_path):
    with pytest.raises(RuntimeError, match="diverged"):
        with contextlib.closing(profiled(range(1, 6), range(2, 5), tmp_path)) as steps:
            for step in steps:
                if step == 3:
                    raise RuntimeError("diverged")
    assert traced(tmp_path) == [2, 3]


@pytest.fixture
def no_cache(monkeypatch):
    """As in a process that nobody told where to keep programs."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    was = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", was)


def test_where_programs_are_kept(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / ".cache" / "adderflax" / "jax"
    assert keep_compiled_programs() == directory and jax.config.jax_compilation_cache_dir == str(directory)
    assert directory.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert keep_compiled_programs() == directory, "what is set already stays"
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled_programs() == tmp_path / "xdg" / "adderflax" / "jax"


def test_no_place_to_keep_programs_is_no_error(no_cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_programs() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert keep_compiled_programs() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_program_is_kept_for_the_next_process(tmp_path):
    """Where the environment says, which the command does not override."""
    code = (
        "import jax\n"
        "from adderflax.training.profiling import keep_compiled_programs\n"
        "keep_compiled_programs()\n"
        "jax.jit(lambda x: x * 2 + 1)(1.0)"
    )
    places = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    environment = os.environ | places | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], check=True)
    assert [file.name for file in (tmp_path / "cache").glob("*-cache")] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", ["predict", "diversity", "study"])
def test_commands_that_compute_keep_their_programs(monkeypatch, command):
    class Kept(Exception):
        pass

    def keep():
        raise Kept

    monkeypatch.setattr(profiling, "keep_compiled_programs", keep)
    with pytest.raises(Kept):
        importlib.import_module(f"adderflax.{command}").main(
            ["runs/a", "image.png"][: 1 + (command == "predict")]
        )
