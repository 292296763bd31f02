"""The CPU kernels' shared library: compiled for this machine the first time, and found again afterwards.

Why a compiler at run time: the kernels want the vector instructions of the very machine, a package of pure
Python installs everywhere, and XLA calls such code through its FFI, a public interface whose headers jaxlib
brings. Where there is no compiler the other implementations do.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("_cpu_kernels.cpp")  # includes the headers beside it
KERNELS = ("forward", "gradient_x", "gradient_y", "bytes")
CACHE_VARIABLE = "ADDERFLAX_CACHE_DIR"
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300  # for the compiler; it takes 5
_one_at_a_time = threading.Lock()
_logger = logging.getLogger("adderflax.operators")


def unavailable() -> str | None:
    """Why there are no kernels here, or None; compiles them where that was never done."""
    if targets.cache_info().currsize:
        return None
    try:
        # Looked for each time, since one may be installed; what it failed to compile is not tried again.
        return _failure(_compiler(), cache_folder())
    except _NotCompiled as error:
        return str(error)


@functools.cache
def _failure(compiler: str, folder: Path) -> str | None:
    try:
        targets()
    except _NotCompiled as error:
        return str(error)
    return None


@functools.cache
def targets() -> dict[str, str]:
    """XLA's names of the kernels, registered, by those of `KERNELS`."""
    with _one_at_a_time:  # a thread that waited finds the library
        return registered(built(), "adderflax")


def registered(path: Path, prefix: str) -> dict[str, str]:
    """Loads a library and has XLA know its kernels; their names there, by those of `KERNELS`."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _NotCompiled(
            f"the compiled CPU kernels cannot be loaded ({error}); delete {path}, to have them compiled"
            f" again, or name another folder in the environment variable {CACHE_VARIABLE}"
        ) from error
    names = {kernel: f"{prefix}_{kernel}" for kernel in KERNELS}
    for kernel, name in names.items():
        function = jax.ffi.pycapsule(getattr(library, f"adderflax_{kernel}"))
        jax.ffi.register_ffi_target(name, function, platform="cpu")
    return names


class _NotCompiled(RuntimeError):
    """There is no library, and why."""


def built(options: tuple[str, ...] = ()) -> Path:
    """The library, compiled if the cache has none of these sources, compiler, jaxlib and processor.

    Args:
        options: for the compiler, besides the usual ones.

    Raises:
        _NotCompiled: there is no compiler, or it fails.
    """
    compiler = _compiler()
    tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # NaN and infinity are told from numbers, which some compilers' defaults would not do.
    exact = ("-fno-fast-math", "-ffp-contract=fast")
    options = ("-std=c++17", "-O3", tuned, *exact, "-fPIC", "-shared", "-pthread", *options)
    version = _run([compiler, "--version"]).stdout
    key = [
        SOURCE.read_text(),
        *(header.read_text() for header in sorted(SOURCE.parent.glob("_cpu_*.h"))),
        compiler,
        version,
        *options,
        importlib.metadata.version("jaxlib"),
        _processor(),
    ]
    path = cache_folder() / f"cpu_kernels_{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    if not _exists(path):
        _compile([compiler, *options, "-isystem", jax.ffi.include_dir(), str(SOURCE)], path)
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise _NotCompiled(
            f"the folder {path.parent} for compiled CPU kernels cannot be read ({error}); name another in the"
            f" environment variable {CACHE_VARIABLE}"
        ) from error


def cache_folder() -> Path:
    """Where compiled kernels are kept: ADDERFLAX_CACHE_DIR, or adderflax in the user's folder of caches.

    Raises:
        _NotCompiled: there is no such user.
    """
    try:
        if named := os.environ.get(CACHE_VARIABLE):
            return Path(named).expanduser().absolute()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "adderflax"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "adderflax"
    except RuntimeError as error:
        raise _NotCompiled(
            f"there is no folder for compiled CPU kernels ({error}); name one in the environment variable"
            f" {CACHE_VARIABLE}"
        ) from error


def _compiler() -> str:
    if os.name != "posix":
        raise _NotCompiled(f"the CPU kernels are compiled on Linux and macOS, and this is {sys.platform}")
    if named := os.environ.get("CXX"):
        if (found := shutil.which(named)) is None:
            raise _NotCompiled(
                f"CXX={named!r} in the environment is no C++ compiler that can be found; it must be the name"
                " or the path of one, without arguments"
            )
        return found
    for candidate in _COMPILERS:
        if found := shutil.which(candidate):
            return found
    raise _NotCompiled(
        f"the CPU kernels need a C++ compiler, and none of {', '.join(_COMPILERS)} was found; install one (on"
        " Debian and Ubuntu: apt install g++), or name it in the environment variable CXX"
    )


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa", "uarch", "cpu")
    described = dict.fromkeys(line for line in lines if line.startswith(told) and "MHz" not in line)
    return "\n".join([platform.machine(), *(described or (platform.processor(), platform.version()))])


def _run(command: list[str]) -> subprocess.CompletedProcess:
    """Runs the compiler to its end, whatever that is."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotCompiled(f"the CPU kernels were not compiled: {error}") from error


def _compile(command: list[str], path: Path) -> None:
    """Runs the compiler; the library appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled = Path(folder, path.name)
            _logger.info("Compiling the CPU kernels to %s.", path)
            done = _run([*command, "-o", str(compiled)])
            if done.returncode:
                raise _NotCompiled(
                    f"{command[0]} could not compile the CPU kernels; another compiler can be named in the"
                    f" environment variable CXX. Its last words: {done.stderr.strip()[-2000:]}"
                )
            os.replace(compiled, path)
    except OSError as error:
        raise _NotCompiled(
            f"the folder {path.parent} for compiled CPU kernels cannot be written ({error}); name another"
            f" in the environment variable {CACHE_VARIABLE}"
        ) from error
