"""The results pages agree with the files and programs that their figures are from: all but accuracies."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from results_pages import CLAIMS, RESULTS, row

from adderflax.analysis import TABLES, energy
from adderflax.analysis.configured import configured_model, inference_ledger, multiplying_twin
from adderflax.analysis.energy_report import compare
from adderflax.analysis.primitives import ADDER, PRODUCT
from adderflax.training.command_line import load_config


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(("model", "config"), [("DeiT-Ti", "ti"), ("DeiT-S", "s"), ("DeiT-B", "b")])
def test_energies(model, config):
    path = f"configs/imagenet_adder_deit_{config}.py"
    default = configured_model(load_config(path, []))
    dot = configured_model(load_config(path, ["--config.model.similarity=dot"]))
    paper, full = (
        [
            energy(inference_ledger(found), convention).total
            for found in (multiplying_twin(default), dot, default)
        ]
        for convention in ("paper", "full")
    )
    expected = [paper[0], paper[1], paper[0] / paper[1], paper[2], paper[0] / paper[2]]
    expected += [full[0], full[2], full[0] / full[2]]
    np.testing.assert_allclose([float(cell) for cell in row(model)], expected, atol=0.0051)


@pytest.mark.parametrize("similarity", ["dot", "l1"])
@pytest.mark.parametrize("linear", ["multiply", "adder"])
def test_ranks(similarity, linear):
    ranks = {"none": [], "I": []}
    for line in (RESULTS / "rank_digits.jsonl").read_text().splitlines():
        found = json.loads(line)
        for identity, values in ranks.items():
            if found["name"] == f"{similarity}-{identity}-{linear}":
                layers = found["diversity"]["layers"]
                values.append(np.mean([layer["softmax"]["effective_rank"] for layer in layers]))
    assert [len(values) for values in ranks.values()] == [3, 3]
    told = {"multiply": "multiplying", "adder": "adder"}[linear]
    cells = row(f"{'L1' if similarity == 'l1' else 'dot'}, {told} layers")
    np.testing.assert_allclose(
        [float(cell) for cell in cells], [np.mean(values) for values in ranks.values()], atol=0.0051
    )


def test_the_identity_by_depth():
    figures, accuracies = {}, {}
    for file in ("rank_depth", "gap_cifar10"):
        for line in (RESULTS / f"{file}.jsonl").read_text().splitlines():
            line = json.loads(line)
            layers = line["diversity"]["layers"]
            rank = np.mean([layer["softmax"]["effective_rank"] for layer in layers])
            cosine = layers[-1]["features"]["token_cosine_similarity"]
            accuracy = 100 * line["figures"]["test_accuracy"]
            figures[line["name"], line["seed"]] = accuracy, rank, cosine
            accuracies.setdefault(line["name"], []).append(accuracy)
    labels = {
        "multiply": "multiplying layers, dot product",
        "adder": "adder layers, L1",
        "centered": "adder layers, L1, centered",
    }
    changes = []
    for depth in (4, 12):
        for name, label in labels.items():
            without, used = (
                np.array([figures[f"{depth}-{name}-{identity}", seed] for seed in (0, 1, 2)])
                for identity in ("none", "I")
            )
            # Tokens less alike, and maps of a higher rank, in every pair of runs.
            assert np.all(used[:, 2] < without[:, 2]) and np.all(used[:, 1] > without[:, 1])
            pairs = list(zip(without.mean(axis=0), used.mean(axis=0)))
            cells = [f"{a:.{digits}f}, {b:.{digits}f}" for (a, b), digits in zip(pairs, (1, 1, 2))]
            assert " | ".join([f"| {label} | {depth}", *cells]) + " |" in CLAIMS
            changes.append(f"{np.mean(used[:, 0] - without[:, 0]):+.1f}")
    page = " ".join(CLAIMS.split())
    told = "{}, {} and {} points with 12 blocks, for multiplying, adder and centered layers"
    assert told.format(*changes[3:]) in page
    names = ("adder-neighbors-multiply-centered", "multiply-neighbors")
    rows = [f"{kind}-{name}{i}" for kind in ("final", "full") for name in names for i in ("-no-identity", "")]
    told = (
        "{:.1f} % without and {:.1f} % with it for the centered adder model, {:.1f} and {:.1f} % for its"
        " twin, which gains with each of its seeds, on 5,000 images (three seeds); {:.1f} and {:.1f} %,"
        " {:.1f} and {:.1f} % on all (one)"
    )
    assert [len(accuracies[row]) for row in rows] == [3] * 4 + [1] * 4
    assert told.format(*(np.mean(accuracies[row]) for row in rows)) in page


def test_the_kernels_of_the_cpu():
    seconds = {}
    for record in json.loads((RESULTS / "operators" / "AMD_EPYC_x2.json").read_text())["records"]:
        key = tuple(record["lengths"]), record["method"]
        seconds.setdefault(key, {})[record["contender"]] = record["seconds"]

    def told(method, other):
        ratios = [s[other] / s["kernels"] for (_, m), s in seconds.items() if m == method and other in s]
        return [f"{value:.2f}" for value in (min(ratios), max(ratios), np.median(ratios))]

    page = " ".join((RESULTS.parent / "docs" / "accelerators.md").read_text().split())
    for method, other, text in (
        ("forward", "adderflax", "the forward pass {} to {} times as fast (median {})"),
        ("input gradient", "adderflax", "the input gradient {} to {} times ({})"),
        ("int8", "adderflax", "sums of int8 {} to {} times ({})"),
        (
            "forward",
            "multiply",
            "`jnp.matmul` in float32 the forward pass is {} to {} times as fast ({})",
        ),
        ("int8", "multiply", "The sums of int8 are {} to {} times as fast as that float32 product ({})"),
        ("int8", "torch int8", "{} to {} times their speed ({})"),
    ):
        assert text.format(*told(method, other)) in page
    readme = " ".join((RESULTS.parent / "README.md").read_text().split())
    assert f"forward pass has {told('forward', 'multiply')[2]} times the speed of a float32 product" in readme


def test_the_speed_of_int8():
    rates = {}
    for record in json.loads((RESULTS / "inference.json").read_text())["records"]:
        rates.setdefault(record["batch"], {})[record["contender"]] = record["images_per_second"]
    page = " ".join((RESULTS / "integers.md").read_text().split())
    for batch, found in rates.items():
        assert f"| {batch} | {' | '.join(f'{rate:.0f}' for rate in found.values())} |" in page
    int8 = {batch: found["adder, int8, kernels"] for batch, found in rates.items()}
    twin, own = (
        {batch: f"{int8[batch] / found[name]:.2f}" for batch, found in rates.items()}
        for name in ("twin, float32", "adder, float32")
    )
    assert (
        f"{twin[64]} times the speed of its twin in float32 at 64 images and {twin[1]} times at one" in page
    )
    assert f"and {own[64]} and {own[1]} times its own in float32" in page
    kernels = {
        batch: found["adder, float32, kernels"] / found["twin, float32"] for batch, found in rates.items()
    }
    assert f"in float32 it has {kernels[64]:.2f} and {kernels[1]:.2f} times the twin's" in page


def test_ranks_of_the_weights_that_come_along():
    told, features = [], []
    for model, label in (
        ("adder", "adder model, L1, 89.9 % of the test images"),
        ("twin", "twin, dot product, 90.7 %"),
    ):
        layers = json.loads((RESULTS / "diversity_cifar10" / model / "diversity.json").read_text())["layers"]
        assert row(label) == [f"{layer['softmax']['effective_rank']:.1f}" for layer in layers]
        told += [layer["softmax_plus_identity"]["effective_rank"] for layer in layers]
        features.append(f"{layers[-1]['features']['token_cosine_similarity']:.2f}")
    page = (RESULTS / "claims.md").read_text()
    assert f"both keep {min(told):.0f} to {max(told):.0f} of 64" in page
    assert f"a cosine of {' and '.join(features)}." in page


@jax.numpy_dtype_promotion("standard")
def test_ratios_by_number_format():
    model = configured_model(load_config("configs/imagenet_adder_deit_ti.py", []))
    ours, twins = inference_ledger(model), inference_ledger(multiplying_twin(model))
    told = re.search(
        r"int8 table the same convention gives (.*) for DeiT-Ti, with fp16 ([\d.]*):.*ratio is ([\d.]*\d)\.",
        CLAIMS,
        flags=re.DOTALL,
    )
    for cell, table in zip(told.groups(), ("int8", "fp16", "int8_int32")):
        ratio = energy(twins, "paper", table).total / energy(ours, "paper", table).total
        assert f"{ratio:.2f}" == cell, table
    told = re.search(
        r"With it DeiT-Ti has (\S+) in place of (\S+), at 7 nm (\S+) in place of (\S+), in int8 alone (\S+)"
        r" in place of ([\d.]+),",
        " ".join(CLAIMS.split()),
    ).groups()
    tables = ("int8_int32", "int8_int32_7nm", "int8")
    for with_absolute, without, table in zip(told[::2], told[1::2], tables, strict=True):
        report = compare(ours, twins, TABLES[table], "sram_1mb")
        adds, products = (total.total for total in report.total("paper"))
        counted = report.total("full")[0].operations
        inside = counted[ADDER] + counted[PRODUCT]
        assert (f"{products / inside:.2f}", f"{products / adds:.2f}") == (with_absolute, without), table


@jax.numpy_dtype_promotion("standard")
def test_ratios_of_other_machines():
    found, totals = {}, {}
    for name in ("imagenet_adder_deit_ti", "cifar10_adder_vit"):
        model = configured_model(load_config(f"configs/{name}.py", []))
        for setting in (
            ("paper", "exported", "sram_1mb"),
            ("paper", "traced", "sram_1mb"),
            ("full", "fp32", "dram"),
            ("full", "int8_int32", "sram_1mb"),
        ):
            report = compare(
                inference_ledger(model),
                inference_ledger(multiplying_twin(model)),
                TABLES[setting[1]],
                setting[2],
            )
            ours, twin = (energy.total for energy in report.total(setting[0]))
            found[name[:5], *setting[:2]] = f"{twin / ours:.2f}"
            totals[name[:5], *setting[:2]] = ours, twin
    page = " ".join(CLAIMS.split())
    exported, small = (found[name, "paper", "exported"] for name in ("image", "cifar"))
    assert f"{exported} for DeiT-Ti and {small} for CIFAR-10's model" in page
    assert f"exported in int8 ({exported})" in page
    assert "({:.3f} against {:.3f} mJ)".format(*totals["cifar", "paper", "exported"]) in page
    assert f"(`--table traced`), has {found['image', 'paper', 'traced']}." in page
    dram = found["image", "full", "fp32"]
    assert f"(`--memory dram`: {dram})" in page and f"comes from DRAM ({dram})" in page
    ours, small = (found[name, "full", "int8_int32"] for name in ("image", "cifar"))
    assert f"{ours} in `full` with `--table int8_int32`, and {small} for CIFAR-10's model" in page
    plain = dataclasses.replace(model, centered=False)
    plain, twin = (inference_ledger(each) for each in (plain, multiplying_twin(plain)))
    ours, twin = (each.total for each in compare(plain, twin, TABLES["int8_int32"], "sram_1mb").total("full"))
    assert f"has {twin / ours:.2f} (`--config.model.centered=False`)" in page


@jax.numpy_dtype_promotion("standard")
def test_ratios_at_7_nm():
    columns = [("fp32", "paper"), ("fp32", "full"), ("traced", "paper")]
    columns += [("int8_int32", "paper"), ("int8_int32", "full")]
    (section,) = re.findall(r"^\| DeiT, ratio at 45 nm.*?\n\n", CLAIMS, flags=re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.strip().splitlines()[2:]]
    tables, *told = rows
    assert tables[1:] == [f"`{table}`, `{table}_7nm`" for table, _ in columns]
    for size, (label, *cells) in zip(("ti", "s", "b"), told, strict=True):
        assert label == size.title()
        model = configured_model(load_config(f"configs/imagenet_adder_deit_{size}.py", []))
        ledgers = inference_ledger(model), inference_ledger(multiplying_twin(model))
        for cell, (table, convention) in zip(cells, columns, strict=True):
            reports = (compare(*ledgers, TABLES[name], "sram_1mb") for name in (table, f"{table}_7nm"))
            found = [[total.total for total in report.total(convention)] for report in reports]
            assert cell == ", ".join(f"{twin / ours:.2f}" for ours, twin in found), (size, table, convention)
    for column, what in ((0, "{} to {} at 7 nm)"), (2, "bfloat16 at 7 nm ({} to {})")):
        seven = [cells[column].split(", ")[1] for _, *cells in told]
        assert what.format(min(seven), max(seven)) in CLAIMS


def test_indices_of_random_maps(capsys):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", CLAIMS, flags=re.MULTILINE | re.DOTALL)
    with jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, "claims.md", "exec"), {})
    printed = [re.findall(r"\d+", line.partition("[")[2]) for line in capsys.readouterr().out.splitlines()]
    told = [re.findall(r"\d+", cell) for start in ("dot product", "L1") for cell in row(start)]
    # Singular values of another BLAS may move an index by one.
    np.testing.assert_allclose(np.array(printed, int), np.array(told, int), atol=1)
    assert len(told) == 4


def test_pages_show_pictures_that_exist():
    for page in RESULTS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (RESULTS / target).exists(), f"{page.name}: {target}"


def test_the_table_of_widths_is_that_of_its_lines():
    page = (RESULTS / "integers.md").read_text().partition("## ")[0]
    lines = list(map(json.loads, (RESULTS / "integers.jsonl").read_text().splitlines()))
    header, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| ")
    )
    forms = {"adder layers in integers": "integer", "nothing but integers": "integer_only"}
    told = {}
    for title, exact, *cells in rows:
        model, _, form = title.partition(": ")
        model, _, images = model.partition(
            ", 0.2 M parameters, " if "0.2" in model else ", 3.9 M parameters, "
        )
        for name, cell in zip(header[2:], cells):
            if cell:
                told[model, int(name[0]), forms[form]] = exact, cell
        found = {f"{line['test_examples']:,} images" for line in lines if line["model"] == model}
        assert not images or {images} == found
    assert told == {
        (line["model"], line["bits"], form): tuple(
            f"{100 * line[f'test_accuracy_{kind}']:.1f}" for kind in ("float", form)
        )
        for line in lines
        for form in forms.values()
        if f"test_accuracy_{form}" in line
    }


@jax.numpy_dtype_promotion("standard")
def test_the_energy_of_whole_numbers_is_that_of_its_lines():
    page = (RESULTS / "integers.md").read_text()
    claims, section = (" ".join(text.split()) for text in (CLAIMS, page.partition("## Energy, by the")[2]))
    found, millions, twins = {}, {}, {}
    for line in map(json.loads, (RESULTS / "integers_energy.jsonl").read_text().splitlines()):
        name = line["model"].partition(":")[0].removeprefix("runs/")
        memory = line["memory_of_products"] + line["other_memory"]
        with_magnitudes = line["paper"] + line["absolute_values"]
        energies = line["paper"], with_magnitudes, line["full"] - memory, line["full"]
        found.setdefault(name, []).extend(1e3 * each for each in energies)
        millions[name] = f"{line['multiply'] / 1e6:.1f} "
        twins[name, line["table"]] = f"{1e3 * line['twin_paper']:.1f} uJ"
    labels = {
        "cifar10_int8": "adder model, 8 bits",
        "cifar10_int4": "adder model, 4 bits, beside no twin",
        "twin_int8": "twin, 8 bits",
    }
    assert found.keys() == labels.keys()
    ratios = [f"{twin / own:.2f}" for twin, own in zip(found["twin_int8"], found["cifar10_int8"])]
    for name, label in labels.items():
        cells = [f"{each:.0f}" if each >= 100 else f"{each:.1f}" for each in found[name]]
        if name == "cifar10_int8":
            cells = [f"{cell} ({ratio})" for cell, ratio in zip(cells, ratios)]
        assert f"\n| {label} | {' | '.join(cells)} |\n" in page
    assert f"{millions['cifar10_int8']}million multiplications in the adder" in section
    assert f"adder model and {millions['twin_int8']}in the twin" in section
    ours, twin = f"{found['cifar10_int8'][0]:.1f}", f"{found['twin_int8'][0]:.1f}"
    assert f"takes {twins['cifar10_int8', 'integer_only']} here in place of {twin}" in section
    paper, magnitudes, arithmetic, full = ratios[:4]
    told = f"CIFAR-10's model takes {ours} uJ in `paper` and its twin's own export {twin}: {paper}."
    assert f"{told} With |.| that is {magnitudes}, for all arithmetic {arithmetic}, and {full} in" in claims
    told = f"**holds** in `paper` ({paper}, with \\|.\\| {magnitudes}), **not** for all"
    assert f"{told} arithmetic ({arithmetic}) nor in `full` ({full})" in claims
    assert float(arithmetic) < 2 and "the ratio at 45 nm is below 2" in section
    model = configured_model(load_config("configs/cifar10_adder_vit.py", []))
    report = compare(
        inference_ledger(model), inference_ledger(multiplying_twin(model)), TABLES["int8_int32"], "none"
    )
    ours, twin = (total.total for total in report.total("paper"))
    assert f"is above the {twin / ours:.2f} of `--table int8_int32`" in section
