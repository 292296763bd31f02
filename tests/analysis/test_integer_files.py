"""Exports: complete, their own reference agrees with the model, and mistakes leave nothing behind."""

import dataclasses
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer_models import SMALL, RawSums, dense_sums, model_of, trained

from adderflax import AdderConv, export
from adderflax.analysis.integer_files import export_workdir, load_integers, write_integers
from adderflax.analysis.integer_reference import Export, convolution, distances
from adderflax.analysis.integers import in_float32, quantize
from adderflax.analysis.ranges import Range
from adderflax.data import DataConfig, load_dataset, normalize_batch
from adderflax.operators import adder_conv
from adderflax.predict import predict
from adderflax.training.config import default_config
from adderflax.training.environment import describe
from adderflax.training.restore import load_model
from adderflax.training.trainer import evaluate, train
from adderflax.training.workdir import WorkdirError, holds_integers

ALL_ADD = {"patch_embedding": "adder", "head": "adder", "aggregation": "l1"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        ALL_ADD | {"pooling": "token", "centered": False, "power_activation": True, "identity": False},
        ALL_ADD | {"stem": "conv", "mlp_kernel_size": 3, "power_activation": True},
        {"stem": "conv", "mlp_kernel_size": 3, "mlp_convolution": "multiply", "mlp_dim": None},
        {"arithmetic": "vit", "similarity": "l1", "pooling": "token", "attention_scale": 0.2},
        {"similarity": "dot", "output_projection": "multiply", "layer_norm_epsilon": 0.05},
    ],
    ids=["plain", "all-add", "all-add-stem", "stem", "vit", "dot"],
)
def test_the_reference_in_numpy_computes_the_model(tmp_path, fields):
    model, variables, images = model_of(**(SMALL | fields))
    # What is 0 or 1 in a fresh model would hide what is left out.
    noise = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf + jnp.float32(0.1 * noise.normal(size=leaf.shape)), variables)
    info = load_dataset(DataConfig(name="digits")).info
    pixels = noise.integers(0, 256, (3, 8, 8, 1), np.uint8)
    integers = quantize(model, variables, normalize_batch(pixels, info), bits=6)
    write_integers(tmp_path, integers, pixels, info)
    (tmp_path / "dataset.json").write_text(json.dumps(dataclasses.asdict(info)))
    export = Export(tmp_path)
    assert export.wrong_operations() == [] and len(export.operations) == len(integers.operations)
    expected = np.load(tmp_path / "vectors.npz")["logits"]
    np.testing.assert_allclose(export.logits(recorded=True), expected, atol=1e-5)
    assert np.abs(export.logits(recorded=False) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("padding", [((1, 0), (2, 1)), ((-1, 2), (0, -2))], ids=["padded", "cropped"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_convolution_of_the_reference(groups, padding):
    random = np.random.default_rng(0)
    x, kernel = (
        random.integers(-128, 128, shape, np.int8) for shape in ((2, 7, 9, 4), (3, 2, 4 // groups, 6))
    )
    geometry = {
        "strides": (2, 1),
        "padding": padding,
        "dilation": (1, 3),
        "feature_group_count": groups,
    }
    found = convolution(x.astype(np.int64), kernel.astype(np.int64), distances, **geometry)
    np.testing.assert_array_equal(found, adder_conv(x, kernel, **geometry))


def test_the_rounding_of_the_reference(tmp_path):
    model, variables, images = model_of(**SMALL)
    integers = quantize(model, variables, images, bits=3)
    info = load_dataset(DataConfig(name="digits")).info
    write_integers(tmp_path, integers, np.zeros((1, 8, 8, 1), np.uint8), info)
    (tmp_path / "dataset.json").write_text(json.dumps(dataclasses.asdict(info)))
    export, name = Export(tmp_path), "block_0/mlp/fc1"
    unit = 2.0 ** export.operations[name]["exponent"]
    values = np.array([-1e9, -4.5, -3.5, -0.5, 0.5, 1.5, 2.5, 3.5, 1e9]) * unit
    assert export.quantized(values, name).tolist() == [-4, -4, -4, 0, 0, 2, 2, 3, 3]


def test_padding_in_numbers_is_that_of_the_layer():
    layer = AdderConv(3, (3, 3), strides=2, padding="SAME", normalization="none")
    images = jax.random.normal(jax.random.key(0), (1, 8, 9, 2))
    model = RawSums(layer)
    integers = quantize(model, model.init(jax.random.key(1), images), images)
    ((name, operation),), found = integers.operations.items(), integers.vectors(images)
    templates = integers.templates()[name].astype(np.int64)
    sums = convolution(found[f"{name}/inputs"].astype(np.int64), templates, distances, **operation.geometry)
    np.testing.assert_array_equal(sums, found[f"{name}/sums"])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on the digits, in bfloat16."""
    return trained(tmp_path_factory.mktemp("integers") / "run", dtype="bfloat16")


def test_files(workdir, tmp_path, capsys):
    directory = tmp_path / "int8"
    export.main([str(workdir), str(directory), "--calibration=40", "--vectors=3", "--evaluate", "--json"])
    description = json.loads(capsys.readouterr().out)
    assert description == json.loads((directory / "integers.json").read_text())
    assert (description["bits"], description["test_examples"]) == (8, 359)
    arrays, vectors = (dict(np.load(directory / f"{name}.npz")) for name in ("integers", "vectors"))
    assert {array.dtype.name for name, array in arrays.items() if name.endswith("adder_kernel")} == {"int8"}
    assert arrays["constants/block_0/mlp/fc2"].dtype == np.int32
    entry = next(entry for entry in description["operations"] if entry["name"] == "block_0/mlp/fc2")
    assert (entry["kind"], entry["terms"], entry["accumulator_bits"], entry["centered"]) == (
        "dense",
        24,
        Range(entry["accumulator_lowest"], entry["accumulator_highest"]).bits,
        True,
    )
    assert entry["accumulator_lowest"] >= -24 * 128  # what the constant leaves of 24 * 255
    here = describe()
    made_of = {"adderflax": here["adderflax"], "commit": here["commit"], "step": 2, "calibration_images": 40}
    assert {name: description[name] for name in made_of} == made_of
    assert description["operands"] == {"lowest": -128, "highest": 127}
    assert description["rounding"] == "half to even"
    assert description["model"]["attention_scale"] == pytest.approx(1 / np.sqrt(2 * 8 * (1 - 2 / np.pi)))
    # The files check themselves, without this library.
    reference = [sys.executable, "-I", directory / "reference.py"]
    told = subprocess.run(reference, capture_output=True, text=True, cwd="/")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("7 of 7 operations have the recorded sums\n8 of 8 operands are computed as")
    wrong = vectors | {"block_0/mlp/fc1/sums": vectors["block_0/mlp/fc1/sums"] + 1}
    shutil.copytree(directory, tmp_path / "wrong")
    np.savez(tmp_path / "wrong" / "vectors.npz", **wrong)
    told = subprocess.run([*reference, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    assert told.returncode == 1
    assert told.stdout.startswith("6 of 7 operations have the recorded sums, not block_0/mlp/fc1\n")
    np.savez(tmp_path / "wrong" / "vectors.npz", **vectors)
    for end, moved in (("lowest", -1), ("highest", 1)):  # a range that is too wide, or one that is too narrow
        for step in (moved, -moved):
            changed = json.loads((directory / "integers.json").read_text())
            (entry,) = (e for e in changed["operations"] if e["name"] == "block_0/mlp/fc1")
            entry[f"accumulator_{end}"] += step
            (tmp_path / "wrong" / "integers.json").write_text(json.dumps(changed))
            told = subprocess.run([*reference, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
            assert told.returncode == 1
            assert told.stdout.startswith("6 of 7 operations have the recorded sums, not block_0/mlp/fc1\n")
    shutil.copy(directory / "integers.json", tmp_path / "wrong")
    lost = {name: array for name, array in vectors.items() if name != "accumulators/block_0/mlp/fc1/sums"}
    np.savez(tmp_path / "wrong" / "vectors.npz", **lost)
    told = subprocess.run([*reference, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    wanted = f"error: {tmp_path / 'wrong'} lacks 'accumulators/block_0/mlp/fc1/sums'. Export the run again.\n"
    assert (told.returncode, told.stderr) == (2, wanted)
    told = subprocess.run([*reference, tmp_path / "none"], capture_output=True, text=True, cwd="/")
    assert told.returncode == 2 and "none cannot be read: [Errno 2]" in told.stderr
    told = subprocess.run([*reference, "--help"], capture_output=True, text=True, cwd="/")
    assert told.returncode == 0 and "compares all of them" in told.stdout
    np.savez(tmp_path / "wrong" / "vectors.npz", **vectors)
    for name, factor, lines in (
        ("params/block_0/mlp/fc1/norm/scale", 9.0, "7 of 8 operands .*, not block_0/mlp/fc2/inputs\nlogits"),
        (
            "params/block_0/mlp/fc1/norm/scale",
            1.005,
            "7 of 8 operands .*, not block_0/mlp/fc2/inputs\nlogits",
        ),
        ("params/head/kernel", 1.01, "8 of 8 operands .*\nlogits with the recorded integers: at most "),
        ("params/head/kernel", np.nan, "8 of 8 operands .*\nlogits with the recorded integers: at most nan"),
    ):
        np.savez(tmp_path / "wrong" / "integers.npz", **arrays | {name: arrays[name] * np.float32(factor)})
        told = subprocess.run([*reference, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
        assert told.returncode == 1
        assert re.match("7 of 7 operations have the recorded sums\n" + lines, told.stdout), told.stdout
    sums = dense_sums(vectors["block_0/mlp/fc2/inputs"], arrays["params/block_0/mlp/fc2/adder_kernel"])
    np.testing.assert_array_equal(vectors["block_0/mlp/fc2/sums"], sums)
    # What is read again has the same bits, and the command for predictions takes it.
    integers, info = load_integers(directory)
    images = (vectors["images"] / 255.0 - np.asarray(info.mean)) / np.asarray(info.std)
    np.testing.assert_allclose(integers.apply(jnp.float32(images)), vectors["logits"], atol=1e-4)
    (probabilities,) = predict(directory, vectors["images"][:1])
    exponentials = np.exp(vectors["logits"][0] - vectors["logits"][0].max())
    expected = dict(zip(info.class_names, exponentials / exponentials.sum()))
    assert probabilities == pytest.approx(expected, abs=1e-4)
    # The grids are those of the first training images.
    model, variables, _ = load_model(workdir)
    data = load_dataset(DataConfig(name="digits"))
    pixels = np.stack([data.train[i]["image"] for i in range(40)])
    normalized = jnp.float32((pixels / 255.0 - np.asarray(info.mean)) / np.asarray(info.std))
    for name, operation in quantize(model, variables, normalized).operations.items():
        assert integers.operations[name].exponent == operation.exponent
        assert integers.operations[name].clipped == pytest.approx(operation.clipped, abs=3e-4)
    own = quantize(model, variables, jnp.float32(images)).model.apply(variables, jnp.float32(images))
    assert np.abs(np.asarray(own) - vectors["logits"]).max() < 0.3


def test_arrays_as_text(workdir, tmp_path):
    arguments = [
        str(workdir),
        str(tmp_path),
        "--calibration",
        "8",
        "--vectors",
        "1",
        "--integer_only",
        "--hex",
    ]
    export.main(arguments)
    told = set()
    for archive in ("integers", "vectors", "integer_only", "integer_only_vectors"):
        with np.load(tmp_path / f"{archive}.npz") as arrays:
            for name, array in arrays.items():
                told.add(path := tmp_path / "hex" / archive / f"{name}.hex")
                comment, *lines = path.read_text().splitlines()
                assert comment == " ".join(["//", str(array.dtype), *map(str, array.shape)])
                assert {len(line) for line in lines} == {2 * array.itemsize}
                bits = np.array([int(line, 16) for line in lines], f"u{array.itemsize}")
                np.testing.assert_array_equal(bits.view(array.dtype).reshape(array.shape), array)
    assert told == set((tmp_path / "hex").rglob("*.hex"))


def test_reported_accuracies(workdir, tmp_path):
    # At 2 bits the two models differ in far more images than a rounding can move.
    description = export_workdir(workdir, tmp_path, bits=2, calibration=40, vectors=1, evaluate=True)
    integers, info = load_integers(tmp_path)
    model, variables, _ = load_model(workdir)
    test = load_dataset(DataConfig(name="digits")).test
    pixels, labels = (np.stack([test[i][field] for i in range(len(test))]) for field in ("image", "label"))
    normalized = jnp.float32((pixels / 255.0 - np.asarray(info.mean)) / np.asarray(info.std))
    logits = {"integer": integers.apply(normalized), "float": in_float32(model).apply(variables, normalized)}
    right = {kind: np.mean(np.argmax(found, axis=-1) == labels) for kind, found in logits.items()}
    assert abs(right["integer"] - right["float"]) > 5 / 359
    for kind, accuracy in right.items():
        assert abs(description[f"test_accuracy_{kind}"] - accuracy) < 1.5 / 359


def test_the_table(workdir, tmp_path, capsys):
    export.main([str(workdir), str(tmp_path / "int4"), "--bits=4", "--calibration=8", "--vectors=1"])
    printed = capsys.readouterr().out
    assert "block_0/attention               similarity" in printed
    assert "test images" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits=9"], "bits=9 is not known"),
        (["--calibration=0"], "calibration=0 images cannot be taken from the train part of digits"),
        (["--vectors=360"], "vectors=360 images cannot be taken from the test part of digits, which has 359"),
    ],
)
def test_mistakes(workdir, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        export.main([str(workdir), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(workdir):
    before = (Path(workdir) / "config.json").read_text()
    with pytest.raises(SystemExit, match="is not an empty directory; choose another"):
        export.main([str(workdir), str(workdir)])
    assert (Path(workdir) / "config.json").read_text() == before


def test_no_run_begins_where_integers_are(tmp_path):
    (tmp_path / "integers.json").write_text("{}")
    with pytest.raises(WorkdirError, match="exported as integers"):
        train(default_config(), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["integers.json"]


def test_damaged_files(workdir, tmp_path):
    export_workdir(workdir, tmp_path, calibration=8, vectors=1)
    description = json.loads((tmp_path / "integers.json").read_text())
    (tmp_path / "integers.json").write_text(json.dumps(description | {"format": 3}))
    with pytest.raises(WorkdirError, match="its format is 3, and this version reads 1 and 2"):
        load_integers(tmp_path)
    (tmp_path / "integers.json").write_text(json.dumps(description | {"format": 1}))
    load_integers(tmp_path)
    added = {"format": 1, "model": description["model"] | {"aggregation": "l1"}}
    (tmp_path / "integers.json").write_text(json.dumps(description | added))
    with pytest.raises(WorkdirError, match="its L1 aggregation is that of an earlier version"):
        load_integers(tmp_path)
    operations = description["operations"]
    for damage, told in (
        ({"bits": "8"}, "bits='8' is not one of 2, 3"),
        ({"operations": operations[1:]}, "attention/query/adder_kernel are in one of its two files"),
        ({"operations": [operations[0] | {"exponent": 10**6}, *operations[1:]]}, "OverflowError"),
    ):
        (tmp_path / "integers.json").write_text(json.dumps(description | damage))
        with pytest.raises(WorkdirError, match=told):
            load_integers(tmp_path)
    (tmp_path / "integers.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(WorkdirError, match="KeyError"):
        load_integers(tmp_path)
    (tmp_path / "integers.json").write_text(json.dumps(description))
    config = json.loads((tmp_path / "config.json").read_text())
    wider = config | {"model": config["model"] | {"mlp_dim": 48}}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(WorkdirError, match="does not belong to the model that config.json beside it"):
        load_integers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "integers.npz").write_bytes((tmp_path / "integers.npz").read_bytes()[:100])
    with pytest.raises(WorkdirError, match="cannot be read as an integer model"):
        load_integers(tmp_path)


def test_an_export_that_fails_leaves_nothing(workdir, tmp_path, monkeypatch):
    save = np.savez_compressed

    def full_disk(file, **arrays):
        if "vectors" in Path(file).name:
            raise OSError(28, "No space left on device", str(file))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(WorkdirError, match="out cannot be written: No space left on device. Mend that"):
        export_workdir(workdir, tmp_path / "out", calibration=8, vectors=1)
    with pytest.raises(WorkdirError, match="No space left"):
        export_workdir(workdir, tmp_path / "a" / "b" / "out", calibration=8, vectors=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="file/out cannot be written: Not a directory. Mend that"):
        export_workdir(workdir, tmp_path / "file" / "out", calibration=8, vectors=1)


def test_an_empty_directory_is_filled_and_stays_itself(workdir, tmp_path, monkeypatch):
    target = tmp_path / "private"
    target.mkdir(mode=0o700)
    monkeypatch.chdir(target)
    export_workdir(workdir, ".", calibration=8, vectors=1)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert {path.name for path in target.iterdir()} == {
        *("integers.json", "integers.npz", "vectors.npz", "config.json", "dataset.json"),
        *("README.md", "reference.py"),
    }
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    export_workdir(workdir, tmp_path / "link", calibration=8, vectors=1)
    assert holds_integers(tmp_path / "elsewhere")


def test_an_export_is_no_run(workdir, tmp_path):
    export_workdir(workdir, tmp_path, calibration=8, vectors=1)
    for read in (load_model, evaluate, lambda directory: export_workdir(directory, directory / "again")):
        with pytest.raises(
            WorkdirError, match="holds an export, integers that .* Give the directory of the run"
        ):
            read(tmp_path)
    with pytest.raises(WorkdirError, match="no checkpoints to choose the best of: leave --best out"):
        predict(tmp_path, [], best=True)
