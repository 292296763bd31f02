"""Where the CPU's kernels are compiled and kept, and what is told where they cannot be."""

import concurrent.futures
import shutil
import stat

import jax.numpy as jnp
import pytest

from adderflax.operators import _cpu, _cpu_library, adder_matmul


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Nothing compiled yet, in a cache of its own; what is found out here is forgotten afterwards."""
    monkeypatch.setenv("ADDERFLAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    for cached in (_cpu_library._failure, _cpu_library.targets):
        cached.cache_clear()
    yield tmp_path
    for cached in (_cpu_library._failure, _cpu_library.targets):
        cached.cache_clear()


def compiler(folder, monkeypatch, text):
    """A compiler that is a script, named by CXX."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


def reason_given():
    with pytest.raises(ValueError, match="'cpu' cannot be built on this machine: ") as raised:
        adder_matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), implementation="cpu")
    return str(raised.value)


def test_without_a_compiler(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", str(elsewhere))
    assert "need a C++ compiler, and none of c++, g++, clang++ was found; install one" in reason_given()
    assert adder_matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    monkeypatch.setenv("CXX", "ccache g++")
    assert "CXX='ccache g++' in the environment is no C++ compiler" in reason_given()


def test_a_compiler_that_fails(elsewhere, monkeypatch):
    compiler(elsewhere, monkeypatch, "echo no headers >&2\nexit 1")
    assert "could not compile the CPU kernels" in (reason := reason_given()) and "no headers" in reason
    assert not list((elsewhere / "cache").iterdir())


def test_a_compiler_that_is_none(elsewhere, monkeypatch):
    (elsewhere / "garbage").write_bytes(b"\x00\x01")
    (elsewhere / "garbage").chmod(0o700)
    monkeypatch.setenv("CXX", str(elsewhere / "garbage"))
    assert "were not compiled: [Errno" in reason_given()


@pytest.mark.parametrize(
    ("folder", "said"), [("file/cache", "cannot be written"), ("~nobody.at.all/cache", "there is no folder")]
)
def test_a_cache_that_cannot_be_written(elsewhere, monkeypatch, folder, said):
    (elsewhere / "file").touch()
    monkeypatch.setenv("ADDERFLAX_CACHE_DIR", folder if folder[0] == "~" else str(elsewhere / folder))
    assert said in (reason := reason_given()) and "ADDERFLAX_CACHE_DIR" in reason


def test_a_cache_that_cannot_be_searched(elsewhere, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_cpu_library.Path, "exists", denied)
    assert "cannot be read" in (reason := reason_given()) and "ADDERFLAX_CACHE_DIR" in reason


def test_compiled_once_by_threads_that_want_it_at_once(elsewhere, monkeypatch):
    script = f'sleep 0.3\nfor last; do :; done\ntouch "$last"\necho compiled >> {elsewhere}/calls'
    compiler(elsewhere, monkeypatch, script)
    monkeypatch.setattr(_cpu_library, "registered", lambda path, prefix: {})
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: _cpu.unavailable(), range(4))) == {None}
    assert (elsewhere / "calls").read_text().split() == ["compiled"]


def test_a_cache_by_a_relative_name(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("ADDERFLAX_CACHE_DIR", ".")
    assert _cpu_library.cache_folder() == elsewhere


def test_a_library_that_cannot_be_loaded(elsewhere, monkeypatch):
    compiler(elsewhere, monkeypatch, 'for last; do :; done\necho broken > "$last"')
    assert f"delete {elsewhere}/cache/cpu_kernels_" in reason_given()


def test_compiled_once_for_a_source_a_compiler_and_its_options(elsewhere, monkeypatch):
    script = f'for last; do :; done\ntouch "$last"\necho "$@" >> {elsewhere}/calls'
    compiler(elsewhere, monkeypatch, script)

    def calls():
        return (elsewhere / "calls").read_text().count(" -o ")

    first = _cpu_library.built()
    assert _cpu_library.built() == first and calls() == 1
    assert first.parent == elsewhere / "cache" and list(first.parent.iterdir()) == [first]
    assert _cpu_library.built(("-DADDERFLAX_PLAIN",)) != first and calls() == 2
    folder = elsewhere / "sources"
    folder.mkdir()
    for source in (_cpu_library.SOURCE, *_cpu_library.SOURCE.parent.glob("_cpu_*.h")):
        shutil.copy(source, folder)
    monkeypatch.setattr(_cpu_library, "SOURCE", folder / "_cpu_kernels.cpp")
    assert _cpu_library.built() == first and calls() == 2
    for number, changed in enumerate(sorted(folder.iterdir())):
        changed.write_text(changed.read_text() + "// changed\n")
        assert _cpu_library.built() != first and calls() == 3 + number
    assert calls() == 2 + 5
    monkeypatch.setattr(_cpu_library, "_processor", lambda: "another")
    _cpu_library.built()
    assert calls() == 2 + 5 + 1


def test_the_cache_lies_where_users_have_theirs(monkeypatch, tmp_path):
    monkeypatch.delenv("ADDERFLAX_CACHE_DIR", raising=False)
    monkeypatch.setattr(_cpu_library.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cpu_library.cache_folder() == tmp_path / "adderflax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _cpu_library.cache_folder() == tmp_path / ".cache" / "adderflax"
    monkeypatch.setattr(_cpu_library.sys, "platform", "darwin")
    assert _cpu_library.cache_folder() == tmp_path / "Library" / "Caches" / "adderflax"
