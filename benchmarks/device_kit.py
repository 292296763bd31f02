"""What a lent GPU machine lacks, wheels and CIFAR-10, in pieces that a call carries: see device_cifar.py."""

import contextlib
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 1 << 20
# A call carries 64 MiB: a piece, and the checkout, which is 20 with the weights that come along.
CARRIED = 64 * MIB
PIECE = 42 * MIB

# What the trainer imports and the machine lacks, and the libraries whose versions must fit each other, in the
# versions of requirements.txt. The rest is there: jax, NumPy, Pillow, scikit-learn, ...
WHEELS = (
    *("absl-py", "array_record", "dm-tree", "docstring_parser", "etils", "flax", "googleapis-common-protos"),
    *("grain", "immutabledict", "ml_collections", "optax", "orbax-checkpoint", "portpicker", "promise"),
    *("protobuf", "simple-parsing", "tensorboardX", "tensorflow-datasets", "tensorflow-metadata"),
    *("tensorstore", "termcolor", "toml", "treescope", "wrapt"),
)
SOURCES = ("promise",)  # published without a wheel, and pure Python
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


class KitError(RuntimeError):
    """A piece is missing or damaged, or a run failed; the message says what to do."""


def reader_may_leave() -> contextlib.AbstractContextManager:
    """`adderflax.pipes.reader_may_leave`, from its file: the package around it imports flax."""
    spec = importlib.util.spec_from_file_location("pipes", REPOSITORY / "adderflax" / "pipes.py")
    pipes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipes)
    return pipes.reader_may_leave()


def pack(data_dir: Path, kit: Path) -> int:
    """Lays wheels and the CIFAR-10 of tensorflow-datasets into folders 1, 2, ... that a call can carry.

    Args:
      data_dir: where tensorflow-datasets prepared the set as array_record.
      kit: the folder to make anew; git ignores it.

    Returns:
      The number of pieces.

    Raises:
      KitError: the set is not there.
    """
    if not (data_dir / "cifar10").is_dir():
        raise KitError(
            f"{data_dir} holds no cifar10. `python -m adderflax.data.prepare cifar10 --data_dir={data_dir}`"
            " downloads and prepares it."
        )
    shutil.rmtree(kit, ignore_errors=True)
    wheels = kit / "1" / "wheels"
    wheels.mkdir(parents=True)
    (kit / ".gitignore").write_text("*\n")
    download_wheels(wheels)
    archive = kit / "cifar10.tar.gz"
    # The images are compressed already; 5 % less is what brings them and the wheels into four pieces.
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(data_dir / "cifar10", "cifar10")
    taken = sum(wheel.stat().st_size for wheel in wheels.iterdir())
    count = cut(archive, kit, PIECE - taken, PIECE)
    archive.unlink()
    return count


def download_wheels(folder: Path) -> None:
    """Downloads WHEELS for Python 3.12 on x86-64 Linux, in the versions of requirements.txt."""
    pinned = re.findall(r"^[\w.-]+==[\w.]+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    pinned = {pin.partition("==")[0]: pin for pin in pinned}
    target = ["--python-version=3.12", "--implementation=cp"]
    target += [*(f"--platform={platform}_x86_64" for platform in PLATFORMS), "--only-binary=:all:"]
    pip, binary = [sys.executable, "-m", "pip"], [pinned[name] for name in WHEELS if name not in SOURCES]
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", str(folder), *target, *binary], check=True)
    source = [pinned[name] for name in SOURCES]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), *source], check=True)


def cut(archive: Path, kit: Path, first: int, others: int) -> int:
    """Cuts a file into `kit/1/part`, `kit/2/part`, ..., each beside a manifest of all; returns how many.

    Args:
      archive: the file.
      kit: where the numbered folders are or come to be.
      first: bytes of the first part.
      others: most bytes of each other part.
    """
    digests, whole, limit = [], hashlib.sha256(), first
    with archive.open("rb") as stream:
        while part := stream.read(limit):
            digests.append(hashlib.sha256(part).hexdigest())
            whole.update(part)
            folder = kit / str(len(digests))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "part").write_bytes(part)
            limit = others
    manifest = json.dumps({"parts": digests, "whole": whole.hexdigest()})
    for number in range(1, len(digests) + 1):
        (kit / str(number) / "manifest.json").write_text(manifest)
    return len(digests)


def unpack(number: int, kit: Path, far: Path) -> bool:
    """Keeps a carried piece outside the checkout; the last one to come joins them into `far/tfds`.

    Args:
      number: of the piece, from 1.
      kit: where the call carried it to.
      far: where what lasts from call to call lies.

    Returns:
      Whether the data are complete.

    Raises:
      KitError: the piece is missing or damaged, or pieces of two packings met.
    """
    piece, parts = kit / str(number), far / "parts"
    if not (piece / "part").exists():
        raise KitError(f"There is no piece {number} in {kit}: name .device/{number} in the call's carry.")
    manifest = json.loads((piece / "manifest.json").read_text())
    if hashlib.sha256((piece / "part").read_bytes()).hexdigest() != manifest["parts"][number - 1]:
        raise KitError(f"Piece {number} arrived damaged: repeat this call.")
    parts.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(piece / "part", parts / str(number))
    if (piece / "wheels").is_dir():
        install_wheels(piece / "wheels", far / "site")
    waiting = [n for n in range(1, len(manifest["parts"]) + 1) if not (parts / str(n)).exists()]
    if waiting:
        print(f"Piece {number} is here; still to come: {', '.join(map(str, waiting))}")
        return False
    archive, whole = far / "cifar10.tar.gz", hashlib.sha256()
    with archive.open("wb") as joined:
        for n in range(1, len(manifest["parts"]) + 1):
            part = (parts / str(n)).read_bytes()
            whole.update(part)
            joined.write(part)
    if whole.hexdigest() != manifest["whole"]:
        raise KitError(
            f"The pieces in {parts} do not belong together: send every one again, of one and the same pack."
        )
    with tarfile.open(archive) as tar:
        tar.extractall(far / "tfds", filter="data")
    archive.unlink()
    print(f"All {len(manifest['parts'])} pieces are here and whole")
    return True


def install_wheels(wheels: Path, site: Path) -> None:
    """Installs every wheel of a folder, and nothing else, without a network."""
    options = [
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--upgrade",
        "--target",
        str(site),
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        *options,
        *map(str, sorted(wheels.glob("*.whl"))),
    ]
    subprocess.run(command, check=True)
