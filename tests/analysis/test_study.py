"""The study tool: what is finished stays, what was killed goes on, what changed is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from adderflax import VisionTransformerConfig
from adderflax import study as command
from adderflax.analysis import study as study_lib
from adderflax.analysis.study import Results, StudyError, load_study, read_lines
from adderflax.training.steplog import DivergenceError

ROOT = Path(__file__).parent.parent.parent
DESCRIPTION = '''
"""Two small runs.

What they show: nothing.
"""

from adderflax.analysis.study import Comparison, Run

SMALL = {
    "batch_size": 32,
    "total_steps": STEPS,
    "eval_every": 100000,
    "checkpoint_every": 100,
    # Less to compile.
    "ema_decay": 0.0,
    "augment.mixup_alpha": 0.0,
    "optimizer.name": "sgd",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.implementation": "reference",
}


def runs():
    config = "configs/digits_adder_vit.py"
    return [
        Run(name="l1", config=config, overrides=SMALL, seeds=(0, 1)),
        Run(name="dot", config=config + ":multiply", seeds=(0,),
            overrides=SMALL | {"model.identity": False}),
    ]


def comparisons():
    return [Comparison("L1 instead of dot", "l1", "dot")]
'''


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def describe(directory, steps=2, change=("", "")):
    file = directory / "small.py"
    file.write_text(DESCRIPTION.replace("STEPS", str(steps)).replace(*change))
    return file


def arguments(directory, *more):
    workdir, results = f"--workdir={directory / 'runs'}", f"--results={directory / 'small.jsonl'}"
    return [str(directory / "small.py"), workdir, results, "--images=3", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with the study of `DESCRIPTION` run to its end."""
    directory = tmp_path_factory.mktemp("study")
    describe(directory)
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        command.main(arguments(directory))
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    """Description and lines of `finished`, without its runs."""
    describe(tmp_path)
    (tmp_path / "small.jsonl").write_bytes((finished / "small.jsonl").read_bytes())
    return tmp_path


def forbid_training(monkeypatch):
    def train(*_, **__):
        raise AssertionError("nothing was left to train")

    monkeypatch.setattr(study_lib.trainer, "train", train)


def test_lines_of_a_finished_study(finished):
    lines = read_lines(finished / "small.jsonl")
    # The first seed of all runs before the second one of any.
    assert [(line["name"], line["seed"]) for line in lines] == [("l1", 0), ("dot", 0), ("l1", 1)]
    for line in lines:
        directory = finished / "runs" / "small" / f"{line['name']}-seed{line['seed']}"
        summary = json.loads((directory / "summary.json").read_text())
        assert line["figures"]["test_accuracy"] == pytest.approx(summary["test_accuracy"], rel=1e-5)
        assert line["figures"]["steps"] == 2 and line["figures"]["seconds"] > 0
        assert 0 <= line["figures"]["validation_accuracy"] <= 1 and line["figures"]["train_loss"] > 0
        assert line["config"]["seed"] == line["seed"] == summary["config"]["seed"]
        assert line["overrides"]["model.depth"] == line["config"]["model.depth"] == 1
        assert line["resumed"] is False and line["jax"] == jax.__version__ and line["machine"]
        assert line["diversity"]["identity"] == (line["name"] == "l1")
        assert line["diversity"]["images"] == 3 and line["diversity"]["tokens"] == 5
        assert not (directory / "checkpoints").exists()
    ours, twin = lines[0]["energy_mJ"], lines[1]["energy_mJ"]
    assert ours["paper"] < twin["paper"] and ours["full"] > ours["paper"]
    assert lines[0]["figures"]["test_loss"] != lines[2]["figures"]["test_loss"]


def test_what_cannot_be_measured_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(study_lib.trainer, "train", lambda *_, **__: pytest.fail("a run was trained"))
    study = load_study("studies/rank_digits.py")
    with pytest.raises(StudyError, match="images=0 must be at least 1"):
        study_lib.run_study(study, tmp_path, tmp_path / "lines.jsonl", images=0)
    assert not list(tmp_path.iterdir())


def test_a_finished_study_is_left_alone(copied, monkeypatch):
    forbid_training(monkeypatch)
    before = (copied / "small.jsonl").read_bytes()
    command.main(arguments(copied))
    assert (copied / "small.jsonl").read_bytes() == before


def test_the_page(copied, capsys):
    lines = read_lines(copied / "small.jsonl")
    command.main(arguments(copied, "--report"))
    page = (copied / "small.md").read_text()
    assert str(copied / "small.md") in capsys.readouterr().out
    assert page.startswith("# Two small runs\n\nWhat they show: nothing.\n\n3 of 3 runs")
    rows = {}
    for row in (line.split(" | ") for line in page.splitlines() if line.startswith("| ")):
        rows.setdefault(row[0].strip("| "), []).append(row)
    accuracy = [100 * line["figures"]["test_accuracy"] for line in lines]
    pair = [accuracy[0], accuracy[2]]
    accuracies, ranks = rows["l1"]
    assert accuracies[1] == "2 of 2"
    assert accuracies[2] == f"{np.mean(pair):.1f} ± {np.std(pair, ddof=1):.1f}"
    assert accuracies[6] == f"{1000 * lines[0]['energy_mJ']['paper']:.4g}"
    assert ranks[1] == "yes" and rows["dot"][1][1] == "no"
    rank = lines[1]["diversity"]["layers"][0]["softmax"]["effective_rank"]
    assert rows["dot"][1][3] == f"{rank:.2f}"
    (difference,) = rows["L1 instead of dot"]
    assert difference[1:4] == ["l1 - dot", "1", f"{accuracy[0] - accuracy[1]:+.1f}"]
    # The map in use is softmax + I in one and softmax alone in the other.
    used = [
        lines[0]["diversity"]["layers"][0]["softmax_plus_identity"]["effective_rank"],
        lines[1]["diversity"]["layers"][0]["softmax"]["effective_rank"],
    ]
    assert difference[5] == f"{used[0] - used[1]:+.2f}"
    for name in ("overview", "ranks", "spectra"):
        assert f"(small_{name}.png)" in page
        with Image.open(copied / f"small_{name}.png") as picture:
            assert 0.01 < np.mean(np.asarray(picture.convert("L")) < 250) < 0.95


def test_the_page_of_an_unfinished_study(copied, tmp_path):
    lines = (copied / "small.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text(lines[0])
    command.main(arguments(tmp_path, "--report"))
    page = (tmp_path / "small.md").read_text()
    assert "1 of 3 runs" in page and "(2 runs)" in page
    assert "| l1 | 1 of 2 |" in page and "| dot | 0 of 1 | - |" in page
    (tmp_path / "small.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no finished run of small yet"):
        command.main(arguments(tmp_path, "--report"))


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt: nothing may swallow it."""


def test_killed_before_the_line_is_written(finished, copied, monkeypatch, capsys):
    """The run is finished and its line is not there: it is measured again, not trained again."""
    lines = (copied / "small.jsonl").read_text().splitlines(keepends=True)
    (copied / "small.jsonl").write_text("".join(lines[:2]))
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killing(self, line):
            raise Killed

        patch.setattr(Results, "append", killing)
        command.main(arguments(copied))
    assert len(read_lines(copied / "small.jsonl")) == 2
    capsys.readouterr()
    command.main(arguments(copied, "--keep_checkpoints"))
    assert "Finished at step 2, nothing left to do" in capsys.readouterr().out
    again, before = read_lines(copied / "small.jsonl")[2], json.loads(lines[2])
    assert (copied / "runs" / "small" / "l1-seed1" / "checkpoints").exists()
    assert again["resumed"] is True
    for same in ("name", "seed", "config", "diversity", "energy_mJ"):
        assert again[same] == before[same]
    assert again["figures"]["test_loss"] == before["figures"]["test_loss"]


def test_a_run_whose_line_is_gone_is_trained_anew(finished, copied, capsys):
    """Its checkpoints went when its line was written."""
    shutil.copytree(finished / "runs", copied / "runs")
    lines = (copied / "small.jsonl").read_text().splitlines(keepends=True)
    (copied / "small.jsonl").write_text("".join(lines[:2]))
    command.main(arguments(copied))
    again, before = read_lines(copied / "small.jsonl")[2], json.loads(lines[2])
    assert "has no checkpoints any more: trained anew" in capsys.readouterr().out
    assert (again["name"], again["seed"]) == (before["name"], before["seed"]) and not again["resumed"]
    assert again["figures"]["test_loss"] == before["figures"]["test_loss"]


def test_killed_while_training(tmp_path):
    """A real SIGKILL; the same command resumes the run."""
    file = describe(tmp_path, steps=400, change=("seeds=(0, 1)", "seeds=(0,)"))
    text = file.read_text().partition("def comparisons")[0].replace("def runs", "def both")
    file.write_text(text + "def runs():\n    return both()[:1]\n")
    line = [sys.executable, "-m", "adderflax.study", *arguments(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs" / "small" / "l1-seed0" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_lines(tmp_path / "small.jsonl") == []
    # A kill in the middle of a write leaves a piece of a line.
    (tmp_path / "small.jsonl").write_text('{"name": "l1", "se')

    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Resumed from step " in done.stdout
    (found,) = read_lines(tmp_path / "small.jsonl")
    assert found["resumed"] is True and found["figures"]["steps"] == 400
    # The last process's time is not that of the run.
    assert (tmp_path / "small.md").read_text().count("| - |\n") == 1


def test_the_results_file_after_a_kill(tmp_path):
    file = tmp_path / "new" / "lines.jsonl"
    first, second = ({"name": "a", "seed": seed} for seed in (0, 1))
    with Results(file) as results:
        results.append(first)
        with pytest.raises(StudyError, match="Another process is at work"):
            Results(file)
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut])
        if cut < len(whole) - 1:
            assert read_lines(file) == [first]
            with Results(file) as results:
                results.append(second)
            assert read_lines(file) == [first, second]
    # Only the line break is missing: the line is there.
    file.write_bytes(whole[:-1])
    with Results(file) as results:
        results.append(second)
    assert read_lines(file) == [first, second]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a", "seed": 0}\n{"name": \n{"name": "a", "seed": 1}\n', "Line 2 of .* is not"),
        ('{"name": "a", "seed": 0}\n{"name": "a"}\n', "Line 2 of .*'seed'"),
        ('{"name": "a", "seed": 0}\n' * 2, "Lines 1 and 2 of .* are both of run 'a', seed 0"),
    ],
)
def test_a_damaged_results_file(tmp_path, content, message):
    (tmp_path / "lines.jsonl").write_text(content)
    with pytest.raises(StudyError, match=message):
        read_lines(tmp_path / "lines.jsonl")


def test_a_changed_description_is_refused(copied, monkeypatch):
    forbid_training(monkeypatch)
    describe(copied, change=('"model.num_heads": 2', '"model.num_heads": 4'))
    message = r"line of run 'l1', seed 0, .*model.num_heads \(2 there, 4 now\).*another name"
    for flags in ([], ["--report"]):
        with pytest.raises(SystemExit, match=message):
            command.main(arguments(copied, *flags))
    # How a machine computes is no change.
    describe(copied, change=('"model.implementation": "reference",', ""))
    command.main(arguments(copied, "--data_dir=/elsewhere"))


def test_fields_younger_than_a_line(copied, monkeypatch):
    """A field that a line does not know had its default when the line was written."""
    forbid_training(monkeypatch)
    lines = read_lines(copied / "small.jsonl")
    for line in lines:
        del line["config"]["optimizer.nesterov"]
    (copied / "small.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command.main(arguments(copied, "--report"))
    describe(copied, change=('"batch_size": 32', '"batch_size": 32, "optimizer.nesterov": True'))
    with pytest.raises(SystemExit, match=r"nesterov \(False there, True now\)"):
        command.main(arguments(copied, "--report"))


def test_a_run_that_diverges_is_a_line(copied, monkeypatch):
    lines = (copied / "small.jsonl").read_text().splitlines(keepends=True)
    (copied / "small.jsonl").write_text("".join(lines[:2]))

    def train(*_, **__):
        raise DivergenceError("Update 2 is not finite.")

    monkeypatch.setattr(study_lib.trainer, "train", train)
    command.main(arguments(copied))
    line = read_lines(copied / "small.jsonl")[2]
    assert line["diverged"] == "Update 2 is not finite." and "figures" not in line
    assert "| l1 | 2 of 2, 1 diverged |" in (copied / "small.md").read_text()
    forbid_training(monkeypatch)
    command.main(arguments(copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name="dot"', 'name="l1"'), "must name at least one run, and each once"),
        (('name="dot"', 'name="../dot"'), "run name '../dot' must begin with"),
        (("seeds=(0, 1)", "seeds=(0, 0)"), "different whole numbers"),
        (("def runs", "def rows"), "no function runs"),
        (("def runs", "def def runs"), "is not Python: invalid syntax.* such as those in studies/"),
        (('"l1", "dot")', '"l1", "dotty")'), "names the run 'dotty', which is none of l1, dot"),
        (("digits_adder_vit.py", "none.py"), "'l1' cannot be configured .*no configuration file .*none.py"),
        (
            ('"model.depth": 1', '"model.deep": 1'),
            "'l1' cannot be configured .*: Unknown model field deep; the ",
        ),
        (('"model.depth": 1', '"modle.depth": 1'), "'l1' cannot be configured .*modle"),
        (('"model.depth": 1', '"model.depth": "x"'), "'l1' cannot be configured .*depth"),
        (('"model.depth": 1', '"model.linear": "x"'), "'l1' cannot be configured .*linear='x'"),
    ],
)
def test_bad_descriptions(tmp_path, change, message):
    describe(tmp_path, change=change)
    with pytest.raises(SystemExit, match=message):
        command.main(arguments(tmp_path))


def test_no_description():
    with pytest.raises(SystemExit, match="no study description studies/none.py"):
        command.main(["studies/none.py"])


@pytest.mark.parametrize(("name", "head_width"), [("rank_digits", 16), ("rank_cifar10", 64)])
def test_the_decisive_experiment(name, head_width):
    study = load_study(f"studies/{name}.py")
    configs = {run.name: run.configuration(0) for run in study.runs}
    assert all(run.seeds == (0, 1, 2) for run in study.runs) and len(configs) == 12
    cells, rest = set(), []
    for config in configs.values():
        model, whole = dict(config.model), config.to_dict()
        factors = tuple(model.pop(key) for key in ("similarity", "identity", "linear"))
        assert model.pop("output_projection") == factors[2]
        scale = model.pop("attention_scale")
        cells.add((*factors, scale and round(scale * head_width**0.5, 4)))
        # All else is equal, and is the preset: no biases, a normalization behind every layer.
        neighbors = {"mlp_kernel_size", "mlp_convolution"}  # of the CIFAR-10 recipe, alike in every cell
        chosen = {key for key, value in model.items() if value is not None}
        assert chosen <= {"variant", "arithmetic", "dtype", "drop_path_rate"} | neighbors
        assert model["arithmetic"] == "adder"
        rest.append({**whole, "model": model})
        described = VisionTransformerConfig.from_variant(config.model.variant)
        assert described.embed_dim // described.num_heads == head_width
    expected = {
        (similarity, identity, linear, None)
        for similarity in ("dot", "l1")
        for identity in (False, True)
        for linear in ("multiply", "adder")
    }
    hot = round(1 / (2 * (1 - 2 / np.pi)) ** 0.5 / 0.8809, 4)
    expected |= {("dot", identity, "adder", 0.8809) for identity in (False, True)}
    expected |= {("l1", identity, "adder", hot) for identity in (False, True)}
    assert cells == expected and all(other == rest[0] for other in rest)
    assert len(study.comparisons) == 16


def test_the_study_of_depth():
    study = load_study("studies/rank_depth.py")
    cells, rest = set(), []
    for run in study.runs:
        config = run.configuration(0)
        model, whole = dict(config.model), config.to_dict()
        depth, identity, centered = (model.pop(key) for key in ("depth", "identity", "centered"))
        cells.add(run.name)
        preset = model.pop("arithmetic")
        assert preset == "adder" or not centered
        name = "centered" if centered else preset
        assert run.name == f"{depth}-{name}-{'I' if identity else 'none'}"
        rest.append({**whole, "model": model})
    assert len(cells) == 12 and all(other == rest[0] for other in rest)
    assert len(study.comparisons) == 12


def test_the_temperature_control():
    """Within a row the similarities of l1 and dotcool, and of l1hot and dot, vary alike."""
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 400, 16))
    l1 = -np.abs(query[:, None] - key).sum(axis=-1)
    dot = query @ key.T
    scales = {"l1": 1 / np.sqrt(32 * (1 - 2 / np.pi)), "dot": 1 / 4}
    study = load_study("studies/rank_digits.py")
    for name in ("dotcool", "l1hot"):
        config = {run.name: run for run in study.runs}[f"{name}-I-adder"].configuration(0)
        scales[name] = config.model.attention_scale
    spread = {
        name: np.sqrt(np.mean(np.var(scale * (l1 if name.startswith("l1") else dot), axis=1)))
        for name, scale in scales.items()
    }
    np.testing.assert_allclose(spread["dotcool"], spread["l1"], rtol=0.03)
    np.testing.assert_allclose(spread["l1hot"], spread["dot"], rtol=0.03)
    assert abs(spread["l1"] - 0.88) < 0.02 and abs(spread["dot"] - 1) < 0.03


def test_the_least_description(tmp_path):
    run = 'Run(name="a", config="configs/digits_adder_vit.py")'
    file = tmp_path / "plain.py"
    file.write_text(f"from adderflax.analysis.study import Run\nruns = lambda: [{run}]\n")
    study = load_study(file)
    assert (study.name, study.title, study.text, study.comparisons) == ("plain", "plain", "", ())
