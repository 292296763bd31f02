"""Distillation: the losses against float64 NumPy, whom they teach, and what a wrong teacher is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import AdderSelfAttention
from adderflax.models import VisionTransformer, VisionTransformerConfig
from adderflax.training.distillation import (
    DistillationConfig,
    Outputs,
    attention_loss,
    distillation_loss,
    feature_loss,
    soft_label_loss,
)

B, C, HEADS, T, D, DEPTH = 4, 5, 2, 6, 8, 3
EVERYTHING = DistillationConfig(
    teacher="runs/twin", temperature=3.0, soft_labels=0.3, attention=0.7, features=0.2
)


def softmax(z):
    z = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return z / np.sum(z, axis=-1, keepdims=True)


def divergence(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def numbers(seed, depth=DEPTH, heads=HEADS, tokens=T, width=D, classes=C):
    """Logits, maps before the identity and block outputs, in float64."""
    rng = np.random.default_rng(seed)
    return (
        2.0 * rng.standard_normal((B, classes)),
        softmax(rng.standard_normal((depth, B, heads, tokens, tokens))),
        rng.standard_normal((depth, B, tokens, width)),
    )


def outputs(logits, maps, features, identity=False):
    """The same as the model sows it."""
    maps = maps + identity * np.eye(maps.shape[-1])
    to_jax = jax.tree_util.Partial(jnp.asarray, dtype=jnp.float32)
    blocks = {
        f"block_{i}": {"attention": {"attention_weights": (to_jax(map_),)}} for i, map_ in enumerate(maps)
    }
    return Outputs(to_jax(logits), blocks | {"block_outputs": tuple(map(to_jax, features))}, identity)


def targets():
    return jax.nn.one_hot(jnp.arange(B) % C, C)


def standardized(x):
    return (x - np.mean(x, axis=-1, keepdims=True)) / np.std(x, axis=-1, keepdims=True)


def test_every_part_is_its_formula_and_the_loss_their_sum():
    mine, theirs = numbers(0), numbers(1)
    loss, parts = distillation_loss(
        EVERYTHING, outputs(*mine, identity=True), outputs(*theirs, identity=False), targets()
    )
    p, q = softmax(mine[0] / 3.0), softmax(theirs[0] / 3.0)
    expected = {
        "label_loss": -np.mean(np.log(softmax(mine[0])[np.arange(B), np.arange(B) % C])),
        "soft_label_loss": 9.0 * np.mean(divergence(q, p)),
        "attention_loss": np.mean(divergence(theirs[1], mine[1])),
        "feature_loss": np.mean((standardized(mine[2]) - standardized(theirs[2])) ** 2),
    }
    assert list(parts) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-5, err_msg=name)
    weighted = np.dot([0.7, 0.3, 0.7, 0.2], list(expected.values()))
    np.testing.assert_allclose(loss, weighted, rtol=2e-5)


def test_a_student_like_its_teacher_has_only_the_labels_to_learn():
    """Up to the scale and mean of a token, which the next LayerNorm removes, and up to the identity."""
    logits, maps, features = numbers(0)
    student = outputs(logits + 5.0, maps, 100.0 * features - 40.0, identity=True)
    loss, parts = distillation_loss(EVERYTHING, student, outputs(logits, maps, features), targets())
    for name in ("soft_label_loss", "attention_loss", "feature_loss"):
        assert abs(float(parts[name])) < 1e-5, name
    np.testing.assert_allclose(loss, 0.7 * parts["label_loss"], rtol=1e-4)
    # Nor is there a gradient, but where the maps are rounded: compared at one common map.
    teacher = outputs(logits, maps, features, identity=True)
    gradient = jax.grad(lambda map_: attention_loss(replace_map(student, map_), teacher))
    pull = np.asarray(gradient(student.intermediates["block_0"]["attention"]["attention_weights"][0]))
    # What is left is the same for every key, which a softmax does not pass on.
    np.testing.assert_allclose(pull, np.full_like(pull, pull.mean()), rtol=1e-5)


def replace_map(found, map_):
    block = {"attention": {"attention_weights": (map_,)}}
    return found._replace(intermediates=found.intermediates | {"block_0": block})


def test_only_the_student_learns():
    def loss(mine, theirs):
        student, teacher = (
            Outputs(logits, sown, identity) for (logits, sown), identity in zip((mine, theirs), (True, False))
        )
        return distillation_loss(EVERYTHING, student, teacher, targets())[0]

    pairs = [outputs(*numbers(0), identity=True)[:2], outputs(*numbers(1))[:2]]
    student, teacher = jax.grad(loss, argnums=(0, 1))(*pairs)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(student))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 100.0])
def test_the_temperature_does_not_scale_the_gradient(temperature):
    """T (softmax(z / T) - softmax(t / T)) / B; for centered logits it tends to (z - t) / (C B) (Hinton)."""
    z, t = (x - np.mean(x, axis=-1, keepdims=True) for x in (numbers(0)[0], numbers(1)[0]))
    gradient = jax.grad(soft_label_loss)(
        jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.float32), temperature
    )
    expected = temperature * (softmax(z / temperature) - softmax(t / temperature)) / B
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    if temperature == 100.0:
        np.testing.assert_allclose(gradient, (z - t) / (C * B), rtol=0.05, atol=2e-3)


def test_labels_and_soft_labels_share_the_loss():
    student, teacher = Outputs(outputs(*numbers(0)).logits), Outputs(outputs(*numbers(1)).logits)

    def loss(share):
        return distillation_loss(
            DistillationConfig(teacher="runs/twin", soft_labels=share), student, teacher, targets()
        )[0]

    log_p, q = jax.nn.log_softmax(student.logits), jax.nn.softmax(teacher.logits)
    labels, entropy = -jnp.mean(jnp.sum(targets() * log_p, -1)), -jnp.mean(jnp.sum(q * jnp.log(q), -1))
    np.testing.assert_allclose(loss(1.0), -jnp.mean(jnp.sum(q * log_p, -1)) - entropy, rtol=1e-5)
    np.testing.assert_allclose(loss(0.25), 0.75 * labels + 0.25 * loss(1.0), rtol=1e-6)


def test_a_whole_batch_is_the_mean_of_its_parts():
    """Which gradient accumulation relies on."""

    def loss(rows):
        student, teacher = (
            jax.tree.map(lambda leaf: leaf[rows], outputs(*numbers(seed))[:2]) for seed in (0, 1)
        )
        return distillation_loss(EVERYTHING, Outputs(*student), Outputs(*teacher), targets()[rows])[0]

    halves = [loss(slice(None, 2)), loss(slice(2, None))]
    np.testing.assert_allclose(loss(slice(None)), np.mean(halves), rtol=1e-5)


def test_vanished_weights_leave_the_gradient_finite():
    """A sharp softmax has weights of 0, and one plus next to nothing is one."""
    sharp = np.broadcast_to(np.eye(T), (DEPTH, B, HEADS, T, T))
    logits, maps, features = numbers(0)
    student, teacher = outputs(logits, sharp, features, identity=True), outputs(logits, maps, features)
    gradient = jax.grad(lambda map_: attention_loss(replace_map(student, map_), teacher))
    pull = gradient(student.intermediates["block_0"]["attention"]["attention_weights"][0])
    assert np.all(np.isfinite(pull)) and np.isfinite(attention_loss(student, teacher))


def run(module, variables, inputs, **options):
    logits, sown = module.apply(variables, inputs, mutable=["intermediates"], **options)
    return Outputs(logits, sown["intermediates"], module.config.identity)


@pytest.mark.parametrize("remat", [False, True])
def test_what_models_sow_is_what_is_compared(remat):
    """An adder model with the identity and a standard one without; shapes only, nothing is computed."""
    images = jnp.zeros((2, 8, 8, 1))
    fields = {"dtype": "bfloat16", "remat": remat, "drop_path_rate": 0.1}
    student, teacher = (
        VisionTransformer(VisionTransformerConfig.from_variant("digits", arithmetic, **fields))
        for arithmetic in ("adder", "vit")
    )

    def parts(key):
        variables = [model.init(key, images) for model in (student, teacher)]
        outputs = run(student, variables[0], images, train=True, rngs={"drop_path": key})
        learned = run(teacher, variables[1], images)
        return distillation_loss(EVERYTHING, outputs, learned, jnp.full((2, 10), 0.1))

    loss, found = jax.eval_shape(parts, jax.random.key(0))
    assert set(found) == {"label_loss", "soft_label_loss", "attention_loss", "feature_loss"}
    assert {(leaf.shape, leaf.dtype.name) for leaf in (loss, *found.values())} == {((), "float32")}


def test_sown_maps_teach_queries_and_keys():
    config = VisionTransformerConfig.from_variant("digits", "adder", embed_dim=8, num_heads=2)
    student = AdderSelfAttention(config)
    teacher = AdderSelfAttention(dataclasses.replace(config, similarity="dot", identity=False))

    @jax.jit
    def learn(x):
        variables = student.init(jax.random.key(1), x)
        learned = run(teacher, student.init(jax.random.key(2), x), x)
        return jax.value_and_grad(lambda own: attention_loss(run(student, own, x), learned))(variables)

    loss, gradient = learn(jax.random.normal(jax.random.key(0), (2, 5, 8)))
    # Left in the student's maps, the identity would make the divergence negative.
    assert 0.0 < loss < 1.0
    learning = {name: np.any(np.asarray(leaf["adder_kernel"])) for name, leaf in gradient["params"].items()}
    assert learning == {"query": True, "key": True, "value": False, "out": False}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"depth": 2}, "attention", "the student has 3 blocks and the teacher 2"),
        ({"heads": 1}, "attention", r"the student's are \(4, 2, 6, 6\), the teacher's \(4, 1, 6, 6\)"),
        ({"depth": 2}, "features", "distillation.features.*the student has 3 blocks and the teacher 2"),
        ({"width": 4}, "features", r"the student's are \(4, 6, 8\), the teacher's \(4, 6, 4\)"),
        ({"classes": 7}, "soft_labels", r"the student's are \(4, 5\), the teacher's \(4, 7\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change, field, message):
    config = DistillationConfig(teacher="runs/twin", **{field: 0.5})
    with pytest.raises(ValueError, match=message):
        distillation_loss(config, outputs(*numbers(0)), outputs(*numbers(1, **change)), targets())


def test_a_model_without_maps_is_told_so():
    student, teacher = outputs(*numbers(0)), outputs(*numbers(1))
    with pytest.raises(ValueError, match="attention_weights, but the teacher has none"):
        attention_loss(student, teacher._replace(intermediates={"block_outputs": ()}))
    with pytest.raises(ValueError, match="block_outputs, but the student has none"):
        feature_loss(student._replace(intermediates=None), teacher)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "runs/twin"}, "'runs/twin' would teach nothing: all weights are 0"),
        ({"soft_labels": 0.5}, "soft_labels=0.5 without a teacher"),
        ({"attention": 1.0, "features": 2.0}, "attention=1.0, distillation.features=2.0 without a teacher"),
        ({"teacher": "", "features": 1.0}, "empty path"),
        ({"teacher": "t", "soft_labels": 1.5}, r"soft_labels=1.5 must lie in \[0, 1\]"),
        ({"teacher": "t", "soft_labels": float("nan")}, "soft_labels=nan"),
        ({"teacher": "t", "attention": -1.0}, "attention=-1.0 must be finite and not negative"),
        ({"teacher": "t", "features": float("inf")}, "features=inf must be finite"),
        (
            {"teacher": "t", "soft_labels": 0.5, "temperature": 0.0},
            "temperature=0.0 must be finite and greater",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**fields)


def test_soft_labels_alone_need_nothing_from_inside():
    """Capturing makes attention compute its T x T maps."""
    assert not DistillationConfig().needs_intermediates
    soft = DistillationConfig(teacher="t", soft_labels=0.5)
    assert not soft.needs_intermediates
    assert dataclasses.replace(soft, attention=0.1).needs_intermediates
    assert dataclasses.replace(soft, features=0.1).needs_intermediates
