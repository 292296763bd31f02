"""A folder of images by class: what is found there, what is stored, and what training reads."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from adderflax.data import DataConfig, load_dataset
from adderflax.data.folder import FolderError, read_folder

NOISE = np.random.default_rng(0)


def picture(file, shape=(8, 8, 3), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = NOISE.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return pixels


def test_classes_splits_and_figures(tmp_path):
    kept = [picture(tmp_path / "train" / name / f"{i}.png") for name in ("dog", "cat") for i in range(2)]
    picture(tmp_path / "val" / "dog" / "0.png")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    picture(tmp_path / "train" / "dog" / ".hidden" / "0.png")
    picture(tmp_path / "train" / "dog" / "._0.png")
    found = read_folder(tmp_path)
    assert found.class_names == ("cat", "dog") and (found.channels, found.shape) == (3, (8, 8))
    names = {
        split: [(file.parent.name, label) for file, label in files] for split, files in found.splits.items()
    }
    assert names == {"train": [("cat", 0)] * 2 + [("dog", 1)] * 2, "validation": [("dog", 1)]}
    pixels = np.stack(kept) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), atol=1e-4)


def test_gray_images_of_several_sizes(tmp_path):
    picture(tmp_path / "a" / "0.png", (8, 8))
    picture(tmp_path / "b" / "0.png", (9, 8))
    found = read_folder(tmp_path)
    assert (found.channels, found.shape) == (1, None)
    assert len(found.mean) == len(found.std) == 1 and list(found.splits) == ["train"]
    picture(tmp_path / "b" / "1.png", (8, 8, 3))
    assert read_folder(tmp_path).channels == 3


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda root: (root / "a" / "1.jpg").write_text("x"), "1.jpg cannot be read as an image"),
        (
            lambda root: Image.fromarray(np.ones((4, 4), np.float32)).save(root / "a" / "1.tif"),
            "1.tif cannot be read as an image: An image of mode 'F'",
        ),
        (lambda root: (root / "c").mkdir(), "has no images in c: images lie in FOLDER/CLASS or"),
        (
            lambda root: (picture(root / "train" / "a" / "0.png"), picture(root / "test" / "z" / "0.png")),
            "its test split has the classes z, of which .*train has none",
        ),
        (lambda root: (root / "train").mkdir(), "holds no directories of classes"),
    ],
)
def test_what_is_no_set(tmp_path, damage, told):
    picture(tmp_path / "a" / "0.png")
    damage(tmp_path)
    with pytest.raises(FolderError, match=told):
        read_folder(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(FolderError, match="none is no directory: give one with a directory for each class"):
        read_folder(tmp_path / "none")


def prepare(root, *arguments):
    words = [sys.executable, "-m", "adderflax.data.prepare", *map(str, arguments)]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)


def test_what_is_stored_is_read_without_loss(tmp_path, root):
    """Pixels, labels and parts; of what is turned by its EXIF, what `predict` would see."""
    pytest.importorskip("tensorflow")
    folder, sets = tmp_path / "pictures", tmp_path / "sets"
    kept = {0: picture(folder / "train" / "a" / "0.png"), 1: picture(folder / "train" / "b" / "0.png")}
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    turned = picture(folder / "train" / "b" / "deep" / "0.png", exif=exif)
    test = picture(folder / "test" / "a" / "0.webp", lossless=True)
    done = prepare(root, "two_kinds", f"--folder={folder}", f"--data_dir={sets}")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"two_kinds is ready in .*: train 3, test 1 images of 2 classes, for a run with"
        r" '--config.data.mean=\([\d.,]+\)' '--config.data.std=",
        done.stdout,
    )
    own = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.25)}
    dataset = load_dataset(DataConfig(name="two_kinds", data_dir=str(sets), validation_fraction=0.0, **own))
    info = dataset.info
    assert (info.class_names, info.image_size, info.channels) == (("a", "b"), 8, 3)
    assert (info.mean, info.std) == (own["mean"], own["std"])
    found = sorted((dataset.train[i]["label"], dataset.train[i]["image"].tobytes()) for i in range(3))
    right = np.ascontiguousarray(np.rot90(turned, -1))
    assert found == sorted((label, p.tobytes()) for label, p in [*kept.items(), (1, right)])
    assert len(dataset.test) == 1 and dataset.test[0]["label"] == 0
    np.testing.assert_array_equal(dataset.test[0]["image"], test)

    again = prepare(root, "two_kinds", f"--folder={folder}", f"--data_dir={sets}")
    assert again.returncode == 1 and "a set 'two_kinds' is there already: choose another name" in again.stderr
    with pytest.raises(
        ValueError, match="no image set called 'two_kind'. Did you mean two_kinds.* holds two_kinds"
    ):
        load_dataset(DataConfig(name="two_kind", data_dir=str(sets)))
    with pytest.raises(ValueError, match="is a path, .* `python -m adderflax.data.prepare NAME .*--folder=/"):
        load_dataset(DataConfig(name=str(folder), data_dir=str(sets)))
    with pytest.raises(
        ValueError, match=r"data.mean=\(0.5,\) has 1 numbers, and the images .* have 3 channels"
    ):
        load_dataset(DataConfig(name="two_kinds", data_dir=str(sets), mean=(0.5,)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Pets", "the name 'Pets' must be small letters, digits and _"),
        ("mnist", "'mnist' is a set that there is already: choose another"),
        ("digits", "'digits' is a set that there is already"),
    ],
)
def test_names_that_are_taken_or_none(tmp_path, root, name, told):
    pytest.importorskip("tensorflow")
    picture(tmp_path / "pictures" / "a" / "0.png")
    done = prepare(root, name, f"--folder={tmp_path / 'pictures'}", f"--data_dir={tmp_path / 'sets'}")
    assert done.returncode == 1 and f"error: The image set {name!r} is not ready: {told}" in done.stderr
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("value", [(0.5, 0.5), (1.5,), "0.5", (0.5, 0.5, None), 0.5])
def test_a_mean_is_a_number_for_each_channel(value):
    with pytest.raises(ValueError, match="data.mean must be a number for each channel, 1 or 3"):
        DataConfig(mean=value)
    with pytest.raises(ValueError, match=r"data.std must be .* from 1e-06 to 1"):
        DataConfig(std=(0.0,))
