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
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("_cpu_kernels.cpp")
KERNELS = ("forward", "gradient_x", "gradient_y", "bytes")
CACHE_VARIABLE = "ADDERFLAX_CACHE_DIR"
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300  # for the compiler; it takes 5
_logger = logging.getLogger("adderflax.operators")


@functools.cache
def unavailable() -> str | None:
    """Why there are no kernels here, or None; compiles them where that was never done."""
    try:
        targets()
    except _NotCompiled as error:
        return str(error)
    return None


@functools.cache
def targets() -> dict[str, str]:
    """XLA's names of the kernels, registered, by those of `KERNELS`."""
    return registered(built(), "adderflax")


def registered(path: Path, prefix: str) -> dict[str, str]:
    """Loads a library and has XLA know its kernels; their names there, by those of `KERNELS`."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _NotCompiled(
            f"the compiled CPU kernels cannot be loaded ({error}); delete {path}, to have them compiled again"
        ) from error
    names = {kernel: f"{prefix}_{kernel}" for kernel in KERNELS}
    for kernel, name in names.items():
        function = jax.ffi.pycapsule(getattr(library, f"adderflax_{kernel}"))
        jax.ffi.register_ffi_target(name, function, platform="cpu")
    return names


class _NotCompiled(RuntimeError):
    """There is no library, and why."""


def built(options: tuple[str, ...] = ()) -> Path:
    """The library, compiled if the cache has none of this source, compiler, jaxlib and processor.

    Args:
        options: for the compiler, besides the usual ones.

    Raises:
        _NotCompiled: there is no compiler, or it fails.
    """
    compiler = _compiler()
    tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    options = ("-std=c++17", "-O3", tuned, "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", *options)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = [
        SOURCE.read_text(),
        compiler,
        version,
        *options,
        importlib.metadata.version("jaxlib"),
        _processor(),
    ]
    path = cache_folder() / f"cpu_kernels_{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        _compile([compiler, *options, "-isystem", jax.ffi.include_dir(), str(SOURCE)], path)
    return path


def cache_folder() -> Path:
    """Where compiled kernels are kept: ADDERFLAX_CACHE_DIR, or adderflax in the user's folder of caches."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "adderflax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adderflax"


def _compiler() -> str:
    if os.name != "posix":
        raise _NotCompiled(f"the CPU kernels are compiled on Linux and macOS, and this is {sys.platform}")
    candidates = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise _NotCompiled(
        f"the CPU kernels need a C++ compiler, and none of {', '.join(candidates)} was found; install one"
        " (on Debian and Ubuntu: apt install g++), or name it in the environment variable CXX"
    )


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.version()}"
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def _compile(command: list[str], path: Path) -> None:
    """Runs the compiler; the library appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise _NotCompiled(
            f"the folder {path.parent} for compiled CPU kernels cannot be written ({error}); name another"
            f" in the environment variable {CACHE_VARIABLE}"
        ) from error
    with folder:
        compiled = Path(folder.name, path.name)
        _logger.info("Compiling the CPU kernels to %s.", path)
        try:
            done = subprocess.run(
                [*command, "-o", str(compiled)], capture_output=True, text=True, timeout=_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _NotCompiled(f"the CPU kernels were not compiled: {error}") from error
        if done.returncode:
            raise _NotCompiled(
                f"{command[0]} could not compile the CPU kernels; another compiler can be named in the"
                f" environment variable CXX. Its last words: {done.stderr.strip()[-2000:]}"
            )
        os.replace(compiled, path)
