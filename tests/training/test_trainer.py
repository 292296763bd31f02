"""The loop: it learns, resumes bit for bit, evaluates every image once."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from adderflax.operators.rules import canonical_rule
from adderflax.training import sharding, trainer, update
from adderflax.training import state as state_lib
from adderflax.training.config import ConfigError, RunConfig, default_config
from adderflax.training.manifest import write_manifest
from adderflax.training.metrics import read_metrics
from adderflax.training.optimizer import OptimizerConfig, make_optimizer
from adderflax.training.restore import load_model, write_weights
from adderflax.training.trainer import Trainer, evaluate, train
from adderflax.training.workdir import WorkdirError


def small_config(**fields):
    """A run on the real digits that takes seconds: one block of width 16 on 4-pixel patches."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 32,
            "total_steps": 6,
            "eval_every": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "ema_decay": 0.9,
            "model.patch_size": 4,
            "model.embed_dim": 16,
            "model.num_heads": 2,
            "model.depth": 1,
            # Compiles in a third of the time; what is about the operators asks for the default.
            "model.implementation": "reference",
            "augment.crop_padding": 1,
        }
        | fields
    )
    return config


def lines(workdir):
    """The log without what differs between runs: the speed."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(workdir)]


def leaves(workdir, config):
    _, variables, _ = load_model(workdir)
    return jax.tree.leaves(variables)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of `small_config`."""
    workdir = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        return workdir, train(small_config(), workdir, progress=False)


def test_summary_and_log(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["steps"] == 6 and summary["test_examples"] == 359
    assert summary["images_per_second"] > 0 and summary["seconds"] > 0
    assert summary["config"]["model"]["arithmetic"] == "adder"
    _, variables, _ = load_model(workdir)
    assert summary["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))
    log = lines(workdir)
    assert [line["step"] for line in log if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
    evaluations = [line for line in log if "validation_accuracy" in line]
    assert [line["step"] for line in evaluations] == [4, 6]
    rates = [line["learning_rate"] for line in log if "train_loss" in line]
    schedule = make_optimizer(OptimizerConfig(), 6)[1]
    np.testing.assert_allclose(rates, [schedule(step) for step in range(6)], rtol=1e-6)
    assert all(line["validation_examples"] == 144 and line["validation_loss"] > 0 for line in evaluations)
    assert list((workdir / "tensorboard").iterdir())


def test_a_file_of_weights_stands_for_the_checkpoints(finished, tmp_path):
    workdir, summary = finished
    for name in ("config.json", "dataset.json"):
        shutil.copy(workdir / name, tmp_path)
    with pytest.raises(ValueError, match=r"weights.txt must end in \.npz"):
        write_weights(workdir, tmp_path / "weights.txt")
    write_weights(workdir, tmp_path / "weights.npz")
    (_, variables, info), (model, small, small_info) = load_model(workdir), load_model(tmp_path)
    assert model.config.depth == 1 and small_info == info
    # float16 has 11 bits.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7), variables, small)
    size = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert (tmp_path / "weights.npz").stat().st_size < 3 * size + 20_000
    assert evaluate(tmp_path)["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-2)
    with pytest.raises(WorkdirError, match="weights.npz, which a run there would hide. Choose another"):
        train(small_config(), tmp_path, progress=False)
    (tmp_path / "weights.npz").write_bytes((tmp_path / "weights.npz").read_bytes()[:500])
    with pytest.raises(WorkdirError, match="weights.npz cannot be read"):
        load_model(tmp_path)
    np.savez(tmp_path / "weights.npz", **{"params/class_token": np.zeros((1, 1, 16)), "power": np.float32(1)})
    with pytest.raises(WorkdirError, match="does not belong.*params/block_0/.* differ"):
        load_model(tmp_path)


def test_a_run_of_another_kind_of_machine_is_evaluated(finished, tmp_path):
    workdir, summary = finished
    shutil.copytree(workdir, tmp_path / "there")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["implementation"], config["mesh"]["tensor"] = "tpu", 64
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "there")[0].config.implementation is None
    assert evaluate(tmp_path / "there")["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_it_learns(tmp_path):
    fields = {"optimizer.learning_rate": 0.01, "model.embed_dim": 32, "augment.crop_padding": 0}
    steps = {"model.implementation": None, "total_steps": 150, "eval_every": 150, "checkpoint_every": 150}
    summary = train(small_config(**fields, **steps), tmp_path, progress=False)
    losses = [line["train_loss"] for line in read_metrics(tmp_path) if "train_loss" in line]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    assert summary["test_accuracy"] > 0.8


def watch_updates(patch, before=lambda state, batch: None, after=lambda state, metrics: (state, metrics)):
    """Calls `before` and `after` around every update of the trainers built while patched."""
    make_train_step = update.make_train_step

    def watched(*arguments, **keywords):
        step = make_train_step(*arguments, **keywords)

        def run(state, batch):
            before(state, batch)
            return after(*step(state, batch))

        return run

    patch.setattr(update, "make_train_step", watched)


def test_stochastic_depth_and_augmentation_change_from_step_to_step():
    fields = {"model.drop_path_rate": 0.9, "model.depth": 2, "augment.crop_padding": 0, "ema_decay": 0.0}
    run = Trainer(small_config(**fields, **{"optimizer.learning_rate": 0.0}))
    batch = sharding.put_batch(next(run.train_batches()), run.mesh)
    state, losses = run.new_state(), []
    for _ in range(4):
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) > 1  # the same parameters and batch, other dropped branches

    seen = []

    def augment(key, images, labels):
        jax.debug.callback(lambda bits: seen.append(int(bits)), jax.random.bits(key))
        return images.astype(jnp.float32) / 255, jax.nn.one_hot(labels, 10)

    rate = optax.constant_schedule(0.0)
    step = update.make_train_step(run.model, run.optimizer, augment, schedule=rate, mesh=run.mesh)
    state = run.new_state()
    for _ in range(3):
        state, _ = step(state, batch)
    jax.effects_barrier()
    assert len(set(seen)) == 3


def test_top5_counts_the_five_largest():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, images):
            return images[:, :, 0, 0]  # the image is the logits

    logits = np.tile(np.arange(12.0)[None, :, None, None], (4, 1, 1, 1))
    batch = {
        "image": logits,
        "label": np.array([11, 7, 6, 0], np.int32),  # ranks 0, 4, 5, 11
        "weight": np.ones(4, np.float32),
    }
    step = trainer.make_eval_step(Fixed(), lambda images: images, mesh=sharding.make_mesh())
    sums = step({}, sharding.put_batch(batch, sharding.make_mesh()))
    assert (sums["correct"], sums["correct_top5"], sums["examples"]) == (1, 2, 4)


def test_other_ways_to_run(tmp_path):
    """bfloat16, SGD with the local rate, everything augmented, no validation part; resumed once."""
    fields = {
        "model.dtype": "bfloat16",
        "optimizer.name": "sgd",
        "optimizer.adder_local_rate": 0.2,
        "optimizer.learning_rate": 0.01,
        "augment.randaugment_layers": 1,
        "augment.mixup_alpha": 0.8,
        "augment.cutmix_alpha": 1.0,
        "augment.erasing_probability": 0.25,
        "augment.label_smoothing": 0.1,
        "data.validation_fraction": 0.0,
        "ema_decay": 0.0,
    }
    train(small_config(total_steps=2, **fields), tmp_path, progress=False)
    summary = train(small_config(total_steps=4, **fields), tmp_path, extend=True, progress=False)
    assert summary["steps"] == 4 and summary["test_examples"] == 359 and summary["best_step"] is None
    assert not any("validation_loss" in line for line in read_metrics(tmp_path))


class Killed(BaseException):
    """Not an Exception, like KeyboardInterrupt: nothing in the loop may swallow it."""


@pytest.mark.parametrize("at", [2, 4, 6])
def test_resume_is_bit_equal(finished, tmp_path, monkeypatch, capsys, at):
    """Killed before computing update `at`, then run again: the same bits as the undisturbed run."""

    def killing(state, batch):
        if int(state.step) + 1 == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        watch_updates(patch, before=killing)
        train(small_config(), tmp_path, progress=False)
    resumed = train(small_config(), tmp_path, progress=False)

    saved = (at - 1) // 2 * 2
    assert (f"Resumed from step {saved}" in capsys.readouterr().out) == (saved > 0)
    undisturbed, summary = finished
    for ours, theirs in zip(leaves(tmp_path, small_config()), leaves(undisturbed, small_config())):
        np.testing.assert_array_equal(ours, theirs)
    assert lines(tmp_path) == lines(undisturbed)
    assert resumed["test_loss"] == summary["test_loss"]


def test_a_finished_run_is_not_run_again(finished, capsys):
    workdir, summary = finished
    assert train(small_config(), workdir, progress=False) == json.loads(json.dumps(summary))
    assert "Finished at step 6" in capsys.readouterr().out


def test_a_finished_run_gets_back_a_description_that_is_lost(finished, capsys):
    workdir, summary = finished
    before = (workdir / "dataset.json").read_text()
    (workdir / "dataset.json").unlink()
    assert train(small_config(), workdir, progress=False)["test_loss"] == summary["test_loss"]
    assert (workdir / "dataset.json").read_text() == before


def test_another_data_set_is_refused(finished, tmp_path):
    """A run is evaluated, and goes on, on what it has learned from: pixels are normalized by its figures."""
    workdir, summary = finished
    shutil.copytree(workdir, tmp_path / "there")
    file = tmp_path / "there" / "dataset.json"
    for field, value in (("mean", [0.9]), ("train_examples", 999)):
        info = json.loads((workdir / "dataset.json").read_text())
        file.write_text(json.dumps(info | {field: value}))
        told = f"another data set than 'digits' is here today: {field} .* there, .* now"
        with pytest.raises(WorkdirError, match=told):
            evaluate(tmp_path / "there")
        with pytest.raises(WorkdirError, match=told):
            train(small_config(total_steps=8), tmp_path / "there", extend=True, progress=False)
    # Figures of another machine may be rounded otherwise.
    file.write_text(json.dumps(info | {"mean": [info["mean"][0] + 1e-8], "train_examples": 1294}))
    assert evaluate(tmp_path / "there")["test_loss"] == summary["test_loss"]


def test_the_figures_of_a_finished_run_are_not_replaced(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "there", ignore=shutil.ignore_patterns("checkpoints"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "there").glob("*.json*")}
    with pytest.raises(WorkdirError, match="the figures of a run that has ended, and no checkpoint of it"):
        train(small_config(seed=5), tmp_path / "there", progress=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "there").glob("*.json*")} == before


def test_without_validation_only_what_is_asked_for_is_saved(tmp_path):
    fields = {"data.validation_fraction": 0.0, "eval_every": 1, "checkpoint_every": 4, "keep_checkpoints": 9}
    train(small_config(**fields), tmp_path, progress=False)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


def test_the_best_checkpoint_is_evaluated_on_request(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for step, accuracy in ((4, 0.9), (6, 0.1)):
        checkpoint = tmp_path / "run" / "checkpoints" / str(step)
        (checkpoint / "metrics" / "metrics").write_text(json.dumps({"validation_accuracy": accuracy}))
        write_manifest(checkpoint)
    found = evaluate(tmp_path / "run", best=True)
    _, variables, _ = load_model(tmp_path / "run", best=True)
    assert found["steps"] == 4
    assert found["test_loss"] == Trainer(small_config()).evaluate(variables, "test")["test_loss"]
    assert found["test_loss"] != evaluate(tmp_path / "run")["test_loss"] == finished[1]["test_loss"]


def test_no_best_checkpoint_without_validation(tmp_path, monkeypatch, root):
    train(small_config(**{"data.validation_fraction": 0.0, "total_steps": 1}), tmp_path, progress=False)
    for ask in (lambda: evaluate(tmp_path, best=True), lambda: load_model(tmp_path, best=True)):
        with pytest.raises(WorkdirError, match="none of them was validated, .* Leave --best out"):
            ask()
    monkeypatch.setattr(trainer.data_lib, "load_dataset", lambda config: pytest.fail("data was read"))
    with pytest.raises(WorkdirError, match="holds one model, weights.npz, and no checkpoints to choose the"):
        evaluate(root / "weights" / "cifar10_twin", best=True)


def test_another_process_that_sees_no_summary_yet_agrees(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    run = RunConfig.parse(small_config())
    assert trainer._finished(run, tmp_path / "run")["steps"] == 6
    (tmp_path / "run" / "summary.json").unlink()
    assert trainer._finished(run, tmp_path / "run") is None
    monkeypatch.setattr(trainer.distributed, "of_first_process", lambda found: 6)
    assert trainer._finished(run, tmp_path / "run") == {"steps": 6}


def test_evaluate_a_workdir(finished):
    workdir, summary = finished
    figures = evaluate(workdir)
    assert figures == {name: summary[name] for name in figures}
    with pytest.raises(WorkdirError, match="seed"):
        evaluate(workdir, small_config(seed=5))


def test_evaluation_finds_the_data_of_this_machine(finished, monkeypatch):
    def load(config):
        raise ValueError(f"sets in {config.data_dir}")

    monkeypatch.setattr(trainer.data_lib, "load_dataset", load)
    for options, expected in (({}, "sets in None"), ({"data_dir": "there"}, "sets in there")):
        with pytest.raises(ConfigError, match=expected):
            evaluate(finished[0], **options)


def test_extending_needs_the_flag(finished, tmp_path):
    train(small_config(total_steps=2), tmp_path, progress=False)
    with pytest.raises(WorkdirError, match="total_steps.*--extend"):
        train(small_config(total_steps=4), tmp_path, progress=False)
    assert train(small_config(total_steps=4), tmp_path, extend=True, progress=False)["steps"] == 4
    with pytest.raises(WorkdirError, match="at step 4 already, past the 3 steps asked for"):
        train(small_config(total_steps=3), tmp_path, extend=True, progress=False)
    # What was refused has left nothing behind.
    assert train(small_config(total_steps=4), tmp_path, progress=False)["steps"] == 4


def test_a_workdir_of_another_model_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(WorkdirError, match=r"model.arithmetic \('adder' there, 'multiply' now\)"):
        train(small_config(**{"model.arithmetic": "multiply"}), workdir, progress=False)


def test_each_step_is_compiled_once(caplog, tmp_path):
    with jax.log_compiles():
        train(small_config(), tmp_path, progress=False)
    compiled = [text for text in caplog.messages if text.startswith("Compiling jit(")]
    assert sum("jit(train_step)" in text for text in compiled) == 1
    assert sum("jit(eval_step)" in text for text in compiled) == 1


def test_a_step_has_no_product_buffer():
    fields = {"batch_size": 64, "model.implementation": None, "model.embed_dim": 64, "model.num_heads": 4}
    run = Trainer(small_config(**fields))
    batch = sharding.put_batch(next(run.train_batches()), run.mesh)
    memory = run.train_step.lower(run.new_state(), batch).compile().memory_analysis()
    # fc1 has M = 64 * 5 rows in all, half of them on each device, K = 64 and N = 256.
    product = 64 * 5 // 2 * 64 * 256 * 4
    assert memory.temp_size_in_bytes < product / 2


def test_a_batch_equals_its_accumulated_parts():
    fields = {"optimizer.name": "sgd", "optimizer.warmup_fraction": 0.0, "ema_decay": 0.0}
    states = []
    for parts in (1, 4):
        run = Trainer(small_config(accumulation_steps=parts, **fields))
        state, metrics = run.train_step(
            run.new_state(), sharding.put_batch(next(run.train_batches()), run.mesh)
        )
        states.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


def test_devices_do_not_change_the_update():
    """The sharded step against the same step on one device."""
    results = []
    for count in (1, 2):
        run = Trainer(small_config())
        run.mesh = sharding.make_mesh(jax.devices()[:count])
        state = state_lib.init_state(run.model, run.optimizer, seed=0, with_ema=True, mesh=run.mesh)
        step = update.make_train_step(
            run.model,
            run.optimizer,
            lambda key, images, labels: (images.astype(jnp.float32) / 255, jax.nn.one_hot(labels, 10)),
            schedule=optax.constant_schedule(0.0),
            ema_decay=0.9,
            mesh=run.mesh,
        )
        state, metrics = step(state, sharding.put_batch(next(run.train_batches()), run.mesh))
        results.append(jax.device_get((metrics, state.params, state.ema_params)))
    # The first update of Adam is the gradient's sign times the rate: an element whose gradient is rounding
    # error may go the other way.
    close = [
        np.isclose(a, b, rtol=1e-4, atol=1e-5).mean()
        for a, b in zip(*(jax.tree.leaves(result) for result in results))
    ]
    assert min(close) > 0.9


def test_evaluation_is_the_mean_over_every_image():
    run = Trainer(small_config(batch_size=32))
    state = run.new_state()
    figures = run.evaluate(state.evaluated_variables, "test")
    source = run.dataset.test
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.array([source[i]["label"] for i in range(len(source))])
    from adderflax.data import normalize_batch

    logits = run.model.apply({"params": state.params}, normalize_batch(images, run.dataset.info))
    logits = np.asarray(logits, np.float64)
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels])
    assert figures["test_examples"] == len(labels) == 359
    np.testing.assert_allclose(figures["test_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(figures["test_accuracy"], np.mean(logits.argmax(-1) == labels))


def test_the_average_is_evaluated(finished):
    run = Trainer(small_config())
    state = run.new_state()
    state, _ = run.train_step(state, sharding.put_batch(next(run.train_batches()), run.mesh))
    assert state.evaluated_variables["params"] is state.ema_params
    # After the first update the decay is min(0.9, 1/10): a tenth of the initialization is left.
    start = run.new_state().params
    jax.tree.map(
        lambda old, new, mean: np.testing.assert_allclose(mean, 0.1 * old + 0.9 * new, atol=1e-5),
        start,
        state.params,
        state.ema_params,
    )
    assert Trainer(small_config(ema_decay=0.0)).new_state().ema_params is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.image_size": 10}, "image_size=10 is not a multiple of patch_size=4"),
        ({"data.name": "no_such_set"}, "no_such_set"),
        ({"model.similarity": "cosine"}, "similarity='cosine' is not known; choose one of 'l1', 'dot'"),
        ({"eval_every": 0}, "eval_every=0 must be at least 1"),
        ({"model.grad_inputs": "hardtahn"}, "grad_inputs.*hardtahn"),
        ({"model.implementation": "fast"}, "implementation='fast' is not known"),
        (
            {"model.implementation": "tpu"},
            "implementation='tpu' does not run .*, cpu: choose one of 'reference'",
        ),
        ({"model.mlp_dim": -5}, "mlp_dim=-5 must be a whole number, at least 1"),
        ({"model.grad_inputs": "hardtanh:x"}, "grad_inputs: the slope .* got 'x'"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises((ConfigError, trainer.data_lib.DatasetNotReadyError), match=message):
        Trainer(small_config(**fields))


def test_batch_that_does_not_divide(tmp_path):
    message = "batch_size=33 does not divide over 2 devices.*--config.batch_size="
    with pytest.raises(ConfigError, match=message):
        train(small_config(batch_size=33), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.image_size": 10}, "image_size=10 is not a multiple of patch_size=4"),
        ({"distillation.teacher": "no/such/run", "distillation.soft_labels": 1.0}, "cannot be loaded"),
        ({"warm_start.source": "no/such/run"}, "it does not exist"),
        ({"batch_size": 2000}, "batch_size=2000"),
    ],
)
def test_a_start_that_fails_leaves_nothing(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        train(small_config(**fields), tmp_path / "runs" / "new", progress=False)
    assert not list(tmp_path.iterdir())


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot be written.*--workdir"):
        train(small_config(), tmp_path / "file" / "run", progress=False)


def test_gradient_rules_reach_the_model():
    fields = {"model.grad_inputs": "hardtanh:4", "model.grad_query": "sign"}
    config = Trainer(small_config(**fields)).model.config
    assert canonical_rule(config.grad_inputs, "") == ("hardtanh", 4.0) and config.grad_query == "sign"
