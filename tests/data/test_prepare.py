"""Preparing a set: done once in a process of its own, or refused in one paragraph."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest

from adderflax.data import DataConfig, DatasetNotReadyError, load_dataset, prepare

# Registered with tensorflow-datasets by being imported; needs no download.
BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


broken = True


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)),
                    "label": tfds.features.ClassLabel(names=["dark", "light"])}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        if broken:
            raise OSError("the download\\n  broke off")
        return {"train": self._generate_examples(20), "test": self._generate_examples(6)}

    def _generate_examples(self, count):
        for number in range(count):
            image = np.full((8, 8, 3), 10 * number, np.uint8)
            yield number, {"image": image, "label": number % 2}
"""

SCRIPT = """
import os
import sys
import tiny_pictures
from adderflax.data import prepare

arguments = ["tiny_pictures", "--data_dir=" + sys.argv[1]]
print(prepare.main(arguments), sorted(os.listdir(sys.argv[1] + "/tiny_pictures")))
tiny_pictures.broken = False
print(prepare.main(arguments), sorted(os.listdir(sys.argv[1] + "/tiny_pictures")))
assert not sys.modules["tensorflow"].config.get_visible_devices("GPU")
"""


@pytest.fixture
def offline(monkeypatch):
    """Sends all that would be downloaded to a port where nobody listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def refused(directory, name):
    with pytest.raises(DatasetNotReadyError) as error:
        load_dataset(DataConfig(name=name, data_dir=str(directory)))
    text = str(error.value)
    assert "\n" not in text and len(text) < 1200
    assert f"`python -m adderflax.data.prepare {name} --data_dir={directory}`" in text
    assert "`python train.py --config configs/digits_adder_vit.py` runs at once" in text
    return text


def test_without_a_network_it_is_said_soon_and_nothing_looks_prepared(tmp_path, offline):
    start = time.monotonic()
    assert "storage.googleapis.com cannot be reached from here" in refused(tmp_path, "mnist")
    assert time.monotonic() - start < 40
    # As a process that was killed while it prepared leaves it behind.
    (tmp_path / "mnist" / "3.0.1.incomplete0A1B2C").mkdir(parents=True)
    assert "cannot be reached" in refused(tmp_path, "mnist")


def test_without_tensorflow(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest),
    )
    assert "needs TensorFlow, which is not installed" in refused(tmp_path, "cifar100")


def test_without_tensorflow_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetNotReadyError, match="pip install -r requirements.txt"):
        load_dataset(DataConfig(name="cifar10", data_dir=str(tmp_path)))


@pytest.mark.slow
def test_a_set_that_must_be_downloaded_by_hand(tmp_path):
    pytest.importorskip("tensorflow")
    assert "ILSVRC2012_img_train.tar" in refused(tmp_path, "imagenet2012")


def test_a_failure_is_told_as_by_other_commands_and_leaves_nothing(tmp_path, offline, root):
    pytest.importorskip("tensorflow_datasets")
    words = [sys.executable, "-m", "adderflax.data.prepare", "mnist", f"--data_dir={tmp_path / 'sets'}"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    told = "error: The image set 'mnist' is not ready: it has to be downloaded, and storage.googleapis.com "
    assert done.stderr.splitlines()[-1].startswith(told)
    assert not list(tmp_path.iterdir())


def test_digits_need_no_preparation(capsys):
    assert prepare.main(["digits"]) == 0
    assert "nothing is to be prepared" in capsys.readouterr().out


def test_an_unknown_name_is_told_in_one_sentence(capsys, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    error = type("DatasetNotFoundError", (ValueError,), {})("Available datasets: - a - b")
    told = prepare._one_line("cifar1", error)
    assert told.startswith("tensorflow-datasets has no set 'cifar1'; did you mean cifar10 or cifar100")


def test_prepares_and_reads_a_set(tmp_path, root):
    pytest.importorskip("tensorflow")
    package = tmp_path / "package" / "tiny_pictures"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BUILDER)
    directory = tmp_path / "sets"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(package.parent)])}

    words = [sys.executable, "-c", SCRIPT, str(directory)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 []",
        f"tiny_pictures is ready in {directory}/tiny_pictures/1.0.0: train 20, test 6 images",
        "0 ['1.0.0']",
    ]
    reason = "preparing tiny_pictures failed with OSError: the download broke off"
    assert f"error: The image set 'tiny_pictures' is not ready: {reason}. Give the same" in done.stderr
    assert "Dataset tiny_pictures downloaded and prepared" in done.stderr
    dataset = load_dataset(DataConfig(name="tiny_pictures", data_dir=str(directory)))
    assert dataset.info.class_names == ("dark", "light")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (18, 2, 6)
    assert {example["image"].max() for example in dataset.test} == {0, 10, 20, 30, 40, 50}


def test_command_names_the_directory_only_where_one_is_given():
    assert prepare.command("mnist", None) == "python -m adderflax.data.prepare mnist"
    assert prepare.command("mnist", "/d") == "python -m adderflax.data.prepare mnist --data_dir=/d"
