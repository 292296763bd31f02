"""Kernels as JAX primitives: folded, vmapped, cut over meshes. The reference stands for CUDA's."""

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from kernel_operands import cuda_lowered_for_cpu, exact_sums, expectation, operands

from adderflax.operators import _cpu, _gpu
from adderflax.operators.rules import Rule


@pytest.fixture(params=["gpu", "cpu"])
def kernels(request, monkeypatch):
    """The module of an implementation, lowered for the CPU."""
    if request.param == "gpu":
        with cuda_lowered_for_cpu(monkeypatch):
            yield _gpu
        return
    yield _cpu


METHODS = [("forward", ()), ("gradient_x", (Rule("hardtanh"),)), ("gradient_y", (Rule("sign"),))]


def check(method, rule, actual, x, y, g):
    name = rule[0].kind if rule else None
    value, terms = expectation(method, name, *(np.asarray(array) for array in (x, y, g)))
    reference.assert_within(np.asarray(actual), value, terms, method)


def used(method, x, y, g):
    return (x, y) if method == "forward" else (x, y, g)


@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_batches_fold_and_vmap(kernels, method, rule):
    x, y, g = operands("forward", 4, 5, 7, 6, "float32", "normal")
    function = lambda *arrays: getattr(kernels, method)(*arrays, *rule)  # noqa: E731
    check(method, rule, jax.jit(function)(*used(method, x, y, g)), x, y, g)
    check(method, rule, jax.vmap(function)(*used(method, x, y, g)), x, y, g)
    pairs = [array.reshape(2, 2, *array.shape[1:]) for array in (x, y, g)]
    nested = jax.vmap(function, in_axes=1, out_axes=1)(*used(method, *pairs))
    check(method, rule, np.reshape(nested, (4, *nested.shape[2:])), x, y, g)
    # One y for all.
    axes = used(method, 0, None, 0)
    shared = jax.vmap(function, in_axes=axes)(*used(method, x, y[0], g))
    check(method, rule, shared, x, np.broadcast_to(y[:1], y.shape), g)
    if method != "gradient_y":
        folded = jax.jit(function)(*used(method, x, y[0], g))
        check(method, rule, folded, x, np.broadcast_to(y[:1], y.shape), g)


@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_empty_operands(kernels, method, rule):
    for m, k, n in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, y, g = jnp.ones((m, k)), jnp.ones((k, n)), jnp.ones((m, n))
        check(method, rule, getattr(kernels, method)(*used(method, x, y, g), *rule), x, y, g)


@pytest.fixture
def kernels_only(kernels, monkeypatch):
    """The same, where XLA's form would be a mistake."""

    def plain(*arguments):
        raise AssertionError("XLA's form in the kernels' place")

    monkeypatch.setattr(kernels._adder, "plain", plain)
    return kernels


SHARDINGS = {
    "rows": (("i", None), (None, None), ("i", None)),
    "columns": ((None, None), (None, "i"), (None, "i")),
    "contracted": ((None, "i"), ("i", None), (None, None)),
    "one side only": (("i", None), ("i", None), (None, "i")),
}


def two_devices():
    return jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))


def placed(mesh, sharding, arrays):
    return [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
        for array, axes in zip(arrays, SHARDINGS[sharding])
    ]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_partitioned_by_the_compiler(kernels_only, method, rule, sharding):
    kernels, mesh = kernels_only, two_devices()
    arrays = [array[0] for array in operands("forward", 1, 8, 6, 10, "float32", "normal")]
    given = used(method, *placed(mesh, sharding, arrays))
    function = lambda *arrays: getattr(kernels, method)(*arrays, *rule)  # noqa: E731
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*given).compile()
    check(method, rule, compiled(*given), *arrays)
    text = compiled.as_text()
    if (sharding, method) in (("rows", "forward"), ("rows", "gradient_x"), ("columns", "forward")):
        assert "all-gather" not in text and "all-reduce" not in text
    if (sharding, method) in (("contracted", "forward"), ("rows", "gradient_y"), ("columns", "gradient_x")):
        assert "all-gather" not in text and "all-reduce" in text


def test_without_a_mesh_the_compiler_partitions_the_xla_form(kernels, monkeypatch, caplog):
    def run(*arguments):
        raise AssertionError("a kernel in a program that the compiler would replicate")

    monkeypatch.setattr(kernels._adder, "run", run)
    x, y, _ = (array[0] for array in operands("forward", 1, 8, 6, 10, "float32", "normal"))
    rows = jax.device_put(x, NamedSharding(two_devices(), PartitionSpec("i", None)))
    actual = jax.jit(lambda x, y: kernels.forward(x, y))(rows, y)
    np.testing.assert_allclose(actual, reference.forward(x, y)[0], rtol=1e-5)
    assert "name the mesh with jax.set_mesh" in caplog.text
    # Under a shard_map over some axes, XLA partitions over the others.
    mesh = jax.make_mesh((1, 2), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("i")
    partly = jax.shard_map(kernels.forward, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"i"})
    np.testing.assert_allclose(jax.jit(partly)(x, y), reference.forward(x, y)[0], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_under_shard_map(kernels_only, method, rule, check_vma):
    kernels = kernels_only
    arrays = operands("forward", 2, 8, 6, 10, "float32", "normal")
    spec = PartitionSpec("i")

    def function(*arrays):
        result = getattr(kernels, method)(*arrays, *rule)
        if check_vma:
            assert jax.typeof(result).manual_axis_type.varying == {"i"}
        return result

    run = jax.shard_map(function, mesh=two_devices(), in_specs=spec, out_specs=spec, check_vma=check_vma)
    check(method, rule, jax.jit(run)(*used(method, *arrays)), *arrays)


def bytes_of(*lengths):
    *batch, m, k, n = lengths
    random = np.random.default_rng(k)
    return [random.integers(0, 256, (*batch, *shape), np.uint8) for shape in ((m, k), (k, n))]


def test_batches_of_bytes_fold_and_vmap(kernels):
    x, y = bytes_of(4, 5, 7, 6)
    run = kernels.byte_distances
    np.testing.assert_array_equal(jax.vmap(run)(x, y), exact_sums(x, y))
    np.testing.assert_array_equal(jax.vmap(run, (0, None))(x, y[0]), exact_sums(x, y[:1]))
    np.testing.assert_array_equal(run(x, y[0]), exact_sums(x, y[:1]))
    for empty in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        np.testing.assert_array_equal(run(*bytes_of(*empty)), exact_sums(*bytes_of(*empty)))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bytes_partitioned_by_the_compiler(kernels_only, sharding):
    mesh, arrays = two_devices(), bytes_of(8, 16, 10)
    given = placed(mesh, sharding, arrays)
    run = jax.jit(lambda x, y: kernels_only.byte_distances(x, y))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(run(*given), exact_sums(*arrays))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bytes_without_a_mesh(kernels, sharding):
    arrays = bytes_of(8, 16, 10)
    given = placed(two_devices(), sharding, arrays)
    run = jax.jit(lambda x, y: kernels.byte_distances(x, y))
    np.testing.assert_array_equal(run(*given), exact_sums(*arrays))


def test_exports_hold_xla_operations_only(kernels):
    x, y, _ = operands("forward", 1, 5, 7, 6, "float32", "normal")
    specs = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for array in (x, y)]
    exported = jax.export.export(jax.jit(kernels.forward))(*specs)
    assert "custom_call" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x[0], y[0]), reference.forward(x, y)[0][0], rtol=1e-5)
