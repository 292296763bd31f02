"""What predict, export and diversity say of a directory that they cannot use."""

import re
import shutil

import jax
import pytest

from adderflax import diversity, export, predict


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
