"""A folder of images by class: what is found there, what is stored, and what training reads."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from adderflax.data import DataConfig, DatasetInfo, load_dataset, preprocess_image
from adderflax.data.folder import FolderError, read_folder

NOISE = np.random.default_rng(0)
SEEN = DatasetInfo(
    name="",
    num_classes=2,
    class_names=("a", "b"),
    image_size=8,
    channels=3,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    eval_resize=None,
    train_examples=8,
    validation_examples=0,
    test_examples=1,
)


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
    assert (found.channels, found.shape, found.left_out) == (1, None, 0)
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
        (lambda root: (root / "c").mkdir(), "its train split has no images in c, only other files or none"),
        (lambda root: (root / "a" / "notes.txt").write_text(""), None),
        (lambda root: shutil.rmtree(root / "b"), "has one class, a, and a classifier needs two"),
        (
            lambda root: (root / "train").mkdir(),
            "holds a, b, train: train, test, .* splits, a, b not, and all",
        ),
    ],
)
def test_what_is_no_set(tmp_path, damage, told):
    for name in ("a", "b"):
        picture(tmp_path / name / "0.png")
    damage(tmp_path)
    if told is None:
        assert read_folder(tmp_path).left_out == 1
        return
    with pytest.raises(FolderError, match=told):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        (
            {"train": "ab", "test": "az"},
            "its test split has the classes z, of which its train split has none",
        ),
        ({"Train": "ab", "VALID": "a"}, None),
        ({"train": "ab", "val": "a", "validation": "a"}, "of which train must be there, and each once"),
        ({"test": "ab"}, "of which train must be there, and each once"),
        ({"train": "ab", "tset": "ab"}, "are the names of splits, tset not, and all must be splits or none"),
        ({"train": ""}, "train holds no directories of classes: images lie in FOLDER/CLASS or"),
    ],
)
def test_directories_of_splits(tmp_path, splits, told):
    for split, classes in splits.items():
        (tmp_path / split).mkdir()
        for name in classes:
            picture(tmp_path / split / name / "0.png")
    if told is None:
        assert list(read_folder(tmp_path).splits) == ["train", "validation"]
        return
    with pytest.raises(FolderError, match=told):
        read_folder(tmp_path)


@pytest.mark.parametrize("folder", ["none", ""])
def test_no_directory(folder):
    with pytest.raises(FolderError, match="is no directory: give one with a directory for each class"):
        read_folder(folder)


def prepare(root, *arguments):
    words = [sys.executable, "-m", "adderflax.data.prepare", *map(str, arguments)]
    return subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)


def test_what_is_stored_is_read_without_loss(tmp_path, root, monkeypatch):
    """Pixels, labels and parts; of what is turned by its EXIF, what `predict` would see."""
    pytest.importorskip("tensorflow")
    folder, sets = tmp_path / "pictures", tmp_path / "sets"
    kept = {0: picture(folder / "train" / "a" / "0.png"), 1: picture(folder / "train" / "b" / "0.png")}
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    turned = picture(folder / "train" / "b" / "deep" / "0.png", exif=exif)
    test = picture(folder / "test" / "a" / "0.webp", lossless=True)
    # Of other modes, what `predict` sees.
    others = []
    for mode in ("P", "LA", "RGBA", "CMYK", "I;16"):
        file = folder / "train" / "b" / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        if mode == "I;16":
            Image.fromarray(NOISE.integers(0, 2**16, (8, 8)).astype(np.uint16)).save(file)
        else:
            Image.fromarray(NOISE.integers(0, 256, (8, 8, 3)).astype(np.uint8)).convert(mode).save(file)
        with Image.open(file) as image:
            assert image.mode == mode
            others.append((1, preprocess_image(image, SEEN)))
    done = prepare(root, "two_kinds", f"--folder={folder}", f"--data_dir={sets}")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()[-1]
    assert re.search(
        r"two_kinds is ready in .* images of 2 classes, for a run with '--config.data.mean=", told
    )
    assert " train 8" in told and " test 1" in told and "fixed fifth" not in told
    own = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.25)}
    dataset = load_dataset(DataConfig(name="two_kinds", data_dir=str(sets), validation_fraction=0.0, **own))
    info = dataset.info
    assert (info.class_names, info.image_size, info.channels) == (("a", "b"), 8, 3)
    assert (info.mean, info.std) == (own["mean"], own["std"])
    found = sorted((dataset.train[i]["label"], dataset.train[i]["image"].tobytes()) for i in range(8))
    right = np.ascontiguousarray(np.rot90(turned, -1))
    assert found == sorted((label, p.tobytes()) for label, p in [*kept.items(), (1, right), *others])
    assert len(dataset.test) == 1 and dataset.test[0]["label"] == 0
    np.testing.assert_array_equal(dataset.test[0]["image"], test)

    whole = prepare(root, "one_part", f"--folder={folder / 'train'}", f"--data_dir={sets}")
    assert whole.returncode == 0 and "a fixed fifth of them is the test part of every run" in whole.stdout
    again = prepare(root, "two_kinds", f"--folder={folder}", f"--data_dir={sets}")
    assert again.returncode == 1 and "a set 'two_kinds' is there already: choose another name" in again.stderr
    with pytest.raises(
        ValueError, match="no image set called 'two_kind'. Did you mean two_kinds.* holds one_part, two_kinds"
    ):
        load_dataset(DataConfig(name="two_kind", data_dir=str(sets)))
    # A directory of the set's own name is not in its way.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_kinds").mkdir()
    load_dataset(DataConfig(name="two_kinds", data_dir=str(sets)))
    with pytest.raises(ValueError, match="data.name='pictures' is a path, "):
        load_dataset(DataConfig(name="pictures", data_dir=str(sets)))
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
    assert (
        done.returncode == 1 and f"error: The folder does not become the set {name!r}: {told}" in done.stderr
    )
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("value", [(0.5, 0.5), (1.5,), "0.5", (0.5, 0.5, None), 0.5])
def test_a_mean_is_a_number_for_each_channel(value):
    with pytest.raises(ValueError, match="data.mean must be a number for each channel, 1 or 3"):
        DataConfig(mean=value)
    with pytest.raises(ValueError, match=r"data.std must be .* from 1e-06 to 1"):
        DataConfig(std=(0.0,))
