"""What predict, export and diversity say of what they cannot use, and what they compile."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from adderflax import VisionTransformer, VisionTransformerConfig, diversity, export, predict
from adderflax.analysis.diversity import measure
from adderflax.data import DataConfig, load_dataset


def write(name):
    return lambda workdir: (workdir / name).write_text("{")


def remove(name):
    return lambda workdir: (workdir / name).unlink()


@pytest.mark.parametrize("command", [predict, export], ids=["predict", "export"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (write("config.json"), "config.json cannot be read: .*give the directory of another run"),
        (write("dataset.json"), "dataset.json cannot be read: .*give the directory of another run"),
        (
            remove("config.json"),
            "not a run's workdir: it has no config.json. Give the directory that train.py",
        ),
        (remove("dataset.json"), "not a run's workdir: it has no dataset.json. Give the directory that"),
        (lambda workdir: None, "no complete checkpoint yet: train first, by the train.py command that began"),
        (
            lambda workdir: (workdir / "checkpoints" / "3").mkdir(parents=True),
            "Every checkpoint in .* is damaged: .*, or give another run's directory",
        ),
    ],
    ids=["config", "dataset", "no config", "no dataset", "no checkpoint", "damaged"],
)
@jax.numpy_dtype_promotion("standard")  # the run computed in bfloat16
def test_advice_is_for_the_command_in_which_it_is_given(root, tmp_path, command, damage, told):
    for name in ("config.json", "dataset.json"):
        shutil.copyfile(root / "weights" / "cifar10_twin" / name, tmp_path / name)
    damage(tmp_path)
    other = {predict: root / "docs" / "run_page.png", export: tmp_path / "written"}[command]
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), str(other)])
    assert re.match(f"error: .*{told}", ended.value.code)
    # The directory is an argument here, and no flag.
    assert not re.search("(?<!train.py )--workdir", ended.value.code)


@pytest.mark.parametrize(
    ("command", "others"),
    [(predict, ["docs/run_page.png"]), (export, ["no/such/directory"]), (diversity, [])],
    ids=["predict", "export", "diversity"],
)
def test_a_file_of_weights_has_no_best_checkpoint(root, monkeypatch, command, others):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as ended:
        command.main(["weights/cifar10_twin", *others, "--best"])
    told = "error: weights/cifar10_twin holds one model, weights.npz, and no checkpoints .*leave --best out"
    assert re.match(told, ended.value.code)


@pytest.mark.parametrize("command", ["predict", "measure"])
def test_weights_are_arguments_of_what_is_compiled(monkeypatch, command):
    """As constants each checkpoint would be a program of its own, and lie in the cache beside its file."""
    fields = {"embed_dim": 16, "num_heads": 2, "depth": 1, "patch_size": 4, "implementation": "reference"}
    config = VisionTransformerConfig.from_variant(
        "digits", image_size=8, channels=1, num_classes=10, **fields
    )
    model, image = VisionTransformer(config), np.zeros((8, 8, 1), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    info = load_dataset(DataConfig(name="digits")).info
    constants, compiled = [], jax.jit

    def watched(function):
        def call(*arguments):
            constants.append(sum(np.size(const) for const in jax.make_jaxpr(function)(*arguments).consts))
            return compiled(function)(*arguments)

        return call

    if command == "predict":
        monkeypatch.setattr(predict, "load_model", lambda *_, **__: (model, variables, info))
        monkeypatch.setattr(jax, "jit", watched)
        predict.predict("run", [image])
    else:
        monkeypatch.setattr(jax, "jit", watched)
        measure(model, variables, image[None], info)
    assert constants and max(constants) < 100


def test_images_that_cannot_be_taken_are_named_and_the_others_classified(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "predict", lambda workdir, images, best: [{"a": 1.0} for _ in images])
    gray = np.full((9, 9), 40_000, np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    Image.fromarray(np.float32(gray)).save(tmp_path / "real.tiff")
    Image.new("L", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(SystemExit) as ended:
        predict.main(["run", *(str(tmp_path / name) for name in ("deep.png", "real.tiff", "large.png"))])
    # 16 bits say what their brightest value is, and are brought to 8.
    assert capsys.readouterr().out == f"{tmp_path / 'deep.png'}: a 1.0000\n"
    assert "real.tiff cannot be read as an image: its pixels have 32 bits (mode F)" in ended.value.code
    assert re.search("large.png cannot be read as an image: Image size .* exceeds limit", ended.value.code)
