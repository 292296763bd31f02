"""Gradient rules that are functions, against their formula in float64, and what is no rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import AdderDense, EncoderConfig, VisionTransformer, VisionTransformerConfig
from adderflax.operators import (
    _gpu,
    _gpu_attention,
    _tpu_attention,
    adder_attention,
    adder_conv,
    adder_matmul,
)
from adderflax.operators.rules import Rule, canonical_rule


def smooth(difference):
    """A rule of one's own, in JAX and in NumPy."""
    return (np if isinstance(difference, np.ndarray) else jnp).tanh(2 * difference)


def hardtanh(difference):
    return jnp.clip(difference, -1, 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(x, y, g, rule, p):
    """The gradients of x [M, K] and y [K, N] in float64."""
    d = y.astype(np.float64) - x.astype(np.float64)[:, :, None]  # [M, K, N]

    def at_p(d):
        return (2 - p) * rule(d) + (p - 1) * p * np.abs(d) ** (p - 1) * np.sign(d)

    return (at_p(d) * g[:, None]).sum(2), (at_p(-d) * g[:, None]).sum(0)


@pytest.mark.parametrize("p", [1, 1.4])
@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (33, 70, 129), (200, 300, 40)], ids=str)
def test_gradients_are_the_formula(shape, implementation, p):
    if implementation == "reference" and p != 1:
        pytest.skip("another p has one form, XLA's")
    (m, k, n), options = shape, {"grad_x": smooth, "grad_y": smooth, "implementation": implementation}
    x, y, g = normal(0, m, k), normal(1, k, n), normal(2, m, n)
    _, vjp = jax.vjp(lambda x, y: adder_matmul(x, y, p=p, **options), x, y)
    for found, wanted in zip(vjp(jnp.asarray(g)), expected(x, y, g, smooth, p)):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def test_a_function_is_the_rule_that_it_writes_out():
    """In every operator, also where the named rule has a form of its own."""
    x, y, image = normal(0, 40, 130), normal(1, 130, 70), normal(2, 2, 7, 9, 4)
    kernels = {1: normal(3, 3, 3, 4, 6), 2: normal(4, 3, 3, 2, 6), 4: normal(5, 3, 3, 1, 4)}
    heads = tuple(normal(6 + i, 2, 130, 2, 4) for i in range(3))

    def all_gradients(rule):
        found = [jax.grad(lambda *a: adder_matmul(*a, grad_x=rule, grad_y=rule).sum(), (0, 1))(x, y)]
        for groups, kernel in kernels.items():
            run = functools.partial(
                adder_conv, grad_x=rule, grad_kernel=rule, feature_group_count=groups, strides=(2, 1)
            )
            found.append(jax.grad(lambda *a, run=run: jnp.sin(run(*a)).sum(), (0, 1))(image, kernel))
        run = functools.partial(adder_attention, grad_query=rule, grad_key=rule)
        return found, jax.grad(lambda *a: jnp.sin(run(*a)).sum(), (0, 1, 2))(*heads)

    for found, wanted in zip(*(jax.tree.leaves(all_gradients(rule)) for rule in (hardtanh, "hardtanh"))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_kernels_leave_it_to_xla(monkeypatch):
    x, y = jnp.ones((256, 256)), jnp.ones((256, 256))

    def lowered(rule, **options):
        run = jax.jit(jax.grad(lambda x, y: adder_matmul(x, y, grad_x=rule, grad_y=rule, **options).sum()))
        return jax.export.export(run, platforms=("tpu",))(x, y).mlir_module().count("tpu_custom_call")

    for options in ({}, {"implementation": "tpu"}):
        assert lowered("hardtanh", **options) > lowered(hardtanh, **options) == 0
    monkeypatch.setattr(_gpu, "refuses", lambda x, y: None)  # as where NVIDIA's compiler is
    heads = (jnp.ones((1, 2, 256, 64)),) * 3
    for kernels in (_gpu_attention, _tpu_attention):
        rules = Rule("sign"), Rule("hardtanh", 4.0)
        assert kernels.refuses(*heads, None, None, *rules) is None
        assert "hardtanh and sign" in kernels.refuses(*heads, None, None, rules[0], Rule(hardtanh))


def test_layers_and_models_take_it():
    layer = AdderDense(5, grad_x=smooth, grad_kernel=smooth, normalization="none")
    x, images = jnp.asarray(normal(0, 6, 9)), jnp.asarray(normal(1, 2, 8, 8, 1))
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["adder_kernel"])
    found = jax.grad(lambda v, x: layer.apply(v, x).sum(), (0, 1))(variables, x)
    wanted_x, wanted_kernel = expected(np.asarray(x), kernel, np.ones((6, 5)), smooth, 1)
    np.testing.assert_allclose(found[1], wanted_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0]["params"]["adder_kernel"], wanted_kernel, rtol=1e-4, atol=1e-5)
    fields = {"embed_dim": 16, "num_heads": 2, "depth": 1, "image_size": 8, "channels": 1, "num_classes": 10}
    gradients = []
    for rule in (hardtanh, "hardtanh"):
        config = VisionTransformerConfig.from_variant("digits", grad_inputs=rule, grad_query=rule, **fields)
        model = VisionTransformer(config)
        params = model.init(jax.random.key(0), images)
        gradients.append(jax.grad(lambda params, model=model: model.apply(params, images).sum())(params))
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradients[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), *gradients)
    assert hash(EncoderConfig(grad_key=smooth)) != hash(EncoderConfig())


def test_a_rule_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "rules_of_mine.py").write_text(
        "import jax.numpy as jnp\n\ndef smooth(d):\n    return jnp.tanh(d)\n\nslope = 2.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rule = canonical_rule("rules_of_mine:smooth", "grad_x")
    assert rule.kind is canonical_rule("rules_of_mine:smooth", "grad_x").kind
    x, w = normal(0, 4, 9), normal(1, 9, 5)
    found, wanted = (
        jax.grad(lambda x, rule=rule: adder_matmul(x, w, grad_x=rule).sum())(x)
        for rule in ("rules_of_mine:smooth", jnp.tanh)
    )
    np.testing.assert_array_equal(found, wanted)
    assert EncoderConfig(grad_key="rules_of_mine:smooth").grad_key == "rules_of_mine:smooth"
    (tmp_path / "rules_that_fail.py").write_text("def smooth(d) return d\n")
    for name, told in (
        ("rules_that_fail:smooth", "cannot be imported, SyntaxError: expected ':'"),
        (".rules_of_mine:smooth", "relative import"),
        ("HardTanh:4", 'Allowed are "full", "hardtanh"'),
        ("rules_of_mine:rough", "module 'rules_of_mine' has no attribute 'rough'. It names a function"),
        ("rules_of_nobody:smooth", "No module named 'rules_of_nobody'. .* put the module's directory on"),
        ("rules_of_mine:slope", "is no function, but 2.0"),
        (":smooth", "Empty module name"),
        ("hardtan:4", "No module named 'hardtan'"),
    ):
        with pytest.raises(ValueError, match=f"grad_x: the gradient rule '{name}' .*{told}"):
            canonical_rule(name, "grad_x")


def test_a_rule_that_gives_float64_is_told():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        with pytest.raises(ValueError, match="gave float64 of differences float32, .* Use Python's numbers"):
            canonical_rule(lambda d: d * np.float64(0.5), "grad_x")
        canonical_rule(lambda d: d * 0.5, "grad_x")


class Unhashable:
    __hash__ = None

    def __call__(self, difference):
        return difference


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (jnp.sum, r"is to be elementwise: of differences float32 \[2, 3\] it gave float32 \[\]"),
        (lambda d: d > 0, r"it gave bool \[2, 3\]. Return an array of their shape and dtype"),
        (lambda d: (d, d), r"is to be elementwise: of differences float32 \[2, 3\] it gave \(Shape"),
        (lambda d: 1.0, r"it gave float32 \[\]\. Return an array"),
        (lambda d: jnp.ones((2, 3)), r"of differences float32 \[1, 1\] it gave float32 \[2, 3\]"),
        (np.tanh, "by JAX's operations, which can be traced as NumPy's cannot; it failed with Tracer"),
        (lambda d: d if d[0, 0] > 0 else -d, "it failed with Tracer"),
        (
            lambda d: d["x"],
            "is to be a hashable function of an array of differences, .* by JAX's operations, .* failed",
        ),
        (lambda d: d - d.mean(), "of each difference alone it gave .* of the same ones together"),
        (Unhashable(), "failed with TypeError: unhashable"),
    ],
)
def test_what_is_no_rule(rule, told):
    with pytest.raises(ValueError, match=f"grad_x: the gradient rule .* {told}"):
        canonical_rule(rule, "grad_x")
