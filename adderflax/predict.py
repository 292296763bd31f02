"""Classifies images with a trained workdir: ``python -m adderflax.predict WORKDIR IMAGE...``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from adderflax import pipes
from adderflax.analysis.integer_files import load_integers
from adderflax.data import normalize_batch, preprocess_image
from adderflax.training import profiling
from adderflax.training.config import ConfigError
from adderflax.training.restore import load_model
from adderflax.training.workdir import WorkdirError, holds_integers


def predict(workdir: str | Path, images: Sequence, *, best: bool = False) -> list[dict[str, float]]:
    """Class probabilities of images.

    Args:
      workdir: the run's directory, or one that `python -m adderflax.export` has written.
      images: PIL images or uint8 arrays [H, W] or [H, W, C] of any size; each is converted, resized and
        cropped as the run's evaluation does it.
      best: use the checkpoint with the best validation accuracy instead of the newest; of a run only, an
        export holds one model.

    Returns:
      For each image a dictionary from class name to probability, the most probable first.

    Raises:
      WorkdirError: the directory holds no trained run, or an export where `best` asks for a checkpoint.
    """
    if holds_integers(workdir):
        if best:
            raise WorkdirError(
                f"{workdir} holds one model, exported as integers, and no checkpoints to choose the best of:"
                " leave --best out, or give it to python -m adderflax.export."
            )
        integers, info = load_integers(workdir)
        variables, forward = {}, lambda _, images: integers.apply(images)
    else:
        model, variables, info = load_model(workdir, best=best)
        forward = model.apply

    @jax.jit  # weights are an argument: as constants every checkpoint would have a program of its own
    def probabilities(variables, batch):
        return jax.nn.softmax(forward(variables, normalize_batch(batch, info)))

    # One image at a time compiles one shape, whatever the number of images.
    batches = (preprocess_image(image, info)[None] for image in images)
    rows = [np.asarray(probabilities(variables, batch))[0] for batch in batches]
    return [{info.class_names[i]: float(row[i]) for i in np.argsort(-row, kind="stable")} for row in rows]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.predict", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("workdir", help="directory of a trained run, or of an export")
    parser.add_argument("image", nargs="+", help="image files, of any format that Pillow reads")
    parser.add_argument("--top", type=_positive, default=5, help="how many classes to print (default 5)")
    parser.add_argument("--best", action="store_true", help="use the best checkpoint, not the newest")
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    arguments = parser.parse_args(argv)
    profiling.keep_compiled_programs()
    from PIL import Image

    images, unreadable = [], []
    for path in arguments.image:
        try:
            image = Image.open(path)
            image.load()
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels have 32 bits (mode {image.mode}); convert it first")
            images.append((path, image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # What the system says names the file again.
            reason = getattr(error, "strerror", None) or error
            unreadable.append(f"{path} cannot be read as an image: {reason}.")
    try:
        results = predict(arguments.workdir, [image for _, image in images], best=arguments.best)
    except (ConfigError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    for (path, _), result in zip(images, results):
        shown = dict(list(result.items())[: arguments.top])
        if arguments.json:
            print(json.dumps({"image": path, "probabilities": shown}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if unreadable:
        sys.exit(f"error: {' '.join(unreadable)} Give files with 8 or 16 bits a channel that Pillow opens.")


if __name__ == "__main__":
    main()
