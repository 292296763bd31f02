"""Energies of the published models, tables by hand, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adderflax import VisionTransformerConfig, adder_matmul
from adderflax import energy as command
from adderflax.analysis import EnergyTable, NumberFormat, count_operations, energy
from adderflax.analysis.configured import configured_model, inference_ledger, multiplying_twin
from adderflax.analysis.energy_report import compare, split_into_parts
from adderflax.analysis.energy_tables import SOFTWARE, TABLES
from adderflax.analysis.energy_text import as_text
from adderflax.analysis.ledger import Ledger
from adderflax.models.vit import PRESETS
from adderflax.operators import available_implementations
from adderflax.training.config import ConfigError, default_config

ROOT = Path(__file__).parent.parent.parent
DIGITS = ["--config", str(ROOT / "configs/digits_adder_vit.py")]
WARM = str(ROOT / "weights/cifar10_adder_vit")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def run(capsys, *arguments):
    command.main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def error(capsys, *arguments):
    """What a mistake prints: one paragraph."""
    with pytest.raises(SystemExit) as stopped:
        command.main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert not captured.out and stopped.value.code != 0
    return captured.err + str(stopped.value.code)


# Total mJ of the twin, with adder linear layers, and with L1 similarity too, from 4.6 and
# 1.8 pJ a multiply-accumulate; and the giga multiply-accumulates of the twin.
PUBLISHED = {
    "ti": (5.77, 2.84, 2.59, 1.254),
    "s": (21.16, 9.44, 8.94, 4.599),
    "b": (80.8, 33.9, 32.9, 17.564),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_totals(size, capsys):
    twin, linear, default, macs = PUBLISHED[size]
    config = ["--config", ROOT / f"configs/imagenet_adder_deit_{size}.py", "--json"]
    for arguments, total in (([], default), (["--config.model.similarity=dot"], linear)):
        found = json.loads(run(capsys, *config, *arguments, "--convention", "paper"))
        setting = ["convention", "table", "memory", "unit"]
        totals = ["total", "twin_total", "ratio"]
        assert list(found) == ["model", "twin", *setting, *totals, "parts", "difference", "counts"]
        assert (found["convention"], found["unit"]) == ("paper", "mJ")
        assert found["total"] == pytest.approx(total, rel=0.01)
        assert found["twin_total"] == pytest.approx(twin, rel=0.01)
        assert found["ratio"] == pytest.approx(twin / total, rel=0.01)
        assert found["model"].endswith("one image of 224x224x3, 1000 classes")
        assert found["twin_total"] == pytest.approx(macs * 4.6, rel=0.001)
        for of, key in (("model", "total"), ("twin", "twin_total")):
            *steps, full = found["difference"][of].values()
            assert found["difference"][of]["paper"] == found[key] and sum(steps) == pytest.approx(full)
            counts = found["counts"][of]
            by_dtype = counts["operations_by_dtype"]
            for operation, count in counts["operations"].items():
                assert count == sum(n for name, n in by_dtype.items() if name.split()[0] == operation)


def test_standard_vit_is_its_own_twin(capsys):
    file = f"{ROOT / 'configs/imagenet_adder_deit_ti.py'}:vit"
    found = json.loads(run(capsys, "--config", file, "--json"))
    assert found["ratio"] == 1.0 and found["total"] == pytest.approx(5.77, rel=0.01)


def digits_model(**fields):
    return VisionTransformerConfig.from_variant("digits", image_size=8, channels=1, num_classes=10, **fields)


def test_parts_by_hand():
    # 17 tokens of width 64, 4 heads of 16, hidden width 256, 4 blocks.
    parts = split_into_parts(inference_ledger(digits_model()))
    assert parts["patch embedding"].macs == 16 * 4 * 64
    assert parts["q, k, v projections"].adder_elements == 4 * 3 * 17 * 64 * 64
    assert parts["scores"].adder_elements == 4 * 4 * 17 * 17 * 16
    assert parts["A V"].macs == 4 * 4 * 17 * 17 * 16
    assert parts["output projection"].adder_elements == 4 * 17 * 64 * 64
    assert parts["fc1, fc2"].adder_elements == 4 * 2 * 17 * 64 * 256
    assert parts["head"].macs == 640
    # The weights, which nobody asks for, are not divided; the output, of width 64, is.
    softmax = parts["softmax, scale, identity"].operations
    assert softmax["exponential"] == 4 * 4 * 17 * 17 and softmax["divide"] == 4 * 17 * 64
    # Two normalizations before, four after the 64-wide layers and one after fc1, and the last.
    normalization = parts["normalization"].operations
    assert normalization["square_root"] == 4 * 8 * 17 + 1
    assert parts["GELU"].operations["tanh"] == 4 * 17 * 256
    twin = split_into_parts(inference_ledger(multiplying_twin(digits_model())))
    assert twin["scores"].macs == twin["A V"].macs == 4 * 4 * 17 * 17 * 16
    assert set(twin) == set(parts) and not any(part.adder_elements for part in twin.values())


def test_a_stem_is_part_of_the_patch_embedding():
    # 3x3 convolutions of stride 2: 8 to 4 positions a side and 16 features, which are embedded.
    parts = split_into_parts(inference_ledger(digits_model(stem="conv", pooling="mean")))
    assert parts["patch embedding"].macs == 16 * 9 * 32 + 16 * 32 * 64
    assert parts["scores"].adder_elements == 4 * 4 * 16 * 16 * 16


def test_the_convolution_of_the_mlp():
    # 4 blocks, 16 tokens, 9 positions, 256 features. Its twin multiplies, whatever it does itself.
    fields = {"pooling": "mean", "mlp_kernel_size": 3}
    for arithmetic, adds in (("adder", True), (None, True), ("multiply", False)):
        model = digits_model(mlp_convolution=arithmetic, **fields)
        ours, twin = (
            split_into_parts(inference_ledger(found))["MLP convolution"]
            for found in (model, multiplying_twin(model))
        )
        terms = 4 * 16 * 9 * 256
        assert (ours.adder_elements, ours.macs) == ((terms, 0) if adds else (0, terms))
        assert (twin.adder_elements, twin.macs) == (0, terms)


def test_what_centers_templates_is_a_constant():
    plain, centered = (inference_ledger(digits_model(centered=value)) for value in (False, True))
    assert centered.adder_elements == plain.adder_elements and centered.macs == plain.macs
    tokens, width, depth = 17, 64, 4
    outputs = tokens * width * depth * (3 + 1 + 4 + 1)
    found = {name: centered.operations[name] - count for name, count in plain.operations.items()}
    assert {name: more for name, more in found.items() if more} == {"add": outputs}


def test_parts_add_up_to_the_total():
    model = digits_model()
    ledgers = inference_ledger(model), inference_ledger(multiplying_twin(model))
    report = compare(*ledgers, TABLES["fp32"], "sram_1mb")
    for convention in ("paper", "full"):
        found = report.as_json(convention)
        counts = found["counts"]["model"]
        layers = counts["layers"]
        assert counts["adder_terms"] == sum(layer["adder_terms"] for layer in layers.values()) > 0
        assert (
            counts["multiply_accumulates"]
            == ledgers[0].macs
            < found["counts"]["twin"]["multiply_accumulates"]
        )
        tokens, width = 17, 64
        fc1 = "block_0/mlp/fc1"
        assert layers[fc1] == {"multiply_accumulates": 0, "adder_terms": tokens * width * 4 * width}
        for key in ("total", "twin_total"):
            assert sum(p[key] for p in found["parts"]) == pytest.approx(found[key], rel=1e-9)
        for key in ("multiply_accumulates", "adder_terms"):
            assert sum(p[key] for p in found["parts"]) == counts[key]
            assert sum(p[f"twin_{key}"] for p in found["parts"]) == found["counts"]["twin"][key]
        (mlp,) = (p for p in found["parts"] if p["part"] == "fc1, fc2")
        assert mlp["adder_terms"] == mlp["twin_multiply_accumulates"] == 4 * 2 * tokens * width * 4 * width
    paper, full = (report.total(c)[0] for c in ("paper", "full"))
    assert paper.memory == 0 < full.memory and full.arithmetic > paper.total


@pytest.mark.parametrize("implementation", available_implementations("cpu"))
def test_the_count_does_not_depend_on_the_implementation(implementation):
    default = inference_ledger(digits_model())
    assert default.adder_elements
    assert inference_ledger(digits_model(implementation=implementation)) == default


@pytest.mark.parametrize(
    ("table", "mac", "term", "full_term"),
    [
        ("fp32", 4.6, 1.8, 1.8),
        ("fp16", 1.5, 0.8, 0.8),
        ("int8", 0.23, 0.06, 0.09),
        ("int8_int32", 0.3, 0.13, 0.16),
        ("exported", 4.6, 0.13, 0.16),
        ("traced", 4.6, 1.8, 1.8),
        ("fp32_7nm", 1.69, 0.76, 0.76),
        ("fp16_7nm", 0.5, 0.32, 0.32),
        ("int8_7nm", 0.077, 0.014, 0.021),
        ("int8_int32_7nm", 0.1, 0.037, 0.044),
        ("exported_7nm", 1.69, 0.037, 0.044),
        ("traced_7nm", 1.69, 0.76, 0.76),
    ],
)
def test_unit_energies(table, mac, term, full_term):
    product = count_operations(jnp.dot, array(10, 10), array(10, 10))
    adder = count_operations(adder_matmul, array(10, 10), array(10, 10))
    nanojoule = 1e-6  # in millijoules, for a thousand operations of a picojoule
    assert energy(product, "paper", table).total == pytest.approx(mac * nanojoule)
    assert energy(adder, "paper", table).total == pytest.approx(term * nanojoule)
    full = energy(adder, "full", table, memory="none")
    assert full.total == pytest.approx(full_term * nanojoule)


def test_half_precision_sums_in_fp32_in_adders_and_products_alike():
    half = [array(10, 10, dtype=jnp.bfloat16)] * 2
    product, adder = (count_operations(function, *half) for function in (jnp.dot, adder_matmul))
    assert energy(product, "paper", "traced").total == pytest.approx((1.1 + 0.9) * 1e-6)
    assert energy(adder, "paper", "traced").total == pytest.approx((0.4 + 0.9) * 1e-6)
    assert energy(adder, "paper", "int8_int32").total == pytest.approx((0.03 + 0.1) * 1e-6)
    assert energy(product, "paper", "traced_7nm").total == pytest.approx((0.21 + 0.38) * 1e-6)
    assert energy(adder, "paper", "traced_7nm").total == pytest.approx((0.11 + 0.38) * 1e-6)


def test_every_table_has_both_technologies():
    assert {name.removesuffix("_7nm") for name in TABLES} == {f for f in TABLES if not f.endswith("_7nm")}
    for name, table in TABLES.items():
        other = TABLES.get(f"{name}_7nm")
        if other is not None:
            same = ("products", "sums", "adders", "elsewhere")
            assert [getattr(table, field) for field in same] == [getattr(other, field) for field in same]
            assert "45 nm" in table.source and "7 nm" in other.source


def test_the_table_of_what_is_exported():
    fields = {"pooling": "mean", "mlp_kernel_size": 3, "mlp_convolution": "multiply"}
    model = digits_model(**fields)
    report = compare(
        inference_ledger(model), inference_ledger(multiplying_twin(model)), TABLES["exported"], "none"
    )
    ours, twin = (energy.total for energy in report.total("paper"))
    terms, products = report.model.adder_elements, report.model.macs
    assert report.twin.macs == terms + products  # what adds in the model multiplies in the twin
    assert ours == pytest.approx((0.13 * terms + 4.6 * products) * 1e-9)
    assert twin == pytest.approx((0.3 * terms + 4.6 * products) * 1e-9)
    # Where the twin adds in the similarity too, its product with the values stays in fp32, as the model's.
    mixed = digits_model(**PRESETS["multiply"] | {"similarity": "l1"})
    report = compare(inference_ledger(digits_model()), inference_ledger(mixed), TABLES["exported"], "none")
    (attended,) = (part for part in report.parts if part.name == "A V")
    assert attended.twin["paper"].total == attended.model["paper"].total > 0


def test_an_aggregation_that_adds_is_exported_in_float32():
    model = digits_model(aggregation="l1")
    ledgers = inference_ledger(model), inference_ledger(multiplying_twin(model))
    parts = {part.name: part for part in compare(*ledgers, TABLES["exported"], "none").parts}
    terms = model.depth * model.num_tokens**2 * model.embed_dim  # of either
    for name, ours, twin in (("scores", 0.13, 0.3), ("A V", 1.8, 4.6)):
        assert parts[name].model["paper"].total == pytest.approx(ours * terms * 1e-9)
        assert parts[name].twin["paper"].total == pytest.approx(twin * terms * 1e-9)
    # The sums of the values' magnitudes are of the aggregation: only that values are clipped, and weights
    # divided and joined by I where a product is in the twin, is of the softmax.
    softmax = parts["softmax, scale, identity"]
    one = model.depth * model.num_tokens * model.embed_dim * 0.9e-9  # addition a value
    assert softmax.model["full"].total == pytest.approx(softmax.twin["full"].total, abs=5 * one)


def test_the_unit_of_the_tables_fits_the_model():
    small, large = digits_model(), digits_model(embed_dim=512, depth=24)
    for model, unit, factor in ((small, "uJ", 1e3), (large, "mJ", 1)):
        ledgers = inference_ledger(model), inference_ledger(multiplying_twin(model))
        report = compare(*ledgers, TABLES["fp32"], "none")
        lines = as_text(report, "paper").splitlines()
        assert lines[1].startswith(f"{unit} an image")
        assert any(line.startswith(f"what the difference is, {unit}") for line in lines)
        (total,) = (line for line in lines if line.startswith("total "))
        assert float(total.split()[1]) == pytest.approx(factor * report.total("paper")[0].total, abs=6e-4)


def test_the_json_says_what_it_was_computed_with_and_what_it_lacks():
    ledger = count_operations(lambda x: jnp.linalg.cholesky(x), array(4, 4))
    found = compare(ledger, Ledger(()), TABLES["fp16"], "dram").as_json("full")
    assert (found["table"], found["memory"]) == ("fp16", "dram")
    assert found["counts"]["model"]["not_counted"] == [{"primitive": "cholesky", "path": "", "calls": 1}]
    assert found["counts"]["twin"]["not_counted"] == []
    with pytest.warns(UserWarning, match="does not cover all of this program: cholesky. A primitive that is"):
        assert energy(ledger).total == 0.0
    loop = count_operations(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), array())
    with pytest.warns(UserWarning, match="this program: while.*a loop of unknown length is counted for one"):
        energy(loop)


def test_full_prices_everything_else_and_memory():
    ledger = count_operations(lambda x: jnp.exp(x) * x, array(1000))
    assert energy(ledger, "paper").total == 0
    full = energy(ledger, "full", memory="dram")
    multiplications, additions = SOFTWARE["exponential"]
    software = multiplications * 3.7 + additions * 0.9
    assert full.operations == pytest.approx({"exponential": software * 1e-6, "multiply": 3.7e-6})
    # The exponential reads and writes 4 KB, the product reads 8 KB and writes 4.
    assert full.memory == pytest.approx(20000 * 1300 / 8 * 1e-9)
    assert energy(ledger, "full", "fp32_7nm", "hbm2").memory == pytest.approx(20000 * 250 / 8 * 1e-9)
    assert energy(ledger, "full", "fp32_7nm").memory == pytest.approx(20000 * 14 / 8 * 1e-9)
    with pytest.raises(ValueError, match="memory='hbm2' is not known to the energy table 'fp32'; .*'dram'"):
        energy(ledger, "full", memory="hbm2")


def test_products_move_fewer_bytes_in_int8():
    ledger = count_operations(jnp.dot, array(10, 20), array(20, 30))
    for table, width, sums in (
        ("fp32", 4, 4),
        ("fp16", 2, 2),
        ("int8", 1, 1),
        ("int8_int32", 1, 4),
        ("exported", 4, 4),
    ):
        moved = (10 * 20 + 20 * 30) * width + 10 * 30 * sums
        memory = energy(ledger, "full", table, memory="sram_8kb").memory
        assert memory == pytest.approx(moved * 1.25e-9)
    adder = count_operations(adder_matmul, array(10, 20), array(20, 30))
    memory = energy(adder, "full", "exported", memory="sram_8kb").memory
    assert memory == pytest.approx((10 * 20 + 20 * 30 + 4 * 10 * 30) * 1.25e-9)


def test_one_format_for_all_makes_the_traced_one_irrelevant():
    totals = {
        dtype: energy(inference_ledger(digits_model(dtype=dtype)), "full").total
        for dtype in ("float32", "bfloat16")
    }
    assert totals["bfloat16"] == pytest.approx(totals["float32"], rel=1e-9)


def test_a_table_of_ones_own():
    number = NumberFormat(add=1.0, multiply=2.0, sign=0.5, bytes=4)
    table = EnergyTable(
        name="mine",
        source="a measurement",
        formats={"float32": number, "int32": number},
        products=None,
        sums=None,
        elsewhere=None,
        memory={"none": 0.0},
    )
    adder = count_operations(adder_matmul, array(10, 10), array(10, 10))
    assert energy(adder, "full", table, "none").total == pytest.approx(2.5e-6)
    half = count_operations(lambda x: x + x, array(3, dtype=jnp.float16))
    with pytest.raises(ValueError, match="'mine' has no figures for float16"):
        energy(half, "full", table, "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convention": "mac"}, "convention='mac' is not known; choose one of 'paper', 'full'"),
        ({"table": "fp64"}, "table='fp64' is not known; choose one of 'fp32'"),
        ({"memory": "tape"}, "memory='tape' is not known to the energy table 'fp32'; choose one of 'none'"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        energy(count_operations(jnp.dot, array(2), array(2)), **arguments)


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        ("digits", None, (8, 1, 10)),
        ("digits", 16, (16, 1, 10)),
        ("cifar100", None, (32, 3, 100)),
        ("cifar10:3.0.2", None, (32, 3, 10)),
        ("imagenette/160px-v2", None, (224, 3, 10)),
        ("oxford_flowers102", 64, (64, 3, 1000)),
    ],
)
def test_image_sets_are_described_without_being_opened(name, image_size, expected):
    config = default_config()
    config.data.name = name
    config.data.image_size = image_size
    model = configured_model(config)
    assert (model.image_size, model.channels, model.num_classes) == expected


def test_an_unknown_set_asks_for_its_size():
    config = default_config()
    config.data.name = "oxford_flowers102"
    with pytest.raises(ConfigError, match="'oxford_flowers102'.*--config.data.image_size=N"):
        configured_model(config)


def test_tables_of_the_command(capsys):
    text = run(capsys, *DIGITS, "--config.model.similarity=dot", "--convention=full")
    lines = text.splitlines()
    assert "one image of 8x8x1, 10 classes" in lines[0]
    for name in ("scores", "normalization", "softmax, scale, identity", "total"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    (scores,) = (line.split() for line in lines if line.startswith("scores "))
    assert scores[3] == "1.00"  # a dot product, as in the twin
    assert [f"share of full: {what}" in text for what in ("memory", "arithmetic of")] == [True] * 2
    assert lines[-1].startswith("full: ") and "ratio" in lines[-1]
    assert "NOT COUNTED" not in text and "OF UNKNOWN LENGTH" not in text


def test_a_picture_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(capsys, *DIGITS, "--plot", tmp_path / "energy.svg")
    picture = (tmp_path / "energy.svg").read_text()
    assert "<svg" in picture and picture.count("patch_") > 20


def test_a_picture_needs_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = error(capsys, *DIGITS, "--plot", tmp_path / "energy.png")
    assert "error: A picture needs matplotlib" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*DIGITS, "--config.modle.identity=False"], "no field 'modle'. Did you mean 'model'?"),
        ([*DIGITS, "--config.seed=abc"], "--config.seed=abc: invalid literal for int()"),
        ([*DIGITS, "--config.model.arithmetic=add"], "arithmetic='add' is not known"),
        ([*DIGITS, "--config.data.name=flowers"], "--config.data.image_size=N"),
        ([*DIGITS, "--config.data.image_size=9"], "image_size=9 is not a multiple"),
        ([*DIGITS, "--table=fp64"], "invalid choice: 'fp64'"),
        ([*DIGITS, "--convention=mac"], "invalid choice: 'mac'"),
        ([*DIGITS, "extra"], "extra and --config "),
        ([WARM, "extra"], "unknown argument extra"),
        (["--json"], "neither is given. Give one of them"),
        ([WARM, "--config.seed=1"], f"{WARM} names a model as it was trained. Leave one of them out"),
        ([DIGITS[1]], f"{DIGITS[1]} is a file. Give the directory of a run, or --config {DIGITS[1]}"),
        (
            ["/no/such/run"],
            "/no/such/run is not a run's workdir: it has no config.json",
        ),
        (
            [*DIGITS, "--plot=/tmp"],
            "/tmp is a directory. Name the picture's file, such as /tmp/energy.png.",
        ),
        (
            [*DIGITS, "--plot=/no/such/folder/x.png"],
            "x.png cannot be drawn: there is no directory /no/such/folder",
        ),
        (
            ["--config", str(ROOT / "weights/cifar10_twin/config.json")],
            "config.json is no configuration file",
        ),
        (["--config", "configs/no_such.py"], "no_such.py"),
    ],
)
def test_mistakes(capsys, arguments, expected):
    message = error(capsys, *arguments)
    assert expected in message and "Traceback" not in message


def test_a_trained_model_is_that_of_its_configuration(capsys):
    file = [f"--config={ROOT / 'configs/cifar10_adder_vit.py'}:warm", "--config.model.dtype=float32"]
    for arguments in (["--json"], ["--json", "--table", "exported"]):
        trained, configured = (json.loads(run(capsys, *of, *arguments)) for of in ([WARM], file))
        model = "compact/4, one image of 32x32x3, 10 classes"
        assert trained.pop("model") == f"{WARM}: {model}"
        assert configured.pop("model") == f"{ROOT / 'configs/cifar10_adder_vit.py'}:warm: {model}"
        assert trained == configured
    assert run(capsys, WARM).startswith(f"{WARM}: compact/4, one image of 32x32x3, 10 classes\n")


@pytest.fixture
def exported(tmp_path):
    """What is read of an export; its run computed in bfloat16, on another machine."""
    config = json.loads((Path(WARM) / "config.json").read_text())
    config["model"] |= {"dtype": "bfloat16", "implementation": "tpu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "dataset.json").write_text((Path(WARM) / "dataset.json").read_text())
    (tmp_path / "integers.json").write_text("{}")
    return tmp_path


def test_an_export_is_priced_as_what_it_computes(capsys, exported):
    for asked, table in (([], "exported"), (["--table=fp32"], "fp32"), (["--table=traced"], "traced")):
        full = ["--convention=full", "--json"]
        found = json.loads(run(capsys, exported, *asked, *full))
        assert found["table"] == table
        # All but the adder layers computes in float32.
        trained = json.loads(run(capsys, WARM, f"--table={table}", *full))
        assert found | {"model": ""} == trained | {"model": ""}


@pytest.mark.parametrize("model", [DIGITS, [WARM]], ids=["configuration", "weights"])
def test_the_module_runs_as_a_command_without_any_device(model):
    done = subprocess.run(
        [sys.executable, "-m", "adderflax.energy", *model, "--convention", "full", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["convention"] == "full" and not done.stderr
