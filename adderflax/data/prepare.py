"""Downloads and prepares a tensorflow-datasets set: `python -m adderflax.data.prepare NAME`.

With --folder it makes the set of a folder of images by class (`adderflax.data.folder`).

This is the one place that needs TensorFlow, and it runs in a process of its own: what
TensorFlow holds, and the downloads that may still be under way when one has failed, end with
that process.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import logging
import os
import pathlib
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn
from urllib import parse

from adderflax import pipes
from adderflax.data.config import DatasetNotReadyError
from adderflax.data.folder import FolderError, read_folder, require_new, store

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# tensorflow-datasets tries a dead connection for minutes; hosts are tried this long before.
_CONNECT_SECONDS = 10
# Has a failure told by its reason alone, on standard output.
_REASON_ONLY = "--reason_only"


def command(name: str, data_dir: str | None) -> str:
    """Returns the command line that prepares a set."""
    words = ["python", "-m", "adderflax.data.prepare", name]
    return " ".join(words + ([f"--data_dir={data_dir}"] if data_dir else []))


def place_of(data_dir: str | None) -> str:
    """Where tensorflow-datasets looks for prepared sets."""
    return data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether a set is there: its directory only gets its name once all of it is written."""
    return os.path.isfile(os.path.join(builder.data_path, "dataset_info.json"))


def not_ready(name: str, data_dir: str | None, reason: str, remedy: str = "") -> NoReturn:
    """Raises `DatasetNotReadyError` as one paragraph.

    Args:
      name: of the set.
      data_dir: where it was looked for, None for the default place.
      reason: what was missing, without a full stop.
      remedy: what to do about it; by default, how to prepare the set.

    Raises:
      DatasetNotReadyError: always.
    """
    place = place_of(data_dir)
    remedy = remedy or (
        f"On a machine with a network and TensorFlow, `{command(name, data_dir)}` downloads and "
        f"prepares it once; the directory can be copied to machines that have neither."
    )
    raise DatasetNotReadyError(
        f"The image set {name!r} is not ready in {place}: {reason}. {remedy} Meanwhile "
        f"`python train.py --config configs/digits_adder_vit.py` runs at once, on real images "
        f"that need no download."
    )


def prepare_in_child(name: str, data_dir: str | None) -> None:
    """Prepares a set in a process of its own, with its progress shown on standard error.

    Args:
      name: of the set.
      data_dir: where to, None for the default place of tensorflow-datasets.

    Raises:
      DatasetNotReadyError: with the reason, if that did not work.
    """
    if importlib.util.find_spec("tensorflow") is None:
        not_ready(
            name,
            data_dir,
            "preparing it needs TensorFlow, which is not installed here (`pip install tensorflow-cpu`)",
        )
    print(f"Preparing the image set {name}; this is done once.", file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "adderflax.data.prepare", name, _REASON_ONLY]
    root = str(pathlib.Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    done = subprocess.run(
        words + ([f"--data_dir={data_dir}"] if data_dir else []),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": root + os.pathsep + known if known else root},
    )
    if done.returncode:
        reason = done.stdout.strip().rstrip(".")
        not_ready(name, data_dir, reason or f"preparing it ended with code {done.returncode}")


@pipes.reader_may_leave()
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.data.prepare",
        allow_abbrev=False,
        description="Download and prepare a tensorflow-datasets image set for training.",
    )
    parser.add_argument("name", help="such as cifar10 or imagenette/160px-v2")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument(
        "--folder",
        help="store the images of this folder under NAME: FOLDER/CLASS/*, or FOLDER/train/CLASS/* and"
        " FOLDER/test/CLASS/*",
    )
    parser.add_argument(_REASON_ONLY, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.name == "digits" and options.folder is None:
        print("digits comes with scikit-learn and is ready: nothing is to be prepared")
        return 0
    try:
        # tensorflow-datasets reports its progress on both streams.
        with contextlib.redirect_stdout(sys.stderr):
            builder, told = _prepare(options.name, options.data_dir, options.folder)
    except KeyboardInterrupt:
        reason = "preparing it was interrupted"
    except FolderError as error:
        print(f"error: The folder does not become the set {options.name!r}: {error}.", file=sys.stderr)
        return 1
    except Exception as error:  # Whatever went wrong inside is told in one sentence.
        reason = _one_line(options.name, error)
    else:
        splits = (f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
        print(f"{options.name} is ready in {builder.data_path}: {', '.join(splits)} images{told}")
        return 0
    if options.reason_only:
        print(reason)
        return 1
    print(
        f"error: The image set {options.name!r} is not ready: {reason.rstrip('.')}. Give the same command"
        " again once that is mended, or copy the directory from a machine where it succeeds.",
        file=sys.stderr,
    )
    return 1


def _prepare(name: str, data_dir: str | None, folder: str | None) -> tuple[tfds.core.DatasetBuilder, str]:
    """The set, prepared, and what there is to say of it."""
    # TensorFlow must not take memory of an accelerator that trains; this comes before anything
    # that could load it.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    if folder is not None:
        require_new(name, place_of(data_dir))
        found = read_folder(folder)
        _hide_accelerators()
        builder = store(found, name, data_dir)
        own = (f"'--config.data.{key}={getattr(found, key)}'".replace(" ", "") for key in ("mean", "std"))
        told = f" of {len(found.class_names)} classes, for a run with {' '.join(own)}"
        if found.left_out:
            told += f"; {found.left_out} files that no image format ends in were left out"
        if {"test", "validation"} <= set(found.splits):
            told += "; its validation split is not read, validation images are cut from train"
        if not {"test", "validation"} & set(found.splits):
            told += "; a fixed fifth of them is the test part of every run"
        return builder, told
    builder = tfds.builder(name, data_dir=data_dir)
    if not is_prepared(builder) and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        _require_network(builder.url_infos or {})
    _hide_accelerators()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    builder.download_and_prepare(file_format="array_record")
    return builder, ""


def _hide_accelerators() -> None:
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)


def _require_network(urls: dict[str, object]) -> None:
    """Checks that one address on each host of the set answers, with whatever status."""
    import requests

    hosts = {parse.urlsplit(url).netloc: url for url in urls if url.startswith("http")}
    for host, url in hosts.items():
        try:
            requests.head(url, timeout=_CONNECT_SECONDS)
        except requests.RequestException as error:
            raise ConnectionError(
                f"it has to be downloaded, and {host} cannot be reached from here ({type(error).__name__})"
            ) from error


def _one_line(name: str, error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return str(error)
    if type(error).__name__ == "DatasetNotFoundError":  # its text lists every set there is
        import tensorflow_datasets as tfds

        near = difflib.get_close_matches(name, tfds.list_builders(), n=3)
        proposal = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"tensorflow-datasets has no set {name!r}{proposal}"
    text = " ".join(str(error).split())
    text = text if len(text) <= 600 else text[:600] + " ..."
    return f"preparing {name} failed with {type(error).__name__}: {text}"


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that still try to download would keep the interpreter from ending.
    os._exit(code)
