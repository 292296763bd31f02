"""adder_matmul and adder_attention under the transformations of JAX.

Each test compares with the plain call, whose numbers the conformance suite checks.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adderflax.operators import adder_attention, adder_conv, adder_matmul

RULES = [{}, {"grad_x": "sign", "grad_y": ("hardtanh", 2.0)}]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss(x, y, **options):
    out = adder_matmul(x, y, **options)
    return jnp.sum(jnp.sin(out))


def gradients(x, y, **options):
    return jax.grad(functools.partial(loss, **options), (0, 1))(x, y)


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        bound = tolerance * max(1.0, float(np.abs(e).max()))
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=bound)


@pytest.mark.parametrize(
    "axes, options",
    [((0, None), RULES[0]), ((0, None), RULES[1]), ((None, 0), RULES[1]), ((1, 2), RULES[0])],
)
def test_vmap(axes, options):
    x, y = normal(0, 6, 33), normal(1, 33, 10)
    batched = [
        a if axis is None else jnp.stack([a * (i + 1) for i in range(3)], axis)
        for a, axis in zip((x, y), axes)
    ]
    actual = jax.vmap(functools.partial(gradients, **options), axes)(*batched)
    each = [
        gradients(*(a if ax is None else a * (i + 1) for a, ax in zip((x, y), axes)), **options)
        for i in range(3)
    ]
    assert_close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def slope_of(rule, difference):
    """The derivative of a rule."""
    if rule == "full":
        return np.ones_like(difference)
    slope = 1.0 if rule == "hardtanh" else rule[1]
    return slope * (np.abs(slope * difference) < 1)


@pytest.mark.parametrize("rule", ["hardtanh", "full", ("hardtanh", 4.0)], ids=str)
def test_derivatives_of_gradients(rule):
    """Where the branches of other platforms hold kernels, which have no derivative of their own."""
    x, y, weights = normal(0, 130, 96), normal(1, 96, 160), normal(2, 130, 160)

    def penalty(x, y):
        dx = jax.grad(lambda x: jnp.sum(weights * adder_matmul(x, y, grad_x=rule)))(x)
        return jnp.sum(jnp.square(dx)) / 2, dx

    (found_x, found_y), dx = jax.jit(jax.grad(penalty, (0, 1), has_aux=True))(x, y)
    x, y, weights, dx = (np.asarray(array, np.float64) for array in (x, y, weights, dx))
    slopes = slope_of(rule, y[None] - x[:, :, None]) * weights[:, None] * dx[:, :, None]  # [M, K, N]
    for found, expected in ((found_x, -slopes.sum(axis=2)), (found_y, slopes.sum(axis=0))):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", [None, "tpu"])
def test_every_branch_has_derivatives_of_gradients(name):
    """Traced, as a program for another platform is."""
    x, y, query = normal(0, 130, 128), normal(1, 128, 160), normal(2, 1, 130, 2, 64)

    def twice(function, *operands):
        return jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(function)(x) ** 2)), *operands)

    matmul = functools.partial(adder_matmul, implementation=name)
    assert twice(lambda x: jnp.sum(matmul(x, y)), x).shape == x.shape
    attention = functools.partial(adder_attention, implementation=name)
    assert twice(lambda q: jnp.sum(jnp.sin(attention(q, q, query))), query).shape == query.shape


def test_remat_and_scan():
    x, weights = normal(0, 4, 5, 24), normal(1, 3, 24, 24)

    def network(x, weights):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(adder_matmul(x, w) / 24.0), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    def unrolled(x, weights):
        for w in weights:
            x = jnp.tanh(adder_matmul(x, w) / 24.0)
        return jnp.sum(x**2)

    actual = jax.jit(jax.grad(network, (0, 1)))(x, weights)
    assert_close(actual, jax.grad(unrolled, (0, 1))(x, weights))


def test_jit_with_donation():
    x, y = normal(0, 64, 64), normal(1, 64, 64)
    expected = adder_matmul(x, y)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def run(x, y):
        return adder_matmul(x, y)

    donated = x + 0.0
    assert_close(run(donated, y), expected)
    assert donated.is_deleted()


def test_numpy_operands():
    x, y = np.asarray(normal(0, 3, 8)), np.asarray(normal(1, 8, 2))
    assert_close(adder_matmul(x, y), adder_matmul(jnp.asarray(x), jnp.asarray(y)))


# Where x [4, 6, 64] and y [64, 32] are cut, and the rules: the second need no matmul identity.
SHARDINGS = {
    "batch rows": (P("d", None, None), P(), RULES[0]),
    "batch rows, other rules": (P("d", None, None), P(), RULES[1]),
    "columns": (P(), P(None, "d"), RULES[1]),
    "rows and columns": (P("d", None, None), P(None, "d"), RULES[0]),
    "contracted": (P(None, None, "d"), P("d", None), RULES[0]),
    "contracted on one side": (P(), P("d", None), RULES[1]),
}


def mesh(axis_type):
    return jax.make_mesh((2,), ("d",), axis_types=(axis_type,))


@pytest.mark.parametrize("name", SHARDINGS)
def test_automatic_sharding(name):
    *specs, options = SHARDINGS[name]
    x, y = normal(0, 4, 6, 64), normal(1, 64, 32)
    expected = adder_matmul(x, y), gradients(x, y, **options)
    automatic = mesh(AxisType.Auto)
    placed = [jax.device_put(a, NamedSharding(automatic, s)) for a, s in zip((x, y), specs)]
    run = jax.jit(lambda x, y: (adder_matmul(x, y), gradients(x, y, **options)))
    assert_close(run(*placed), expected)


def test_sharded_rows_stay_sharded():
    x, y = normal(0, 4, 6, 64), normal(1, 64, 32)
    sharding = NamedSharding(mesh(AxisType.Auto), P("d", None, None))
    compiled = jax.jit(adder_matmul).lower(jax.device_put(x, sharding), y).compile()
    assert compiled.output_shardings.spec[0] == "d"
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_explicit_sharding(name, is_set):
    """On the mesh of `jax.set_mesh`, or on that of the arrays alone, which is what `jax.make_mesh` gives."""
    spec_x, spec_y, options = SHARDINGS[name]
    x, y = normal(0, 4, 6, 64), normal(1, 64, 32)
    expected = adder_matmul(x, y), gradients(x, y, **options)
    explicit = mesh(AxisType.Explicit)
    placed = [jax.device_put(a, NamedSharding(explicit, spec)) for a, spec in ((x, spec_x), (y, spec_y))]
    with jax.set_mesh(explicit) if is_set else contextlib.nullcontext():
        out, vjp = jax.jit(functools.partial(jax.vjp, functools.partial(adder_matmul, **options)))(*placed)
        cotangent = jax.device_put(
            jnp.cos(expected[0]), NamedSharding(explicit, jax.typeof(out).sharding.spec)
        )
        actual = jax.jit(lambda vjp, g: vjp(g))(vjp, cotangent)
    assert_close((out, actual), expected)


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
def test_explicit_attention(is_set, axis):
    q, k, v = (normal(i, 4, 6, 2, 16) for i in range(3))

    def run(q, k, v):
        out, vjp = jax.vjp(adder_attention, q, k, v)
        return out, vjp(jnp.cos(out))

    expected = run(q, k, v)
    explicit, spec = mesh(AxisType.Explicit), P(*(("d" if i == axis else None) for i in range(4)))
    placed = [jax.device_put(a, NamedSharding(explicit, spec)) for a in (q, k, v)]
    with jax.set_mesh(explicit) if is_set else contextlib.nullcontext():
        actual = jax.jit(run)(*placed)
    assert jax.typeof(actual[0]).sharding.spec[axis] == "d"
    assert_close(actual, expected)


def test_operands_on_different_meshes():
    placed = [
        jax.device_put(a, NamedSharding(jax.make_mesh((2,), (name,)), P(name)))
        for a, name in ((normal(0, 6, 64), "a"), (normal(1, 64, 32), "b"))
    ]
    with pytest.raises(ValueError, match="different meshes, .*'a'.* and .*'b'.*: put all on one"):
        jax.jit(adder_matmul)(*placed)


def test_explicit_axes_without_jit():
    x, y = normal(0, 4, 6, 64), normal(1, 64, 32)
    placed = jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), P("d")))
    assert_close(adder_matmul(placed, y), adder_matmul(x, y))


@pytest.mark.parametrize("check_vma, options", [(True, RULES[0]), (True, RULES[1]), (False, RULES[1])])
def test_grad_inside_shard_map(check_vma, options):
    x, y = normal(0, 4, 6, 24), normal(1, 24, 8)
    expected = gradients(x, y, **options)

    def local(x, y):
        dx, dy = gradients(x, y, **options)
        # With check_vma autodiff sums the gradient of the replicated weight itself.
        return dx, dy if check_vma else jax.lax.psum(dy, "d")

    run = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(P("d"), P()),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    assert_close(jax.jit(run)(x, y), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_of_shard_map(check_vma):
    q, k, v = (normal(i, 4, 6, 2, 16) for i in range(3))

    def total(attend):
        return lambda *operands: jnp.sum(jnp.sin(attend(*operands)))

    attend = functools.partial(adder_attention, aggregation="l1")
    mapped = jax.shard_map(
        attend, mesh=mesh(AxisType.Auto), in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
    )
    actual = jax.jit(jax.grad(total(mapped), (0, 1, 2)))(q, k, v)
    assert_close(actual, jax.grad(total(attend), (0, 1, 2))(q, k, v))


@pytest.mark.parametrize("what", ["matmul", "attention"])
def test_export_for_three_platforms_with_symbolic_batch(what):
    pytest.importorskip("flatbuffers", reason="serialising an exported program needs flatbuffers")
    (batch,) = jax.export.symbolic_shape("b")
    if what == "matmul":
        shapes = [(batch, 5, 33), (33, 7)]
        function = adder_matmul
        concrete = [normal(0, 3, 5, 33), normal(1, 33, 7)]
    else:
        shapes = [(batch, 5, 2, 8)] * 3
        function = adder_attention
        concrete = [normal(i, 3, 5, 2, 8) for i in range(3)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "tpu", "cuda"))(*arguments)
    order = 1 if what == "matmul" else 0
    revived = jax.export.deserialize(exported.serialize(vjp_order=order))
    assert_close(revived.call(*concrete), function(*concrete))
    if what == "matmul":
        actual = jax.grad(lambda *a: jnp.sum(jnp.sin(revived.call(*a))), (0, 1))(*concrete)
        assert_close(actual, gradients(*concrete))


def calls(jaxpr):
    """Names of the jit calls in a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation.params["name"]
        for parameter in equation.params.values():
            for inner in jax.tree.leaves(parameter, is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from calls(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from calls(inner)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_stable_call_names(implementation):
    x, y = normal(0, 2, 5, 8), normal(1, 8, 3)
    options = {"implementation": implementation, "grad_y": "hardtanh"}
    forward = jax.make_jaxpr(functools.partial(adder_matmul, **options))(x, y)
    assert list(calls(forward.jaxpr)).count("adder_matmul") == 1
    backward = list(calls(jax.make_jaxpr(functools.partial(gradients, **options))(x, y).jaxpr))
    for name in ("adder_matmul", "adder_matmul_gradient_x", "adder_matmul_gradient_y"):
        assert backward.count(name) == 1
    # The call's own avals are the public ones, so that a walker can count M * N * K elements.
    inside = forward.jaxpr.eqns[-1].params["call_jaxpr"]
    (call,) = (e for e in inside.eqns if e.params.get("name") == "adder_matmul")
    assert [v.aval.shape for v in (*call.invars, *call.outvars)] == [(2, 5, 8), (8, 3), (2, 5, 3)]


def test_log_of_the_implementation(monkeypatch, caplog):
    x, y = normal(0, 2, 8), normal(1, 8, 3)
    monkeypatch.setenv("ADDERFLAX_LOG_IMPLEMENTATION", "1")
    jax.block_until_ready(gradients(x, y))
    jax.block_until_ready(adder_matmul(x, y, implementation="reference"))
    jax.effects_barrier()
    lines = [record.getMessage() for record in caplog.records]
    assert any("forward" in line and "'xla'" in line for line in lines)
    assert any("gradient_x" in line and "'xla'" in line for line in lines)
    assert any("forward" in line and "'reference'" in line for line in lines)
    # The forms that no implementation of the table has.
    caplog.clear()
    jax.block_until_ready(gradients(x, y, p=1.5))
    pixels, kernel = normal(2, 1, 4, 4, 2), normal(3, 3, 3, 1, 2)
    conv = functools.partial(adder_conv, feature_group_count=2, grad_kernel="sign")
    jax.block_until_ready(jax.grad(lambda *operands: jnp.sum(conv(*operands)), (0, 1))(pixels, kernel))
    jax.effects_barrier()
    lines = [record.getMessage() for record in caplog.records]
    for method in ("forward", "gradient_x", "gradient_y"):
        assert any(f"adder_matmul {method} " in line and "'xla', for any p" in line for line in lines)
        assert any(f"adder_conv {method} " in line and "'xla', summed elementwise" in line for line in lines)
    monkeypatch.setenv("ADDERFLAX_LOG_IMPLEMENTATION", "")
    caplog.clear()
    jax.block_until_ready(adder_matmul(x, y))
    jax.effects_barrier()
    assert not caplog.records
