"""Operations of models without floats: those that the reference runs, with bits that hold what it meets."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from integer_models import ALL_ADD, INFO, MODELS, SMALL, made

from adderflax import energy as command
from adderflax.analysis import TABLES, energy
from adderflax.analysis import integer_only_reference as reference
from adderflax.analysis.accumulators import Scores
from adderflax.analysis.configured import inference_ledger, multiplying_twin
from adderflax.analysis.energy_report import compare, layer_name
from adderflax.analysis.integer_files import write_integer_only, write_integers
from adderflax.analysis.integer_ledger import integer_only_ledger
from adderflax.analysis.integer_only import at_the_limits, integer_only_model
from adderflax.analysis.integer_reference import ACCUMULATORS
from adderflax.analysis.integers import quantize
from adderflax.analysis.ledger import width_name, widths
from adderflax.analysis.primitives import ADDER, PRODUCT
from adderflax.data import normalize_batch
from adderflax.training.config import default_config
from adderflax.training.restore import load_step

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def models(request):
    return made(**MODELS[request.param])


def sums_of_layers(ledger):
    layers = ledger.group(lambda entry: layer_name(entry.path) if entry.kind in (ADDER, PRODUCT) else "")
    return {name: (part.macs, part.adder_elements) for name, part in layers.items() if name}


def test_layers_have_the_sums_of_the_model_with_floats(models):
    integers, whole, _ = models
    config = integers.model.config
    assert sums_of_layers(integer_only_ledger(whole)) == sums_of_layers(inference_ledger(config))
    twin = integer_only_ledger(whole, twin=True)
    assert sums_of_layers(twin) == sums_of_layers(inference_ledger(multiplying_twin(config)))
    assert twin.adder_elements == 0


class Seen(np.ndarray):
    """Integers that note what is multiplied, divided and made positive, and the bits of what was."""

    notes = None

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        plain = [each.view(np.ndarray) if isinstance(each, Seen) else each for each in inputs]
        result = getattr(ufunc, method)(*plain, **keywords)
        name = {"multiply": "multiply", "square": "multiply", "floor_divide": "divide"}.get(ufunc.__name__)
        name = "absolute" if ufunc.__name__ == "absolute" else name
        known = [each for each in plain[name == "divide" :] if not isinstance(each, np.ndarray)]
        # A power of two shifts, and a truth value chooses.
        if name and not any(isinstance(each, bool) or abs(each).bit_count() == 1 for each in known):
            operands = plain * 2 if ufunc.__name__ == "square" else plain
            Seen.notes.append((name, result.size, [bits(each) for each in operands]))
        return result.view(Seen) if isinstance(result, np.ndarray) else result


def bits(values):
    """Of a two's complement, or without a sign where nothing is below 0."""
    low, high = int(np.min(values)), int(np.max(values))
    return high.bit_length() if low >= 0 else max(high, ~low).bit_length() + 1


def watched(monkeypatch, whole, run):
    """What the reference notes as it runs, roots and lengths as one operation each."""

    def root(values):
        Seen.notes.append(("square_root", values.size, [bits(values)]))
        return square_root(values.view(np.ndarray)).view(Seen)

    square_root, bit_length = reference.square_root, reference.bit_length
    monkeypatch.setattr(reference, "square_root", root)
    monkeypatch.setattr(
        reference, "bit_length", lambda values: bit_length(values.view(np.ndarray)).view(Seen)
    )
    plain = (reference.distances, np.matmul)
    sums = (lambda x, y, f=f: f(x.view(np.ndarray), y.view(np.ndarray)).view(Seen) for f in plain)
    model = reference.IntegerOnly(whole.described, whole.arrays, *sums)
    model._arrays = {name: array.view(Seen) for name, array in model._arrays.items()}
    Seen.notes = []
    run(model)
    monkeypatch.undo()
    return Seen.notes


def told(entries):
    """What they count of such operations: the bits and how often."""
    operations = ("multiply", "divide", "square_root", "absolute")
    for entry in entries:
        if entry.kind not in (ADDER, PRODUCT):
            counts = {key: n for key, n in entry.operations.items() if key[0] in operations}
            if counts:
                yield counts


def holds(width, operation, found):
    """Whether these bits are enough for the operands that were found."""
    if operation == "divide":  # a power of two by what is told
        found = found[1:]
    return all(f <= w for f, w in zip(sorted(found), sorted(widths(width))))


def test_operations_are_those_that_the_reference_runs(models, monkeypatch):
    """Each at its place in the page's order, with enough bits for ordinary images and at the limits."""
    _, whole, pixels = models
    entries, limits = integer_only_ledger(whole).entries, at_the_limits(whole)
    many = watched(monkeypatch, whole, lambda model: model.logits(pixels))
    limited = watched(monkeypatch, whole, lambda model: model.trace_limits(**limits))
    for notes, images, whole_run in ((many, len(pixels), True), (limited, len(limits["tokens"]), False)):
        # From the end: at the limits images and their embedding are left out.
        counted, left = [*told(entries)], {}
        for operation, number, found in reversed(notes):
            left = left or (counted.pop() if counted else {})
            number //= images
            fitting = [  # from the end, too
                key
                for key, n in reversed(left.items())
                if key[0] == operation and n >= number and holds(key[1], operation, found)
            ]
            if not fitting and operation == "absolute" and found[0] <= reference.LARGEST:
                counted, left = [*counted, *([left] if left else [])], {}
                continue  # of a row that no input makes large enough to be shifted
            assert fitting, (operation, number, found, left)
            left = {key: n - number * (key == fitting[0]) for key, n in left.items()}
            left = {key: n for key, n in left.items() if n}
        # The first row of numbers at the limits, which is given, is seen when it is multiplied.
        assert {operation for operation, _ in left} <= (set() if whole_run else {"absolute"})
        assert not (whole_run and counted)


def test_other_units_are_counted_where_the_reference_takes_them(models, monkeypatch):
    """In the page's order: halves where values get coarser, limits wherever they are reached."""
    _, whole, pixels = models
    counted = [entry for entry in integer_only_ledger(whole).entries if entry.operator == "rescale"]
    adds, others = (
        [entry for entry in counted if any(name == "add" for name, _ in entry.operations) == rounds]
        for rounds in (True, False)
    )
    rescaled, noted_calls = reference.rescaled, []

    def noted(x, exponent, bound=reference.WIDE):
        places = exponent - x.exponent
        noted_calls.append((places, x.integers, reference.shifted(x.integers, places), bound))
        return rescaled(x, exponent, bound)

    monkeypatch.setattr(reference, "rescaled", noted)
    limits = at_the_limits(whole)
    whole.trace_limits(**limits)
    limited = noted_calls[:-1]  # without what is looked up in the end
    noted_calls.clear()
    whole.logits(pixels)
    for calls, images in ((noted_calls, len(pixels)), (limited, len(limits["tokens"]))):
        rounded = [call for call in calls if call[0] > 0]
        assert images != len(pixels) or len(rounded) == len(adds)
        for entry, (places, before, after, bound) in zip(reversed(adds), reversed(rounded)):
            ((width, n),), ((_, left),) = entry.read.items(), entry.written.items()
            assert n == left == before.size // images
            told = {name: (widths(w)[0], count) for (name, w), count in entry.operations.items()}
            assert bits(before + (1 << places - 1)) <= told["add"][0] <= widths(width)[0] + 1
            assert told["add"][1] == n and bits(before) <= widths(width)[0]
            exceeded = int(after.max() >= 1 << bound - 1) + int(after.min() < -(1 << bound - 1))
            compared, limits_held = told.get("compare", (bound, 0))
            assert bits(after) <= compared <= max(widths(width)[0] - places + 1, bound)
            assert n * exceeded <= limits_held <= 2 * n
        assert sum(bits(after) > bound for places, _, after, bound in calls if places <= 0) <= len(others)


def test_what_is_summed_and_attended_has_its_bits(models):
    _, whole, pixels = models
    limits = whole.trace_limits(**at_the_limits(whole))
    ledger = integer_only_ledger(whole)
    for traced, prefix in ((whole.trace(pixels), ""), (limits, reference.LIMITS)):
        for index in range(whole.described["model"]["depth"]):
            name = f"block_{index}/attention"
            (entry,) = (e for e in ledger.entries if layer_name(e.path) == name and e.operator == "heads")
            ((width, count),) = entry.written.items()
            heads = traced[f"{prefix}{name}/heads"]
            assert count == heads[0].size and bits(heads) <= widths(width)[0]
    for entry in ledger.entries:
        if entry.sums:
            ((width, _),) = entry.written.items()
            assert width == entry.sums
            layer = whole.described["layers"].get(layer_name(entry.path))
            assert layer is None or widths(width) == (layer["accumulator_bits"],)


def test_operands_of_attention_have_their_bits(models):
    _, whole, pixels = models
    seen = []

    def noting(product):
        def noted(x, y):
            if x.ndim == 4:  # of scores, and of exponentials or weights with values
                seen.append((bits(x), bits(y)))
            return product(x, y)

        return noted

    model = reference.IntegerOnly(
        whole.described, whole.arrays, noting(reference.distances), noting(np.matmul)
    )
    model.logits(pixels)
    model.trace_limits(**at_the_limits(whole))
    entries = [e for e in integer_only_ledger(whole).entries if e.sums and e.path.endswith("/attention")]
    assert len(seen) == 2 * len(entries) > 0
    for (x, y), entry in zip(seen, 2 * entries):
        told = {name: widths(width) for name, width in entry.operations}
        first, second = told["multiply"] if "multiply" in told else 2 * told["absolute"]
        assert x <= first and y <= second
        # Where the largest is reached, by every row's exponentials, no bit is left over.
        assert "multiply" not in told or (first, second) in ((8, 8), (16, 8))
    # No image takes scores as far apart as accumulators go.
    for name in whole.described["attentions"]:
        operands = Scores(8, whole.described["model"]["similarity"] == "l1", 8).operands()
        given = {f"{ACCUMULATORS}{name}/{part}": array for part, array in operands.items()}
        (scores,) = whole.trace_accumulators(given).values()
        (entry,) = (
            e
            for e in integer_only_ledger(whole).entries
            if layer_name(e.path) == name and e.operator == "exponentials"
        )
        assert ("multiply", width_name(bits(scores.max() - scores), 15)) in entry.operations


TWIN = {"arithmetic": "multiply", "patch_embedding": "multiply", "head": "multiply", "aggregation": "dot"}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_a_twin_is_that_of_an_export(name):
    """Its steps and what they move are those of a model that multiplies, its accumulators no narrower."""
    fields = dict(MODELS[name])
    assumed = integer_only_ledger(made(**fields)[1], twin=True)
    fields |= TWIN | ({"mlp_convolution": "multiply"} if "mlp_kernel_size" in fields else {})
    own = integer_only_ledger(made(**fields | {"centered": False, "power_activation": False})[1])
    assert assumed.macs == own.macs
    same = ("multiply", "absolute", "shift", "divide", "square_root")
    assert all(assumed.operations[name] == own.operations[name] for name in same)
    # Where units are the same nothing is brought to another.
    entries = ([e for e in ledger.entries if e.operator != "rescale"] for ledger in (assumed, own))
    for theirs, ours in zip(*entries, strict=True):
        assert (theirs.path, theirs.operator) == (ours.path, ours.operator)
        moved = [[sum(each.read.values()), sum(each.written.values())] for each in (theirs, ours)]
        assert moved[0] == moved[1], theirs
        if theirs.sums:
            assert widths(theirs.sums) >= widths(ours.sums) and widths(ours.sums)[0] >= 16


def test_a_twin_without_normalizations_has_the_same_outputs():
    """Its sums have more bits, by which their unit is finer."""
    _, whole, _ = made(normalization="none")
    widest = {}
    for twin in (False, True):
        for entry in integer_only_ledger(whole, twin=twin).entries:
            for operation, width in entry.operations if entry.operator == "rescale" else ():
                widest[twin, operation] = max(widest.get((twin, operation), 0), *widths(width))
    assert widest[True, "add"] > widest[False, "add"]
    clipped = widest[False, "compare"]
    assert clipped <= widest[True, "compare"] <= clipped + 1  # where a half is added it can carry


def test_fewer_bits_are_counted_and_packed():
    ledgers = {n: integer_only_ledger(made(bits=n, **ALL_ADD)[1]) for n in (4, 8)}
    for n, ledger in ledgers.items():
        (fc1,) = (e for e in ledger.entries if e.kind == ADDER and e.path.endswith("/mlp/fc1"))
        assert fc1.operations["add", width_name(n + 1)] == fc1.operations["absolute", width_name(n + 1)]
        assert fc1.elements == fc1.operations[("add", fc1.sums)] == 16 * 16 * 24
    # Narrow sums leave a row of some normalizations so small that nothing is shifted.
    for name in ("multiply", "divide", "square_root"):
        assert ledgers[4].operations[name] == ledgers[8].operations[name]
    assert ledgers[4].bytes_read < ledgers[8].bytes_read
    for convention in ("paper", "full"):
        prices = [energy(ledgers[n], convention, "integer_only") for n in (4, 8)]
        assert prices[0].total < prices[1].total


def test_widths_are_priced_between_the_published_ones():
    for technology, (narrow, wide, times8, times32) in {
        "": (0.03, 0.1, 0.2, 3.1),
        "_7nm": (0.007, 0.03, 0.07, 1.48),
    }.items():
        table = TABLES[f"integer_only{technology}"]
        formats = {n: table.number_format(width_name(n), ADDER) for n in (2, 5, 8, 15, 20, 32)}
        assert [formats[n].add for n in (8, 20, 32)] == pytest.approx([narrow, (narrow + wide) / 2, wide])
        assert formats[20].sign == formats[20].add and 0 < formats[2].add < narrow
        products = [table.number_format(width_name(*each), PRODUCT).multiply for each in ((8, 8), (32, 32))]
        assert products == pytest.approx([times8, times32])
        # Both factors count: the geometric mean of the ends has the geometric mean of the products.
        for factors in ((16, 16), (8, 32), (32, 8)):
            between = table.number_format(width_name(*factors), PRODUCT).multiply
            assert between == pytest.approx((times8 * times32) ** 0.5)
        fifth, eighth = formats[5], formats[8]
        assert fifth.add == pytest.approx(5 / 8 * eighth.add) and fifth.bytes == 5 / 8
    whole = made()
    with pytest.raises(ValueError, match="'integer_only' prices operations by the bits .* such as 'fp32'"):
        energy(inference_ledger(whole[0].model.config), "paper", "integer_only")
    with pytest.raises(ValueError, match="'int8' prices operations by dtypes, .* such as 'integer_only'"):
        energy(integer_only_ledger(whole[1]), "paper", "int8")
    # A table of one's own does so too.
    own = dataclasses.replace(TABLES["integer_only"], name="ours")
    priced = energy(integer_only_ledger(whole[1]), "paper", own)
    assert priced == energy(integer_only_ledger(whole[1]), "paper", "integer_only")


def test_energy_by_hand():
    _, whole, _ = made()
    ledger = integer_only_ledger(whole)
    (entry,) = (e for e in ledger.entries if e.path.endswith("/mlp/fc1") and e.kind == ADDER)
    accumulator = whole.described["layers"]["block_0/mlp/fc1"]["accumulator_bits"]
    term = 0.03 + 0.07 / 24 + 0.03 + 0.07 * (accumulator - 8) / 24  # a difference has a bit more
    parts = {p.name: p for p in compare(ledger, ledger, TABLES["integer_only"], "none").parts}
    other = whole.described["layers"]["block_0/mlp/fc2"]["accumulator_bits"]
    terms = entry.elements * (2 * term + 0.07 * (other - accumulator) / 24)
    assert parts["fc1, fc2"].model["paper"].total == pytest.approx(1e-9 * terms)
    magnitudes = 2 * entry.elements * (0.03 + 0.07 / 24)
    of_sums = parts["fc1, fc2"].model["full"].operations["adder"]
    assert of_sums == pytest.approx(1e-9 * (terms + magnitudes))


def test_steps_by_hand():
    """16 tokens of 16 features in 2 heads, from the page."""
    _, whole, _ = made()
    found = {}
    for entry in integer_only_ledger(whole).entries:
        found.setdefault((layer_name(entry.path), entry.operator), entry)

    def of(name, operator):
        entry = found[name, operator]
        operations = {f"{key[0]} {key[1].removeprefix('bits')}": n for key, n in entry.operations.items()}
        return operations, {w: n for w, n in entry.read.items()}, {w: n for w, n in entry.written.items()}

    norm = whole.described["norms"]["block_0/attention_norm"]
    gain, offset = (whole.arrays[f"block_0/attention_norm/{part}"] for part in ("gain", "offset"))
    # What is scaled, at most gain + 2 units, and its half have 32 bits; with the offset nothing reaches 2^15.
    assert norm["shift"] == 16 and 2**14 < gain.max() < 2**15 - int(np.abs(offset).max()) - 2
    operations, read, written = of("block_0/attention_norm", "norm")
    assert (read, written) == ({"bits16": 16 * 16 + 2 * 16}, {"bits16": 256})
    assert operations == {
        "add 20": 16 * 15,  # the sum of 16 numbers of 16 bits
        "add 21": 2 * 256,
        "absolute 21": 256,
        "compare 20": 16 * 15,
        "shift 20": 16,  # bits of the largest
        "shift 21": 256,
        f"shift {norm['epsilon'].bit_length()}": 16,
        "multiply 17x17": 2 * 256,
        "add 35": 256,  # at most 16 times 2^30, and epsilon
        "compare 35": 16,
        "shift 35": 2 * 16,
        "square_root 32": 16,
        "divide 32": 16,
        "add 33": 256,  # 2^15 times 2^16, and a half
        "shift 33": 256,
        "multiply 18x16": 256,
        "add 32": 256,
        "add 16": 256,
    }
    name, scores = "block_0/attention", 2 * 16 * 16
    entry = whole.described["attentions"][name]
    assert entry["shift"] > 0 and entry["accumulator_bits"] == 12
    operations, read, written = of(name, "exponentials")
    # Scores of 8 features are 0 to -8 times 255.
    assert entry["shift"] == 12 and entry["multiplier"] * 2040 < 2**26 and 2**5 <= 2**25 / 2**12 / 2**8
    assert operations == {
        "compare 12": 32 * 15,
        "add 11": scores,
        "multiply 11x15": scores,
        "add 26": scores,
        "compare 6": scores,
        "shift 16": scores,
    }
    assert (read, written) == ({"bits12": scores, "bits16": scores}, {"bits16": scores})
    operations, read, written = of(name, "share")
    assert operations == {"add 20": 32 * 15, "shift 20": 32, "divide 36": 32}
    assert (read, written) == ({"bits16": scores}, {"bits17": 32})
    operations, read, written = of(name, "heads")
    assert operations == {
        "add 27": 256,
        "shift 27": 256,
        "multiply 16x17": 256,
        "add 32": 256,
        "add 18": 256,
    }
    assert (read, written) == ({"bits27": 256, "bits17": 32, "bits8": 256}, {"bits18": 256})
    assert of("block_0", "add") == ({"add 17": 256, "compare 17": 512}, {"bits16": 512}, {"bits16": 256})
    assert of("VisionTransformer", "mean") == ({"add 20": 256}, {"bits16": 256}, {"bits16": 16})
    assert of("block_0/mlp", "lookup") == ({}, {"bits11": 16 * 24, "bits8": 16 * 24}, {"bits8": 16 * 24})
    sums = whole.described["layers"]["block_0/mlp/fc1"]["accumulator_bits"]
    operations, read, written = of("block_0/mlp/fc1", "sums")
    terms = 16 * 16 * 24
    assert operations == {"add 9": terms, "absolute 9": terms, f"add {sums}": terms}
    assert read == {"bits8": 16 * 16 + 16 * 24, "bits32": 24} and written == {f"bits{sums}": 16 * 24}


def test_an_export_of_an_earlier_version_is_told():
    _, whole, _ = made()
    del whole.described["layers"]["head"]["accumulator_bits"]
    with pytest.raises(ValueError, match="bits of accumulators are not told, .* Export the run again"):
        integer_only_ledger(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "name", "bits"),
    [
        ("cifar10_adder_vit", "cifar10_int8", 8),
        ("cifar10_adder_vit", "cifar10_int4", 4),
        ("cifar10_twin", "twin_int8", 8),
    ],
)
def test_the_operations_on_the_page_are_those_of_the_weights(weights, name, bits):
    """Other pixels choose other units, which changes bits, and what is rounded and clipped."""
    lines = map(json.loads, (ROOT / "results" / "integers_energy.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["model"].startswith(f"runs/{name}:")]
    model, variables, info, _ = load_step(ROOT / "weights" / weights)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    integers = quantize(model, variables, normalize_batch(pixels, info), bits=bits)
    operations = integer_only_ledger(integer_only_model(integers, pixels, info)).operations
    kept = {name: operations[name] for name in ("multiply", "absolute", "shift", "divide", "square_root")}
    assert len(lines) == 2 and all(kept.items() <= line.items() for line in lines)


def test_the_command(tmp_path, capsys):
    integers, whole, pixels = made()
    twin = made(**TWIN | {"centered": False})
    for name, fields in {"run": SMALL, "part": SMALL, "whole": SMALL, "twin": SMALL | TWIN}.items():
        config = default_config()
        config.update_from_flattened_dict({f"model.{field}": value for field, value in fields.items()})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json())
        (tmp_path / name / "dataset.json").write_text(json.dumps(dataclasses.asdict(INFO)))
    for name, (its_integers, its_whole, _) in {
        "part": (integers, whole, pixels),
        "whole": (integers, whole, pixels),
        "twin": twin,
    }.items():
        write_integers(tmp_path / name, its_integers, pixels[:1], INFO)
        if name != "part":
            write_integer_only(tmp_path / name, its_whole, pixels[:1])

    def printed(*arguments):
        command.main([str(tmp_path / "whole"), *arguments])
        return capsys.readouterr().out

    found = json.loads(printed("--table=integer_only", "--json"))
    assert found["table"] == "integer_only" and 1 < found["ratio"] < 5
    counts = found["counts"]["model"]
    assert counts["operations_by_dtype"]["add bits9"] == counts["adder_terms"] > 0
    assert found["twin"] is None
    beside = json.loads(printed("--table=integer_only", "--json", f"--twin={tmp_path / 'twin'}"))
    own = integer_only_ledger(twin[1])
    assert beside["twin"] == str(tmp_path / "twin") and beside["total"] == found["total"]
    assert beside["twin_total"] == pytest.approx(energy(own, "paper", "integer_only").total)
    assert beside["twin_total"] < found["twin_total"]  # its accumulators hold its own weights
    text = printed("--table=integer_only", f"--twin={tmp_path / 'twin'}")
    assert f"twin: {tmp_path / 'twin'}" in text and "any weights" not in text
    assert f"an image, twin {1e3 * beside['twin_total']:.4g} uJ, ratio {beside['ratio']:.2f}" in text
    # So does any other table, here with the twin that is derived.
    float32 = json.loads(printed("--table=fp32", "--json", f"--twin={tmp_path / 'twin'}"))
    assert float32["twin_total"] == json.loads(printed("--table=fp32", "--json"))["twin_total"]
    text = printed("--table=integer_only_7nm")
    (line,) = (line for line in text.splitlines() if line.startswith("multiply, 8 x 8 "))
    products = found["counts"]["twin"]["operations_by_dtype"]["multiply bits8x8"]
    assert line.split()[-1] == f"{products / 1e6:.3f}"
    # What is too little for a row, and all that is not, is there.
    rows = [line.rsplit(maxsplit=2) for line in text.partition("by bits")[2].splitlines()[1:]]
    rows = [row[1:] for row in rows[: rows.index([])]]
    for column, name in enumerate(("model", "twin")):
        listed = sum(float(row[column].replace(",", "")) for row in rows)
        everything = sum(found["counts"][name]["operations"].values())
        assert listed == pytest.approx(everything / 1e6, abs=0.0006 * len(rows))
    assert rows[-1][0] != "0.000" and text.count("\nothers ") == 1
    assert "7 nm; what python -m adderflax.export --integer_only writes" in text
    # Of the other form of the same export it counts as before.
    assert json.loads(printed("--json"))["table"] == "exported" and "by bits" not in printed()
    for arguments, message in {
        (
            str(tmp_path / "run"),
        ): "prices a model without floats, and .*run is none. Write one by .* --integer",
        ("--config", "configs/digits_adder_vit.py"): "prices a model without floats, and configs/digits_",
        (str(tmp_path / "part"),): "cannot be read as a model without floats: .* with --integer_only",
        (
            "--config",
            "configs/cifar10_adder_resnet20.py",
        ): "only a .* has, and .*resnet20.py is of AdderResNet",
        (str(tmp_path / "whole"), f"--twin={tmp_path / 'part'}"): "part cannot be read as a model without",
        (str(tmp_path / "whole"), f"--twin={tmp_path / 'run'}"): "without floats, and .*run is none",
        (str(tmp_path / "whole"), "--twin=weights/cifar10_twin"): "takes images 8x8x1 and 10 .* 32x32x3 and",
    }.items():
        with pytest.raises(SystemExit, match=message):
            command.main([*arguments, "--table=integer_only"])
