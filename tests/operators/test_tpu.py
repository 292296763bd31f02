"""The TPU kernels without a TPU: interpreted, lowered, and compiled by the TPU's own compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
import tpu_compiler
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adderflax.operators import (
    _reference,
    _tpu,
    _tpu_batch,
    _tpu_blocks,
    _tpu_matrix,
    adder_matmul,
    available_implementations,
)
from adderflax.operators.rules import Rule, canonical_rule

# ---- the numbers, in interpret mode ----

STEEP, FLAT = ("hardtanh", 4.0), ("hardtanh", 0.25)
# (kernels, (B, M, K, N), dtypes of x and y, rule).
QUICK = [
    (_tpu_matrix, (1, 1, 1, 1), "float32", "float32", "hardtanh"),
    (_tpu_matrix, (3, 13, 9, 21), "float32", "float32", "sign"),  # problems share a block
    (_tpu_matrix, (1, 384, 20, 140), "bfloat16", "bfloat16", STEEP),  # results are turned in several squares
    (_tpu_matrix, (1, 1, 12, 130), "bfloat16", "float32", FLAT),  # one row
    (_tpu_batch, (3, 5, 7, 11), "float32", "float32", "hardtanh"),
    (_tpu_batch, (130, 2, 5, 6), "float32", "float32", "sign"),  # two groups of problems
    (_tpu_batch, (2, 27, 19, 35), "bfloat16", "float32", STEEP),  # two blocks of rows, two tiles of columns
]
LONG = [
    (_tpu_matrix, (1, 1, 131, 140), "bfloat16", "float32", FLAT),
    (_tpu_matrix, (1, 131, 140, 137), "float32", "float32", "hardtanh"),
    (_tpu_matrix, (1, 9, 600, 5), "float32", "float32", FLAT),  # blocks along the sum
    (_tpu_matrix, (1, 600, 9, 5), "float32", "float32", "hardtanh"),
    (_tpu_matrix, (1, 5, 9, 1300), "bfloat16", "bfloat16", "sign"),
    (_tpu_matrix, (5, 65, 64, 65), "float32", "float32", "hardtanh"),
    (_tpu_matrix, (1, 300, 64, 300), "float32", "float32", ("hardtanh", 1e30)),
    (_tpu_batch, (4, 65, 64, 65), "float32", "float32", "hardtanh"),
    (_tpu_batch, (2, 30, 70, 130), "bfloat16", "bfloat16", FLAT),
    (_tpu_batch, (1, 1, 1, 1), "float32", "float32", "sign"),
]


def operands(lengths, dtype_x="float32", dtype_y="float32", seed=0):
    """x [B, M, K], y [B, K, N], g [B, M, N]."""
    batch, m, k, n = lengths
    random = np.random.default_rng(seed)
    x, y, g = (random.normal(size=(batch, *shape)) for shape in ((m, k), (k, n), (m, n)))
    x, y = x.astype(reference.DTYPES[dtype_x]), y.astype(reference.DTYPES[dtype_y])
    y[0, 0, 0] = x[0, 0, 0]  # a difference of zero
    return x, y, g.astype(np.float32)


def check_interpreted(kernels, lengths, dtype_x, dtype_y, rule):
    x, y, g = operands(lengths, dtype_x, dtype_y)
    arrays = [jnp.asarray(array) for array in (x, y, g)]
    canonical = canonical_rule(rule, "rule")
    out = kernels.forward(*arrays[:2], interpret=True)
    reference.assert_within(np.asarray(out), *reference.forward(x, y), "forward")
    for name, expected in zip(("gradient_x", "gradient_y"), reference.gradients(x, y, g, rule, rule)):
        gradient = getattr(kernels, name)(*arrays, canonical, interpret=True)
        assert gradient.dtype == jnp.float32
        reference.assert_within(np.asarray(gradient), *expected, name)


def label(value):
    return value.__name__.rsplit("_")[-1] if hasattr(value, "__name__") else str(value).replace(" ", "")


@pytest.mark.parametrize(("kernels", "lengths", "dtype_x", "dtype_y", "rule"), QUICK, ids=label)
def test_interpreted_kernels_are_within_the_bound(kernels, lengths, dtype_x, dtype_y, rule):
    check_interpreted(kernels, lengths, dtype_x, dtype_y, rule)


def test_interpreted_blocks_along_the_sum(monkeypatch):
    """Two and three of them; a gradient's own operand is turned in several squares."""
    monkeypatch.setattr(_tpu_blocks, "_BLOCK_DEPTH", _tpu_blocks.CHUNK)
    check_interpreted(_tpu_matrix, (1, 384, 140, 20), "float32", "float32", "hardtanh")


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "lengths", "dtype_x", "dtype_y", "rule"), LONG, ids=label)
def test_interpreted_kernels_at_length(kernels, lengths, dtype_x, dtype_y, rule):
    check_interpreted(kernels, lengths, dtype_x, dtype_y, rule)


@pytest.mark.parametrize("kernels", [_tpu_matrix, _tpu_batch], ids=label)
def test_non_finite_inputs_stay_visible(kernels):
    x, y, _ = operands((2, 5, 7, 6))
    x[0, 2, 3], x[1, 4, 0], y[1, 6, 5] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected, _ = reference.forward(x, y)
    out = kernels.forward(jnp.asarray(x), jnp.asarray(y), interpret=True)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))


# ---- how problems are cut ----

VIT = [(1, 50432, 384, 1536), (1, 4096, 192, 192), (48, 197, 64, 197), (1, 197, 768, 192), (768, 65, 64, 65)]
MIB = 2**20


@pytest.mark.parametrize("lengths", VIT, ids=str)
def test_blocks_fit(lengths):
    batch, m, k, n = lengths
    x, y, rule = (batch, m, k), (batch, k, n), Rule("hardtanh")
    forms = _tpu_matrix.forward_forms(x, y)
    forms += _tpu_matrix.gradient_x_forms(x, y, rule) + _tpu_matrix.gradient_y_forms(x, y, rule)
    for problem in forms:
        blocks = _tpu_blocks.choose_blocks(problem)
        assert blocks.rows % blocks.tile_rows == 0 and blocks.depth % _tpu_blocks.CHUNK == 0
        assert _tpu_blocks.vmem_bytes(problem, blocks) <= 16 * MIB
        assert blocks.batch == 1 or blocks.depth >= problem.depth
        # The terms that exist, at the four operations a cycle of the vector unit, are a bound.
        operations = 3 if problem.rule is None else 4
        least = problem.rows * problem.lanes * problem.depth * operations / 4 / 1024
        assert _tpu_blocks.choose_tile(problem)[0] > least
    assert _tpu.refuses(*specs(x, y)) is None


# ---- as a JAX primitive ----


def specs(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def value_and_gradients(x, y, **options):
    out, vjp = jax.vjp(functools.partial(adder_matmul, grad_y="hardtanh", **options), x, y)
    return out, *vjp(jnp.sin(out))


def lowered(function, *arguments, platforms=("tpu",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def test_programs_for_tpus_hold_the_kernels():
    assert lowered(value_and_gradients, *specs((256, 40), (40, 128))).count("@tpu_custom_call(") == 3
    assert "tpu_custom_call" not in lowered(
        value_and_gradients, *specs((257, 40), (40, 128)), platforms=("cpu",)
    )
    # What fills registers badly is XLA's, and so are lengths that are not known.
    assert "tpu_custom_call" not in lowered(value_and_gradients, *specs((2, 40), (40, 3)))
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(adder_matmul), platforms=["cpu", "tpu"])(
        *specs((rows, 40), (40, 128))
    )
    assert "tpu_custom_call" not in exported.mlir_module()


def test_programs_for_several_platforms():
    run = functools.partial(adder_matmul, implementation=None)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(*specs((258, 40), (40, 128)))
    assert exported.mlir_module().count("@tpu_custom_call(") == 1
    x, y, _ = operands((1, 258, 40, 128))
    np.testing.assert_allclose(exported.call(x[0], y[0]), reference.forward(x, y)[0][0], rtol=1e-5)


def test_refusals():
    assert "tpu" in available_implementations() and "tpu" not in available_implementations("cpu")
    (rows,) = jax.export.symbolic_shape("rows")
    assert "symbolic" in _tpu.refuses(*specs((rows, 40), (40, 128)))
    assert "empty" in _tpu.refuses(*specs((0, 40), (40, 70)))
    x, y, _ = operands((1, 259, 40, 128))
    with pytest.raises(NotImplementedError, match="runs on TPUs.*lowered for cpu"):
        adder_matmul(x[0], y[0], implementation="tpu")
    with pytest.raises(ValueError, match="fill the vector registers badly"):
        adder_matmul(x[0, :1], y[0], implementation="tpu")


@pytest.fixture
def on_cpu(monkeypatch):
    """The primitive lowered for the CPU as for a TPU, with the reference in the place of the kernels."""
    calls = []

    def run_kernel(method, rule, interpret, x, y, *g):
        calls.append((x.shape, y.shape))
        assert x.ndim == y.ndim
        if method == "gradient_y":
            flipped = (jnp.swapaxes(array, -1, -2) for array in (y, x, *g))
            return jnp.swapaxes(_reference.gradient_x(*flipped, rule), -1, -2)
        return getattr(_reference, method)(x, y, *g, *(() if rule is None else (rule,)))

    monkeypatch.setattr(_tpu, "_run_kernel", run_kernel)
    mlir.register_lowering(_tpu._adder_p, _tpu._lower, platform="cpu")
    yield calls
    del mlir._platform_specific_lowerings["cpu"][_tpu._adder_p]


METHODS = [("forward", ()), ("gradient_x", (Rule("hardtanh"),)), ("gradient_y", (Rule("sign"),))]


def of(method, rule):
    function = getattr(_tpu, method)
    return lambda *arrays: function(*arrays, *rule)


def used(method, x, y, g):
    return (x, y) if method == "forward" else (x, y, g)


def check(method, rule, actual, x, y, g):
    if method == "forward":
        value, terms = reference.forward(x, y)
    else:
        value, terms = reference.gradients(x, y, g, rule[0].kind, rule[0].kind)[method == "gradient_y"]
    reference.assert_within(np.asarray(actual), value, terms, method)


@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_batches_fold_and_vmap(on_cpu, method, rule):
    x, y, g = operands((4, 5, 6, 7))
    run = of(method, rule)
    check(method, rule, run(*used(method, x, y, g)), x, y, g)
    check(method, rule, jax.vmap(run)(*used(method, x, y, g)), x, y, g)
    pairs = [array.reshape(2, 2, *array.shape[1:]) for array in (x, y, g)]
    nested = jax.vmap(run, in_axes=1, out_axes=1)(*used(method, *pairs))
    check(method, rule, np.reshape(nested, (4, *nested.shape[2:])), x, y, g)
    # One y for all: x's rows are those of one problem.
    same = np.broadcast_to(y[:1], y.shape)
    check(method, rule, jax.vmap(run, used(method, 0, None, 0))(*used(method, x, y[0], g)), x, same, g)
    if method != "gradient_y":
        assert on_cpu[-1] == ((20, 6), (6, 7))
    folded = jax.jit(run)(*used(method, x, y[0], g))
    assert on_cpu[-1] == ((20, 6), (6, 7))
    if method == "gradient_y":
        flat = [array.reshape(1, -1, array.shape[-1]) for array in (x, g)]
        check(method, rule, folded[None], flat[0], y[:1], flat[1])
    else:
        check(method, rule, folded, x, same, g)


def automatic(shape=(2,), names=("i",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("spec_y", [P(), P(None, "i")], ids=str)
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_a_named_mesh_cuts_the_rows(on_cpu, method, rule, spec_y):
    mesh = automatic((2, 1), ("i", "j"))
    arrays = [array[0] for array in operands((1, 8, 6, 10))]
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, (P("i"), spec_y, P("i")))
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(of(method, rule)).lower(*used(method, *placed)).compile()
    assert on_cpu == [((4, 6), (6, 10))]
    check(method, rule, compiled(*used(method, *placed)), *arrays)
    text = compiled.as_text()
    assert ("all-reduce" in text) == (method == "gradient_y")
    assert ("all-gather" in text) == (spec_y != P())


def test_a_named_mesh_cuts_the_batch(on_cpu):
    mesh, (x, y, g) = automatic(), operands((4, 5, 6, 7))
    for method, rule in METHODS:
        placed = jax.device_put(used(method, x, y, g), NamedSharding(mesh, P("i")))
        with jax.set_mesh(mesh):
            compiled = jax.jit(of(method, rule)).lower(*placed).compile()
        check(method, rule, compiled(*placed), x, y, g)
        assert on_cpu[-1] == ((2, 5, 6), (2, 6, 7)) and "all-" not in compiled.as_text()


def test_where_the_shares_are_not_known_xla_takes_over(on_cpu, caplog):
    x, y, _ = (array[0] for array in operands((1, 8, 6, 10)))
    expected = reference.forward(x, y)[0]
    mesh = automatic()
    rows = jax.device_put(x, NamedSharding(mesh, P("i")))
    np.testing.assert_allclose(jax.jit(of("forward", ()))(rows, y), expected, rtol=1e-5)
    assert "Name the mesh with jax.set_mesh" in caplog.text
    with jax.set_mesh(mesh):  # which does not divide seven rows
        np.testing.assert_allclose(jax.jit(of("forward", ()))(x[:7], y), expected[:7], rtol=1e-5)
    # Under a shard_map over some axes, XLA partitions over the others.
    mesh = automatic((1, 2), ("i", "j"))
    partly = jax.shard_map(_tpu.forward, mesh=mesh, in_specs=P("i"), out_specs=P("i"), axis_names={"i"})
    np.testing.assert_allclose(jax.jit(partly)(x, y), expected, rtol=1e-5)
    assert on_cpu == []


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_under_shard_map(on_cpu, method, rule, check_vma):
    arrays = operands((2, 8, 6, 10))

    def local(*arrays):
        result = of(method, rule)(*arrays)
        assert not check_vma or jax.typeof(result).manual_axis_type.varying == {"i"}
        return result

    run = jax.shard_map(local, mesh=automatic(), in_specs=P("i"), out_specs=P("i"), check_vma=check_vma)
    check(method, rule, jax.jit(run)(*used(method, *arrays)), *arrays)
    assert on_cpu == [((1, 8, 6), (1, 6, 10))]


def test_explicit_axes_scan_and_remat(on_cpu, monkeypatch):
    monkeypatch.setattr(_tpu, "_MOST_CYCLES", np.inf)
    x, y = (jnp.asarray(array[0]) for array in operands((1, 8, 6, 6))[:2])

    def network(x, y, implementation):
        @jax.checkpoint
        def layer(x, _):
            return adder_matmul(x, y, grad_y="sign", implementation=implementation) / 6.0, None

        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0] ** 2)

    expected = jax.grad(network, (0, 1))(x, y, "reference")
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, P("i", None)), jax.device_put(y, P(None, None))
        actual = jax.jit(jax.grad(network, (0, 1)), static_argnums=2)(*placed, "tpu")
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), atol=1e-5 * float(jnp.abs(e).max()))
    assert ((4, 6), (6, 6)) in on_cpu and ((8, 6), (6, 6)) not in on_cpu


# ---- compiled by the TPU's own compiler ----

DENSE = {"adder_forward": 1, "adder_gradient": 2}
REDUCED = DENSE | {"all-reduce": 1}
HEADS = {"adder_batch_forward": 1, "adder_batch_gradient_x": 1, "adder_batch_gradient_y": 1}
# Collectives that are not named here are not there; None leaves them to the compiler.
COMPILED = {
    "v5e:2x2": {
        "dense": DENSE,
        "ragged": DENSE,
        "heads": HEADS,
        "shard_map": REDUCED,
        "shard_map without vma": REDUCED,
        "named sharding": REDUCED,
        "explicit sharding": REDUCED,
        "columns cut too": None,
        "train step": None,
    },
    "v6e:2x2": {"dense": DENSE, "ragged": DENSE, "heads": HEADS, "named sharding": REDUCED},
}


@pytest.fixture
def compiler():
    if tpu_compiler.unavailable():
        pytest.skip(tpu_compiler.unavailable())
    return tpu_compiler.results


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", COMPILED)
def test_programs_compile(compiler, topology):
    programs = compiler(topology, *COMPILED[topology])
    for name, contents in COMPILED[topology].items():
        if contents is not None:
            assert programs[name] == contents, name
    if "columns cut too" in programs:
        found = {name: programs["columns cut too"][name] for name in DENSE}
        assert found == DENSE
    if "train step" in programs:
        step = programs["train step"]
        # Four adder layers of attention and two of the MLP share their forms; the scores are a batch.
        assert step["adder_forward"] >= 3 and step["adder_gradient"] >= 3 and step["all-reduce"] >= 1
        assert {name: step[name] for name in HEADS}.keys() == HEADS.keys()


# (kernel, least share of the vector slots that the terms take in the innermost loop).
SCHEDULES = [
    ("forward,1,512,128,1024", 0.9),
    ("gradient_x,1,512,1024,128", 0.9),
    ("forward,128,33,32,33", 0.85),
    ("gradient_x,128,33,32,33", 0.85),
]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize(("kernel", "least"), SCHEDULES)
@pytest.mark.parametrize("topology", COMPILED)
def test_loops_consist_of_arithmetic(compiler, topology, kernel, least):
    assert compiler(topology, "--schedule", kernel)["useful"] > least
