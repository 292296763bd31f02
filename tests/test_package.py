"""The wheel: built, installed elsewhere, imported from there."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_wheel_is_installed_and_imported_from_another_directory(tmp_path):
    # setuptools comes with the requirements, so no isolated build environment has to be downloaded; the
    # copy keeps setuptools' build folder out of the checkout.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("adderflax", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("adderflax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]
    assert [name for name in names if name.endswith("LICENSE")]
    assert {
        "adderflax/py.typed",
        "adderflax/operators/_gpu_kernels.cu",
        "adderflax/operators/_cpu_kernels.cpp",
        *(f"adderflax/operators/_cpu_{part}.h" for part in ("vectors", "cut", "floats", "bytes")),
        "adderflax/analysis/integer_format.md",
    } < set(names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import adderflax, jax.numpy as jnp, importlib.metadata as m\n"
        "print(adderflax.__file__)\n"
        "print(float(adderflax.adder_matmul(jnp.ones((1, 2)), jnp.zeros((2, 1)))[0, 0]))\n"
        "print(adderflax.__version__ == m.version('adderflax'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    file, value, same_version = done.stdout.split()
    assert Path(file).is_relative_to(site) and value == "-2.0" and same_version == "True"


@pytest.mark.parametrize(
    ("missing", "module"),
    [
        ("ml_collections", "adderflax.training.config"),
        ("ml_collections", "adderflax.energy"),
        ("ml_collections", "adderflax.pods"),
        ("ml_collections", "adderflax.study"),
        ("grain", "adderflax.training.restore"),
    ],
)
def test_what_training_needs_besides_is_told(missing, module):
    code = f"import sys; sys.modules['{missing}'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "`pip install '.[train]'`" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ["adderflax", "adderflax.models", "adderflax.training.optimizer"])
def test_layers_and_their_optimizer_need_nothing_of_training(module):
    missing = "ml_collections", "grain", "tensorflow_datasets", "tensorboardX", "sklearn", "PIL", "matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nimport {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_requirements_are_exact():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins and all("==" in pin for pin in pins)
