"""The accuracies on the results pages are those of the runs, and of the weights that come along."""

import json
import re

import jax
import numpy as np
from results_pages import CLAIMS, RESULTS, row

from adderflax.analysis import energy
from adderflax.analysis.configured import configured_model, inference_ledger
from adderflax.analysis.energy_report import split_into_parts
from adderflax.analysis.study import load_study
from adderflax.models.classifier import abstract_variables
from adderflax.models.families import build_model
from adderflax.predict import predict
from adderflax.training.command_line import load_config
from benchmarks import device_estimate


def gap_accuracy(study, name, seeds=(0, 1, 2)):
    """Mean test accuracy of a row of gap_STUDY.jsonl."""
    lines = map(json.loads, (RESULTS / f"gap_{study}.jsonl").read_text().splitlines())
    found = [x["figures"]["test_accuracy"] for x in lines if x["name"] == name and x["seed"] in seeds]
    assert len(found) == len(seeds)
    return np.mean(found)


def test_accuracies_of_the_gap_studies_in_the_claims():
    subset = "CIFAR-10, 5,000 training images, small model, 20 epochs, mean of seeds 0, 1, 2"
    told = [float(number) for cell in row(subset)[:3] for number in re.findall(r"0\.\d{4}", cell)]
    names = ("adder", "adder-features", "adder-warm", "multiply")
    expected = [gap_accuracy("cifar10", f"final-{name}") for name in names]
    expected += [gap_accuracy("cifar10", f"final-multiply-{name}", (0,)) for name in ("features", "warm")]
    np.testing.assert_allclose(told, [*expected, gap_accuracy("cifar10", "final-vit")], atol=5.1e-5)

    adder, twin, vit, _ = row("digits, test, mean of seeds 0, 1, 2")
    told = [float(number) for cell in (adder, twin, vit) for number in re.findall(r"0\.\d{4}", cell)][1:]
    names = ("adder-warm-features", "multiply", "multiply-warm-features", "vit")
    expected = [gap_accuracy("digits", f"final-{name}") for name in names]
    np.testing.assert_allclose(told, expected, atol=5.1e-5)


def test_accuracies_of_the_gap_studies_on_their_page():
    page, readme = (file.read_text() for file in (RESULTS / "gap.md", RESULTS.parent / "README.md"))
    rows = {
        "multiply": "`multiply`, the twin",
        "vit": "`vit`",
        "adder-features": "`adder`, taught the twin's features",
        "adder-warm": "`adder`, a warm start from the twin",
        "adder-warm-features": "`adder`, both",
    }
    for name, label in rows.items():
        cells = [f"{100 * gap_accuracy(study, f'final-{name}'):.1f}" for study in ("digits", "cifar10")]
        assert f"| {label} | {cells[0]} | {cells[1]} |" in page
    both = gap_accuracy("digits", "final-multiply-warm-features")
    assert f"| `multiply`, both | {100 * both:.1f} | |" in page
    # The digits' adder model alone stands in the table of the first command.
    assert f"| `adder` | 97.6 | {100 * gap_accuracy('cifar10', 'final-adder'):.1f} |" in page
    assert re.search(r"^\| `digits_adder_vit.py` \|.*\| 0\.9758 \|$", readme, flags=re.MULTILINE)


NEIGHBORS = {
    "multiply-neighbors": "`multiply`",
    "adder-neighbors": "`adder`, its convolution adds",
    "adder-neighbors-multiply": "`adder`",
    "adder-neighbors-taught": "`adder`, taught, its convolution adds",
    "adder-neighbors-multiply-taught": "`adder`, taught",
    "adder-neighbors-multiply-centered": "`adder`, centered",
    "adder-neighbors-multiply-centered-taught": "`adder`, centered, taught",
    "multiply-neighbors-taught": "`multiply`, taught",
}


CENTERED = {
    "multiply": "`multiply`, the twin",
    "multiply-lr6": "`multiply`, at twice the learning rate",
    "adder": "`adder`, centered",
    "adder-dx-sign": "towards inputs by `sign` instead of `hardtanh`",
    "adder-dx-hardtanh4": "towards inputs by `hardtanh:4`",
    "adder-dx-hardtanh0.25": "towards inputs by `hardtanh:0.25`",
    "adder-dx-full": "towards inputs by `full`",
    "adder-dw-sign": "towards templates by `sign` instead of `full`",
    "adder-dw-hardtanh": "towards templates by `hardtanh`",
    "adder-multiplier4": "templates at 4 times the others' learning rate",
    "adder-multiplier20": "templates at 20 times the others' learning rate",
    "adder-dw-hardtanh-multiplier20": "**towards templates by `hardtanh`, and 20 times**",
    "adder-dw-hardtanh-multiplier40": "towards templates by `hardtanh`, and 40 times",
}


def test_accuracies_with_centered_templates():
    page = (RESULTS / "gap.md").read_text()
    found = {}
    for line in (RESULTS / "gap_centered.jsonl").read_text().splitlines():
        line = json.loads(line)
        found.setdefault(line["name"], []).append(100 * line["figures"]["test_accuracy"])
    clipped, both = "adder-dw-hardtanh", "adder-dw-hardtanh-multiplier20"
    long = {
        "multiply": "`multiply`, the twin",
        "multiply-lr6": "`multiply`, at twice the learning rate",
        "adder": "`adder`, centered",
        "adder-wide": "`adder`, centered, with 96 features",
        "multiply-wide": "`multiply`, with 96 features",
        clipped: "towards templates by `hardtanh`",
        both: "the same, and 20 times",
        "multiply-taught": "`multiply`, taught",
        "adder-taught": "`adder`, centered, taught",
        f"{clipped}-taught": "towards templates by `hardtanh`, taught",
        f"adder-wide-{clipped.removeprefix('adder-')}-taught": "the same, with 96 features",
        "multiply-wide-taught": "`multiply`, with 96 features, taught",
    }
    assert found.keys() == {f"short-{name}" for name in CENTERED} | {f"long-{name}" for name in long}
    short = {name: found[f"short-{name}"] for name in CENTERED}
    for name, label in CENTERED.items():
        (short[name],) = short[name]
        assert f"| {label} | {short[name]:.1f} |" in page, label
    for name, label in long.items():
        seeds = found[f"long-{name}"]
        cells = [f"{value:.1f}" for value in seeds] + [""] * (3 - len(seeds))
        cells.append(f"{np.mean(seeds):.1f}" if seeds[1:] else "")
        row = " ".join(f"| {label} | {' | '.join(cells)} |".split())
        assert f"\n{row}\n" in page, label

    page, readme = (" ".join(text.split()) for text in (page, (RESULTS.parent / "README.md").read_text()))
    gains = [f"{short[name] - short['adder']:.1f}" for name in (clipped, "adder-multiplier20", both)]
    assert "worth {} and {} points alone and {} together".format(*gains) in page
    ahead = [f"{short[both] - short[name]:.1f}" for name in ("multiply", "multiply-lr6")]
    assert "{} points ahead of the twin, and {} ahead of it at twice its rate".format(*ahead) in page
    twin = found["long-multiply"]
    behind = [f"{np.mean(twin) - np.mean(found[f'long-{name}']):.1f}" for name in ("adder", clipped)]
    first = f"{twin[0] - found[f'long-{clipped}'][0]:.1f}"
    assert (
        f"is {behind[0]} points behind its twin" in page and f"{behind[1]} with the clipped gradient" in page
    )
    assert f"its first seed alone had promised {first}." in page
    assert f"on all images it is {behind[0]} behind (three)" in readme
    assert f"a small model {behind[0]} points behind (three seeds)" in CLAIMS
    mean = {name: np.mean(found[f"long-{name}"]) for name in long}
    ahead = f"{mean['adder-wide'] - mean['multiply']:.1f}"
    each = sorted(np.subtract(found["long-adder-wide"], twin))
    seeds = f"three seeds, {each[0]:.1f} to {each[-1]:.1f} by seed"
    assert f"is **{ahead} points ahead of it** ({seeds}, without a teacher)" in page
    first = np.mean(found["long-adder-wide"][:2]) - np.mean(twin[:2])
    assert f"The first two seeds had promised {first:.1f}." in page
    more = np.mean(np.subtract(found["long-multiply-wide"], found["long-adder-wide"][:2]))
    told = (
        f"has {mean['multiply-wide']:.1f} (two seeds), {more:.1f} more than the adder model with these seeds"
    )
    assert f"A twin as wide {told}, where at 64 features it was {behind[0]}" in page
    assert f"and {ahead} ahead (three) if it is half as wide again" in readme
    assert f"{ahead} ahead with half as many features again" in CLAIMS
    lower, higher = np.subtract(found["long-multiply-lr6"], twin[:2])
    assert f"has it at {-lower:.1f} less with one seed and {higher:.1f} more with the other" in page
    taught = mean[f"{clipped}-taught"]
    more, less = taught - mean["adder-taught"], mean["multiply-taught"] - taught
    ahead, behind = (
        f"{taught - twin[0]:.1f} ahead of its teacher",
        f"and {less:.1f} behind a twin that is taught",
    )
    told = f"{ahead}, {taught - mean['multiply']:.1f} ahead of that twin's mean, {behind} as well"
    assert f"Taught by the twin's first seed it is {told}" in page
    each = sorted(np.subtract(found[f"long-{clipped}-taught"], found["long-adder-taught"]))
    assert f"is worth {more:.1f} points, {each[0]:.1f} to {each[-1]:.1f} seed by seed" in page
    assert f"{ahead}, {behind} as well (three seeds of each, one teacher)" in readme
    wide = mean["adder-wide-dw-hardtanh-taught"]
    teacher, less = found["long-multiply-wide"][0], mean["multiply-wide-taught"] - wide
    more, seeds = wide - mean["multiply-taught"], "three"
    told = f"{teacher:.1f}), it is {wide - teacher:.1f} ahead of its teacher and {less:.1f} behind a twin as"
    assert f"trained again, to the same {told} wide that is taught as well; and **{more:.1f} ahead" in page
    told = f"and whose teacher has {teacher - twin[0]:.1f} less ({seeds} seeds of each"
    assert f"whose energy it takes in that convention, {told}" in page
    told = f"it is {less:.1f} behind that twin taught, and {more:.1f} ahead of the taught twin whose energy"
    assert f"{told} it takes ({seeds} of each)" in readme
    told = f"{less:.1f} behind a taught twin as wide and {more:.1f} ahead of the taught one whose energy it"
    assert f"{told} takes ({seeds} seeds of each)" in " ".join(CLAIMS.split())
    assert f"{ahead} (three seeds, one teacher) {behind} as well" in " ".join(CLAIMS.split())


def test_the_wide_adder_model_takes_its_twins_energy():
    runs = {run.name: run for run in load_study("studies/gap_centered.py").runs}
    ledgers, parameters = [], []
    for name in ("long-adder-wide", "long-multiply"):
        model = configured_model(runs[name].configuration(0))
        ledgers.append(inference_ledger(model))
        leaves = jax.tree.leaves(abstract_variables(build_model(model)))
        parameters.append(sum(leaf.size for leaf in leaves))
    cases = {("paper", "fp32"): "{:.1f}", ("paper", "int8_int32"): "{:.2f}", ("full", "fp32"): "{:.0f}"}
    wide, twin = zip(
        *(
            [form.format(1e3 * energy(ledger, *case).total) for ledger in ledgers]
            for case, form in cases.items()
        )
    )
    page = " ".join((RESULTS / "gap.md").read_text().split())
    assert f"takes {wide[0]} uJ an image where the twin of 64 features takes {twin[0]}" in page
    assert f"with {parameters[0] / parameters[1]:.1f} times the parameters" in page
    assert f"it takes {wide[1]} uJ where the twin takes {twin[1]}" in page
    assert f"{wide[2]} where the twin takes {twin[2]}" in page


@jax.numpy_dtype_promotion("standard")
def test_accuracies_with_neighbors():
    page, readme, cifar10 = (
        " ".join(file.read_text().split())
        for file in (RESULTS / "gap.md", RESULTS.parent / "README.md", RESULTS / "cifar10.md")
    )
    lines = [json.loads(line) for line in (RESULTS / "gap_cifar10.jsonl").read_text().splitlines()]
    found, ranks = {}, {}
    for line in lines:
        kind, _, name = line["name"].partition("-")
        found.setdefault((kind, name), []).append(100 * line["figures"]["test_accuracy"])
        layers = [layer["softmax"]["effective_rank"] for layer in line["diversity"]["layers"]]
        ranks[kind, name] = np.mean(layers)
    cells = {
        key: f"{np.mean(values):.1f}{' (one seed)' * (key[0] == 'final' and len(values) == 1)}"
        for key, values in found.items()
    }
    for name, label in NEIGHBORS.items():
        columns = " | ".join(cells.get((kind, name), "") for kind in ("final", "full"))
        assert " ".join(f"| {label} | {columns} |".split()) in page, label

    twin, plain, taught, centered, both, twin_taught = (
        {kind: np.mean(found[kind, name]) for kind in ("final", "full")}
        for name in (
            "multiply-neighbors",
            "adder-neighbors-multiply",
            "adder-neighbors-multiply-taught",
            "adder-neighbors-multiply-centered",
            "adder-neighbors-multiply-centered-taught",
            "multiply-neighbors-taught",
        )
    )
    behind = {kind: f"{twin[kind] - centered[kind]:.1f}" for kind in twin}
    apart = [found["final", f"{n}"] for n in ("multiply-neighbors", "adder-neighbors-multiply-centered")]
    spread = f"{np.std(np.subtract(*apart), ddof=1):.1f}"
    told = f"points behind the twin on the subset without help, ± {spread} by seed"
    assert f"{behind['final']} {told}" in page
    assert f"centered templates {behind['final']} ± {spread} points behind its twin there" in CLAIMS
    plain3, centered3, twin3 = (
        found["screen", name][0] for name in ("adder-lr3", "adder-lr3-centered", "multiply-lr3")
    )
    told = f"without the convolution it gave {centered3 - plain3:.1f} points, of {twin3 - plain3:.1f} that"
    assert told in page
    gap = f"from {twin['final'] - plain['final']:.1f} points behind its twin (one seed) to {behind['final']}"
    assert f"{gap} ± {spread} (three), without any help" in readme
    lost = f"{behind['full']} on all images, where it was {twin['full'] - plain['full']:.1f}"
    assert lost in page
    ahead = both["full"] - twin["full"]
    assert f"{twin['final'] - both['final']:.1f} behind and {ahead:.1f} ahead" in page
    assert "by {:.1f} and {:.1f}.".format(*(twin_taught[kind] - both[kind] for kind in twin)) in page
    worth = np.mean(found["final", "adder-neighbors-multiply-taught"])
    worth -= np.mean(found["final", "adder-neighbors-taught"])
    assert f"worth {worth:.1f} points to the taught model" in page
    told = [ranks["full", f"{n}"] for n in ("adder-neighbors-multiply-centered", "multiply-neighbors")]
    told = "effective rank {:.1f} against the twin's {:.1f} in the second".format(*told)
    assert f"{told} column, where it is {ranks['full', 'adder-neighbors-multiply']:.1f} without" in page
    assert (
        f"({both['full']:.1f} against {twin['full']:.1f} %, one seed; {taught['full']:.1f} without)"
        in cifar10
    )
    without = f"({twin['full'] - plain['full']:.1f} without)"
    assert f"and {behind['full']} points behind it without a teacher {without}" in cifar10
    told = [float(x) for cell in row("CIFAR-10 in full, small model with neighbors, 10 epochs, seed 0")[:2]
            for x in re.findall(r"0\.\d{4}", cell)]  # fmt: skip
    np.testing.assert_allclose(
        [100 * x for x in told], [x["full"] for x in (plain, centered, both, twin, twin_taught)]
    )

    study = load_study("studies/gap_cifar10.py")
    (subset,) = (r for r in study.runs if r.name == "final-adder-neighbors-multiply")
    recipe = load_config("configs/cifar10_adder_vit.py", [])
    for config, text in (
        (subset.configuration(0), "{:.0f} % of this model's"),
        (recipe, "({:.1f} % of the recipe's)"),
    ):
        ledger = inference_ledger(configured_model(config))
        conv = split_into_parts(ledger)["MLP convolution"].macs
        assert text.format(100 * conv / (ledger.macs + ledger.adder_elements)) in page


def test_the_table_of_the_h200_is_what_its_runs_wrote():
    _, second, first = re.split(
        r"^## The \w+ lease", (RESULTS / "cifar10.md").read_text(), flags=re.MULTILINE
    )
    found = []
    for section, names in ((second, ("multiply",)), (first, ("first/multiply", "first/taught"))):
        steps, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith(("| update |", "| twin, v", "| taught adder, v"))
        ]
        found += [(steps, name, cells) for name, cells in zip(names, rows, strict=True)]
    for steps, name, cells in found:
        lines = map(json.loads, (RESULTS / "cifar10" / name / "metrics.jsonl").read_text().splitlines())
        found = {x["step"]: x["validation_accuracy"] for x in lines if "validation_accuracy" in x}
        told = {
            int(step.replace(",", "")): cell for step, cell in zip(steps[1:-1], cells[1:]) if cell[:1] == "0"
        }
        assert len(told) >= 2
        assert {step: f"{found[step]:.3f}" for step in told} == told


@jax.numpy_dtype_promotion("standard")
def test_the_figures_of_the_h200_are_those_of_its_files():
    folder = RESULTS / "cifar10"

    def read(run, name="summary"):
        return json.loads((folder / run / f"{name}.json").read_text())

    def last_speed(run):
        return json.loads((folder / run / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]

    page, readme, config, measuring = (
        re.sub(r"\s+", " ", (RESULTS.parent / name).read_text())
        for name in ("results/cifar10.md", "README.md", "configs/cifar10_adder_vit.py", "docs/measuring.md")
    )
    new, old, taught = read("multiply"), read("first/multiply"), read("first/taught", "evaluation")
    for run in (new, old, taught):
        assert run["test_examples"] == 10_000 and f"| {run['test_accuracy']:.4f} |" in page
    assert new["devices"] == old["devices"] == ["NVIDIA H200"]
    cells = row("CIFAR-10 in full, 3.9 M parameters, 50 epochs on an H200, seed 0")
    assert cells[1].startswith(f"{new['test_accuracy']:.4f};") and new["config"]["epochs"] == 50
    names = ("", "_longer", "_mixed", "_clipped", "_twin")
    warm, longer, mixed, clipped, helped = (read(f"warm{name}") for name in names)
    for run in (warm, longer, mixed, clipped, helped):
        assert run["test_examples"] == 10_000 and f"| {run['test_accuracy']:.4f} |" in page
    seconds = [f"{run['seconds']:,.0f}" for run in (warm, longer, mixed, helped)]
    assert "The first three and the twin's took {}, {}, {} and {} s".format(*seconds) in page
    assert f"in three pieces, {clipped['seconds']:,.0f} s in the last" in page
    assert cells[1] == f"{new['test_accuracy']:.4f}; {helped['test_accuracy']:.4f} with the same help"
    assert helped["config"]["model"] == warm["config"]["model"] | {"arithmetic": "multiply"}
    assert {**helped["config"], "model": 0} == {**warm["config"], "model": 0}
    behind_it = 100 * (helped["test_accuracy"] - warm["test_accuracy"])
    assert f"ends at {helped['test_accuracy']}, where" in page
    assert f"so the adder model, {behind_it:.1f} points behind, is within a point of it at equal help" in page
    ahead = round(10_000 * (mixed["test_accuracy"] - warm["test_accuracy"]))
    assert f"{ahead} of 10,000 images ahead of the first" in page and mixed["test_accuracy"] == 0.8999
    assert cells[0].startswith(f"{warm['test_accuracy']:.4f} from the twin's weights, 2 epochs")
    behind = 100 * (new["test_accuracy"] - warm["test_accuracy"])
    assert f"is {behind:.1f} points behind it, at {100 * warm['test_accuracy']:.1f} %" in page
    assert f"{90 - 100 * warm['test_accuracy']:.2f} points short of 90 %" in page
    assert f"reached {100 * warm['test_accuracy']:.1f} % in those two epochs" in readme
    assert f"cores, {behind:.1f} points behind, and as far behind a twin that had the same" in readme
    assert f"{behind_it:.1f}" == f"{behind:.1f}"
    assert f"in {warm['seconds'] / 60:.0f} minutes: {100 * warm['test_accuracy']:.1f} %" in config
    cells = row("CIFAR-10 in full, 3.8 M parameters, no neighbors, 60 epochs on an H200, seed 0")
    told = [re.search(r"0\.\d{4}", cell).group() for cell in cells[:2]]
    assert told == [f"{run['test_accuracy']:.4f}" for run in (taught, old)]
    for run, pages in ((new, (page, readme, config)), (taught, (page,))):
        assert all(f"{100 * run['test_accuracy']:.1f} %" in text for text in pages)

    speed, last = old["images_per_second"], last_speed("first/taught")
    updating = old["steps"] * 256 / speed
    for told in (
        f"{256e3 / speed:.1f} ms, {speed:,.0f} images/s",
        f"{256e3 / last:.1f} ms",
        f"{last:,.0f} images/s",
        f"{updating:.0f} s of updates",
        f"{old['seconds'] - updating:.0f} s: compilation",
        f"{49_000 / last:.1f} s with the teacher, and {49_000 / speed:.1f} s",
        f"an update of the twin took {256e3 / new['images_per_second']:.1f} ms",
        f"the taught adder model {256e3 / last_speed('taught'):.0f} ms",
        f"the twin needed {new['seconds']:.0f} s",
    ):
        assert told in page, told
    assert f"{49_000 / last:.1f} s" in config
    found = [
        device_estimate.configured_counts(f"configs/cifar10_adder_vit.py{argument}", [])
        for argument in ("", ":multiply")
    ]
    seconds = [sum(device_estimate.seconds_an_epoch(*counts).values()) for counts in found]
    assert "{:.1f} s an epoch for the adder model and {:.1f} s for the twin".format(*seconds) in page
    assert "model {:.1f} s there and the twin {:.1f} s".format(*seconds) in config
    counts = found[0][0]
    assert f"{counts.products / 1e6:.1f} million multiply-accumulates" in readme
    assert f"{(counts.linear + counts.scores) / 1e6:.1f} million terms |x - w|" in readme
    # Windows of three meet nothing at one edge where they step by two, and at both where by one.
    stems = (48**2 - 47**2) * 3 * 64 + (24**2 - 23**2) * 64 * 128
    padding = stems + 7 * 512 * (24**2 - 22**2)
    assert f"{padding / 1e6:.2f} of the {counts.products / 1e6:.1f} million" in measuring


def test_the_table_of_the_warm_runs_is_what_they_wrote():
    lines = (RESULTS / "cifar10.md").read_text().splitlines()
    found = {}
    adder = ("warm", "warm_longer", "warm_mixed", "warm_clipped")
    for run, ordinal in zip((*adder, "warm_twin"), ("first", "second", "third", "fourth", "twin's")):
        row_of_run = f"| {ordinal} run, v"
        told = next(line for line in lines if line.startswith(row_of_run)).split("|")[2:-1]
        written = map(json.loads, (RESULTS / "cifar10" / run / "metrics.jsonl").read_text().splitlines())
        found[run] = [f"{x['validation_accuracy']:.3f}" for x in written if "validation_accuracy" in x]
        assert [cell.strip() for cell in told if cell.strip()] == found[run]
        test = json.loads((RESULTS / "cifar10" / run / "summary.json").read_text())["test_accuracy"]
        assert f"| {ordinal} run, test accuracy | | | | | | {test:.4f} |" in lines
    assert [len(accuracies) for accuracies in found.values()] == [6, 4, 6, 6, 6]


def test_the_resnet_of_ten_epochs():
    page = (RESULTS / "cifar10.md").read_text()
    config = (RESULTS.parent / "configs" / "cifar10_adder_resnet20.py").read_text()
    labels = {"adder": "adder, 0.27 M parameters", "multiply": "the same, every convolution multiplies"}
    found = {}
    for name, label in labels.items():
        summary = json.loads((RESULTS / "cifar10" / f"resnet20_{name}" / "summary.json").read_text())
        found[name] = summary["test_accuracy"]
        assert f"\n| {label} | {found[name]:.4f} | {summary['seconds'] / 60:.0f} |\n" in page
        assert (summary["parameters"], summary["config"]["epochs"]) == (272_484, 10.0)
        assert summary["config"]["model"]["arithmetic"] == name
        hours = 40 * summary["seconds"] / 3600
        assert name != "adder" or f"which would take {hours:.0f} hours on that core" in " ".join(page.split())
    assert f"in ten epochs it is {100 * (found['multiply'] - found['adder']):.1f} points behind" in page
    told = f"reached {found['adder']:.4f} of the test images, its twin {found['multiply']:.4f}"
    assert told in " ".join(config.split())


def test_the_weights_that_come_along_are_of_the_runs():
    for weights, run in (("cifar10_twin", "multiply"), ("cifar10_adder_vit", "warm")):
        ours, theirs = (
            json.loads((folder / "config.json").read_text())
            for folder in (RESULTS.parent / "weights" / weights, RESULTS / "cifar10" / run)
        )
        for config in (ours, theirs):  # what belongs to the machine
            config["data"] |= {"data_dir": None, "workers": 0}
            config["distillation"]["teacher"] = config["warm_start"]["source"] = None
        assert ours == theirs


@jax.numpy_dtype_promotion("standard")
def test_the_weights_that_come_along_predict():
    # Ramps, and stripes as wide as a patch: what the model said of them when its file was written.
    y, x = np.mgrid[:32, :32]
    ramps = np.stack([8 * y, 8 * x, 4 * (x + y)], axis=-1).astype(np.uint8)
    stripes = np.where((x // 4 % 2)[..., None], np.uint8([200, 40, 40]), np.uint8([30, 90, 220]))
    found = predict(RESULTS.parent / "weights" / "cifar10_adder_vit", [ramps, stripes])
    told = [{"airplane": 0.435, "frog": 0.253, "cat": 0.191}, {"ship": 0.781, "airplane": 0.073}]
    for probabilities, expected in zip(found, told, strict=True):
        assert len(probabilities) == 10
        for name, value in expected.items():
            assert abs(probabilities[name] - value) < 0.02, (name, probabilities)


def test_what_the_identity_does_to_accuracies():
    """Pairs of runs that differ in it alone, by seed."""

    def gained(file, with_it, without):
        found = {}
        for line in map(json.loads, (RESULTS / f"{file}.jsonl").read_text().splitlines()):
            found.setdefault(line["name"], {})[line["seed"]] = 100 * line["figures"]["test_accuracy"]
        return [found[with_it][seed] - found[without][seed] for seed in (0, 1, 2)]

    multiplying = [
        gained("rank_digits", "dot-I-multiply", "dot-none-multiply"),
        gained("rank_digits", "l1-I-multiply", "l1-none-multiply"),
        gained("gap_cifar10", "final-multiply-neighbors", "final-multiply-neighbors-no-identity"),
    ]
    adder, centered = (
        [gained("rank_depth", f"{n}-{kind}-I", f"{n}-{kind}-none") for n in (4, 12)]
        for kind in ("adder", "centered")
    )
    assert all(gain > 0 for row in multiplying for gain in row)
    means = sorted(np.mean(row) for row in multiplying)
    assert f"(by {means[0]:.1f} to {means[-1]:.1f} points, in all 9 pairs of three rows)" in CLAIMS
    lost = [[gain < 0 for row in rows for gain in row] for rows in (adder, centered)]
    assert [sum(each) for each in lost] == [5, 6]
    costs = sorted(-np.mean(row) for row in adder + centered)
    told = f"costs adder models** of 4 and 12 blocks {costs[0]:.1f} to {costs[-1]:.1f} (in 11 of 12 pairs)"
    assert told in CLAIMS
    assert f"by {costs[0]:.1f} to {costs[-1]:.1f} points a row" in " ".join(CLAIMS.split())
