"""adder_conv against a float64 definition written from loops, and its contract."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adderflax.operators import _depthwise, adder_conv, available_implementations
from adderflax.operators import conv as conv_module


@dataclasses.dataclass(frozen=True)
class Case:
    """One generated call; a program (shapes, dtypes, rules) meets several magnitudes."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: object = "SAME"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtypes: tuple[str, str] = ("float32", "float32")
    rules: tuple[object, object] = ("hardtanh", "full")

    @property
    def geometry(self):
        return dict(
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            feature_group_count=self.groups,
        )

    def pads(self):
        if not isinstance(self.padding, str):
            return self.padding
        reach = [(n - 1) * d + 1 for n, d in zip(self.kernel[:2], self.dilation)]
        return lax.padtype_to_pads(self.x[1:3], reach, self.strides, self.padding)

    def operands(self, scales, seed=0):
        """x and kernel, rounded to their dtypes, and a float32 cotangent."""
        random = np.random.default_rng(seed)
        x, kernel = (
            (random.normal(size=shape) * scale).astype(reference.DTYPES[dtype])
            for shape, scale, dtype in zip((self.x, self.kernel), scales, self.dtypes)
        )
        height, width = (
            max(0, (size + sum(pads) - (n - 1) * d - 1) // s + 1)
            for size, pads, n, d, s in zip(
                self.x[1:3], self.pads(), self.kernel[:2], self.dilation, self.strides
            )
        )
        g = random.normal(size=(self.x[0], height, width, self.kernel[3]))
        return x, kernel, g.astype(np.float32)

    def __str__(self):
        parts = ("x".join(map(str, self.x)), "x".join(map(str, self.kernel)), self.strides, self.padding)
        return "-".join(map(str, (*parts, self.dilation, self.groups))).replace(" ", "")


CASES = [
    Case((2, 7, 6, 3), (3, 3, 3, 5)),
    Case((2, 8, 8, 6), (3, 3, 6, 4), strides=(2, 2), rules=("sign", "hardtanh")),
    Case((2, 9, 8, 6), (3, 2, 6, 4), (2, 1), "SAME_LOWER", rules=("full", "sign")),
    Case((1, 8, 8, 4), (3, 3, 4, 6), (2, 2), ((1, 1), (1, 1)), rules=(("hardtanh", 4.0), "full")),
    Case((3, 5, 7, 2), (2, 3, 2, 5), (1, 2), ((0, 2), (3, 1)), (2, 1), rules=("full", "full")),
    Case((2, 9, 9, 3), (3, 3, 3, 4), (3, 2), "VALID", (2, 3), rules=("hardtanh", "hardtanh")),
    Case((2, 6, 5, 8), (3, 3, 2, 12), groups=4, rules=("full", "full")),
    Case((2, 6, 5, 8), (3, 3, 4, 6), (2, 1), groups=2, rules=("sign", ("hardtanh", 0.25))),
    Case((2, 6, 6, 5), (3, 3, 1, 5), groups=5, rules=("hardtanh", "full")),  # depthwise
    Case((2, 5, 6, 3), (3, 3, 1, 6), (2, 2), groups=3, rules=("full", "sign")),
    Case((1, 10, 11, 2), (10, 9, 1, 2), groups=2, rules=("sign", "hardtanh")),  # too many positions to unroll
    Case((1, 1, 1, 1), (1, 1, 1, 1)),
    Case((2, 7, 7, 4), (1, 1, 4, 3), (2, 2), "VALID", rules=("sign", "sign")),
    Case((2, 6, 6, 3), (3, 3, 3, 4), padding=((-1, 0), (2, -2)), rules=("hardtanh", "sign")),  # crops
    Case((2, 1, 9, 3), (1, 4, 3, 4), padding=((0, 0), (1, 2)), rules=("full", "hardtanh")),
    Case((0, 5, 5, 3), (3, 3, 3, 4)),
    Case((2, 2, 5, 3), (3, 3, 3, 4), padding="VALID", rules=("full", "full")),  # no output rows
    Case((2, 5, 5, 0), (3, 3, 0, 4), rules=("full", "full")),
    Case((2, 5, 5, 3), (3, 3, 3, 0), rules=("sign", "full")),
]
# Their gradient for x is gathered on a CPU.
GATHERED = [
    Case((2, 7, 6, 24), (3, 3, 24, 5)),
    Case((1, 6, 7, 32), (2, 3, 16, 6), (1, 1), ((3, -1), (0, 4)), (2, 1), 2, rules=("sign", "hardtanh")),
    Case((1, 5, 8, 16), (4, 2, 16, 3), (1, 1), "SAME_LOWER", (1, 2), rules=(("hardtanh", 0.25), "full")),
    Case((2, 12, 11, 16), (3, 2, 16, 16), padding="VALID", rules=(("hardtanh", 4.0), "full")),
    Case((2, 7, 6, 19), (3, 3, 19, 18), rules=("sign", "full")),  # by "cpu" alone
]
CASES += GATHERED
CASES = [
    dataclasses.replace(case, dtypes=reference.DTYPE_PAIRS[i % len(reference.DTYPE_PAIRS)])
    for i, case in enumerate(CASES)
]


def loop_reference(case, x, kernel, g):
    """[(value, S)] of the result, dx and dkernel in float64, one patch at a time."""
    x64, kernel64, g64 = (array.astype(np.float64) for array in (x, kernel, g))
    pads = case.pads()
    # Cropping after padding: lax allows negative padding.
    padded = np.pad(x64, [(0, 0), *[tuple(max(0, n) for n in pair) for pair in pads], (0, 0)])
    crop = tuple(slice(max(0, -lo), size - max(0, -hi)) for (lo, hi), size in zip(pads, padded.shape[1:3]))
    place = np.zeros(padded.shape)  # gradient of padded
    place_terms = np.zeros(padded.shape)
    view, dview, dterms = (array[:, crop[0], crop[1]] for array in (padded, place, place_terms))
    out, dkernel, kernel_terms = np.zeros(g.shape), np.zeros(kernel.shape), np.zeros(kernel.shape)
    channels, filters = (size // case.groups for size in (x.shape[3], kernel.shape[3]))
    rule_x, rule_kernel = case.rules
    for n, h, w in np.ndindex(*g.shape[:3]):
        rows, columns = (
            slice(start * s, start * s + (n_taps - 1) * d + 1, d)
            for start, s, n_taps, d in zip((h, w), case.strides, kernel.shape[:2], case.dilation)
        )
        for group in range(case.groups):
            seen = slice(group * channels, (group + 1) * channels)
            own = slice(group * filters, (group + 1) * filters)
            difference = kernel64[..., own] - view[n, rows, columns, seen, None]
            weight = g64[n, h, w, own]
            out[n, h, w, own] = -np.abs(difference).sum((0, 1, 2))
            dview[n, rows, columns, seen] += (reference.rule(rule_x, difference) * weight).sum(-1)
            dkernel[..., own] += reference.rule(rule_kernel, -difference) * weight
            # What the documented algorithm adds: both products of a "full" gradient on their own.
            size = np.abs(weight)
            both = np.abs(kernel64[..., own]) + np.abs(view[n, rows, columns, seen, None])
            dterms[n, rows, columns, seen] += ((both if rule_x == "full" else 1.0) * size).sum(-1)
            kernel_terms[..., own] += (both if rule_kernel == "full" else np.ones_like(both)) * size
    (top, _), (left, _) = pads
    # What was padded on is cut off again, and what was cropped had no gradient.
    inner = tuple(slice(max(0, lo), max(0, lo) + size) for lo, size in zip((top, left), x.shape[1:3]))
    dx, x_terms = (array[:, inner[0], inner[1]] for array in (place, place_terms))
    return [(out, -out), (dx, x_terms), (dkernel, kernel_terms)]


@functools.cache
def program(case, implementation):
    @jax.jit
    def run(x, kernel, g):
        function = functools.partial(
            adder_conv,
            **case.geometry,
            grad_x=case.rules[0],
            grad_kernel=case.rules[1],
            implementation=implementation,
        )
        out, vjp = jax.vjp(function, x, kernel)
        return out, *vjp(g)

    return run


# The blocks are the same for all implementations, which have a conformance suite of their own.
RUNS = [("xla", case) for case in CASES]
# A depthwise convolution is summed elementwise by "xla" and in patches by the others.
RUNS += [
    (name, case)
    for name in available_implementations("cpu")
    if name != "xla"
    for case in (*CASES[1:8:3], CASES[8], *GATHERED[: None if name == "cpu" else 1])
]


@pytest.mark.parametrize("implementation, case", RUNS, ids=str)
def test_conformance(implementation, case):
    for seed, scales in enumerate(reference.SCALES):
        x, kernel, g = case.operands(scales, seed)
        actual = program(case, implementation)(*map(jnp.asarray, (x, kernel, g)))
        assert actual[0].dtype == jnp.float32
        assert (actual[1].dtype, actual[2].dtype) == (x.dtype, kernel.dtype)
        expected = loop_reference(case, x, kernel, g)
        for value, (wanted, terms), what in zip(actual, expected, ("forward", "dx", "dkernel")):
            reference.assert_within(np.asarray(value), wanted, terms, f"{what} at {scales}")


@pytest.mark.parametrize(
    "case, rows",
    [(CASES[1], 1), (CASES[2], 2), (CASES[7], 2), *((case, 2) for case in CASES[-len(GATHERED) : -1])],
    ids=str,
)
def test_blocks_of_rows(case, rows, monkeypatch):
    # Every case above is one block.
    x, kernel, g = case.operands((1.0, 1.0))
    # Gathered gradients have patches of the cotangent, as wide as x.
    width, channels = (
        (case.x[2], case.kernel[3]) if case in CASES[-len(GATHERED) :] else (g.shape[2], case.x[3])
    )
    row = 4 * case.x[0] * width * int(np.prod(case.kernel[:2])) * channels
    assert 1 <= rows < min(g.shape[1], case.x[1])
    monkeypatch.setattr(conv_module, "_CPU_BLOCK", row * rows)
    jax.clear_caches()  # the size of a block is no part of the key of a jitted call
    program.cache_clear()
    try:
        actual = program(case, None)(*map(jnp.asarray, (x, kernel, g)))
    finally:
        jax.clear_caches()
        program.cache_clear()
    for value, (wanted, terms) in zip(actual, loop_reference(case, x, kernel, g)):
        reference.assert_within(np.asarray(value), wanted, terms, f"{rows} rows a block")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(x, kernel, **options):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(adder_conv(*a, **options))), (0, 1))(x, kernel)


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        bound = tolerance * max(1.0, float(np.abs(e).max()))
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=bound)


@pytest.mark.parametrize(
    "kernel, options, gathers",
    [
        ((3, 3, 16, 5), {}, True),
        ((3, 3, 16, 5), {"dilation": 2, "grad_x": "sign"}, True),
        ((3, 3, 16, 4), {"feature_group_count": 2}, True),
        ((3, 3, 16, 16), {}, True),
        ((3, 3, 16, 17), {}, False),
        ((5, 5, 16, 5), {"padding": "VALID"}, False),
        ((3, 3, 16, 5), {"p": 1.5}, False),
        ((3, 3, 15, 5), {"implementation": "cpu"}, False),
        ((3, 3, 20, 5), {"implementation": "cpu"}, True),
        ((3, 3, 20, 5), {}, False),
        ((1, 1, 16, 5), {}, False),
        ((3, 3, 16, 5), {"strides": (1, 2)}, False),
        ((3, 3, 16, 5), {"implementation": "reference"}, False),
    ],
    ids=str,
)
def test_what_is_gathered_on_a_cpu(kernel, options, gathers):
    patch = math.prod(kernel[:3])
    operands = normal(0, 1, 8, 8, kernel[2] * options.get("feature_group_count", 1)), normal(1, *kernel)
    program = jax.jit(functools.partial(gradients, **options))
    platforms = [("cpu", kernel[2] if gathers else patch)]
    platforms += [("cuda", patch)] if options.get("implementation") != "cpu" else []
    for platform, columns in platforms:
        text = jax.export.export(program, platforms=[platform])(*operands).mlir_module()
        rows = re.findall(r"@adder_matmul(?:_power)?_gradient_x\w*\(%arg0: tensor<(?:\d+x)+(\d+)xf32>", text)
        assert rows and set(rows) == {str(columns)}, platform


@pytest.mark.parametrize("rows", [1, 2, 6, 8, 12, 15])
def test_depthwise_kernel_gradients_are_summed_alike_everywhere(rows):
    # One form runs on a CPU, the other elsewhere.
    terms = [np.random.default_rng(i).normal(size=(3, rows, 4, 5)).astype(np.float32) for i in range(9)]
    expected = np.stack(terms).astype(np.float64).sum((1, 2, 3))
    for form in (_depthwise._summed_apart, _depthwise._summed_together):
        np.testing.assert_allclose(np.asarray(form(*terms)), expected, atol=1e-4)


def test_depthwise_sums_stay_apart_from_what_reduces_them():
    # Else XLA for CPU fuses them into the mean, ten times as slow; what keeps them apart must outlive it.
    def means(x, kernel):
        y = _depthwise.depthwise_conv(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)))
        return jnp.mean(y, axis=-1)

    compiled = jax.jit(means).lower(normal(0, 2, 8, 8, 16), normal(1, 3, 3, 1, 16)).compile()
    assert "reduce-precision(" in compiled.as_text()


def test_padding_costs_the_kernel():
    kernel = normal(0, 3, 3, 2, 4)
    out = adder_conv(jnp.zeros((1, 1, 1, 2)), kernel)
    np.testing.assert_allclose(out[0, 0, 0], -jnp.sum(jnp.abs(kernel), (0, 1, 2)), rtol=1e-6)


GROUPS = {"strides": (2, 2), "feature_group_count": 2}


@pytest.mark.parametrize(
    "channels, options",
    [(4, {}), (32, {}), (4, GROUPS | {"grad_x": "full", "grad_kernel": "sign"})],  # the second gathers
    ids=str,
)
def test_vmap(channels, options):
    seen = channels // options.get("feature_group_count", 1)
    x, kernel = normal(0, 3, 2, 6, 6, channels), normal(1, 3, 3, 3, seen, 4)
    run = jax.jit(functools.partial(gradients, **options))
    each = [run(x[i], kernel[i]) for i in range(3)]
    assert_close(jax.jit(jax.vmap(run))(x, kernel), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


# The gradient for x is gathered in the second.
@pytest.mark.parametrize("channels, options", [(4, GROUPS), (32, {"feature_group_count": 2})], ids=str)
def test_sharded_batch(channels, options):
    x, kernel = normal(0, 4, 6, 6, channels), normal(1, 3, 3, channels // 2, 4)
    forward = functools.partial(adder_conv, **options)
    run = jax.jit(lambda x, k: (forward(x, k), gradients(x, k, **options)))
    expected = run(x, kernel)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(x, NamedSharding(mesh, P("d")))
    assert_close(run(placed, kernel), expected)
    compiled = jax.jit(forward).lower(placed, kernel).compile()
    assert compiled.output_shardings.spec[0] == "d"
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()

    local = functools.partial(gradients, **options)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
    assert_close(jax.jit(mapped)(x, kernel), expected[1])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    rows, whole = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, P("d")), (kernel, P())))
    for context in (jax.set_mesh(mesh), contextlib.nullcontext()):
        with context:
            explicit = jax.jit(forward)(rows, whole)
            assert jax.typeof(explicit).sharding.spec[0] == "d"
            assert_close((explicit, jax.jit(local)(rows, whole)), expected)


@pytest.mark.parametrize("grad_kernel", ["full", "hardtanh"])
def test_groups_on_a_mesh_of_two_axes(grad_kernel):
    """XLA's own convolution for the full gradient is wrong there."""
    code = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from adderflax import adder_conv
x, kernel, g = (np.random.default_rng(i).normal(size=s).astype(np.float32)
                for i, s in enumerate([(4, 6, 7, 8), (3, 3, 4, 8), (4, 6, 7, 8)]))
def gradients(x, kernel, g):
    conv = lambda x, kernel: adder_conv(x, kernel, feature_group_count=2, grad_kernel={grad_kernel!r})
    return jax.vjp(conv, x, kernel)[1](g)
mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
cut, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
placed = [jax.device_put(a, sharding) for a, sharding in ((x, cut), (kernel, whole), (g, cut))]
for found, expected in zip(jax.jit(gradients)(*placed), jax.jit(gradients)(x, kernel, g)):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-4)
"""
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=4")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    assert done.returncode == 0, done.stderr


def test_remat_and_export_with_symbolic_batch():
    x, kernel = normal(0, 3, 6, 5, 4), normal(1, 3, 3, 4, 4)

    def loss(x, kernel):
        layer = jax.checkpoint(lambda x, kernel: jnp.tanh(adder_conv(x, kernel) / 30.0 + 1.0))
        return jnp.sum(layer(layer(x, kernel), kernel) ** 2)

    def plain(x, kernel):
        for _ in range(2):
            x = jnp.tanh(adder_conv(x, kernel) / 30.0 + 1.0)
        return jnp.sum(x**2)

    expected = jax.jit(jax.grad(plain, (0, 1)))(x, kernel)
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(x, kernel), expected)

    pytest.importorskip("flatbuffers", reason="serialising an exported program needs flatbuffers")
    (batch,) = jax.export.symbolic_shape("b")
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 6, 5, 4), (3, 3, 4, 4))]
    exported = jax.export.export(jax.jit(adder_conv), platforms=("cpu", "tpu", "cuda"))(*arguments)
    revived = jax.export.deserialize(exported.serialize(vjp_order=1))
    actual = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(revived.call(*a))), (0, 1))(x, kernel)
    wanted = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(adder_conv(*a))), (0, 1)))(x, kernel)
    assert_close(actual, wanted)


def test_stable_call_names():
    x, kernel = normal(0, 2, 6, 5, 4), normal(1, 3, 3, 4, 3)
    text = str(jax.make_jaxpr(gradients)(x, kernel))
    for name in ("adder_conv", "adder_conv_gradient_x", "adder_conv_gradient_kernel"):
        assert text.count(f"name={name}\n") == 1


def test_peak_memory():
    # ResNet-20's first stage: all patches would take 9 times the input, 19 MiB a gradient.
    x, kernel = jnp.ones((32, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
    image = x.size * 4
    for function, images in ((adder_conv, 2.6), (gradients, 8.0)):
        memory = jax.jit(function).lower(x, kernel).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= images * image + 3 * conv_module._CPU_BLOCK


@pytest.mark.parametrize(
    ("short", "pairs"),
    [
        ({"strides": 2, "dilation": 2}, {"strides": (2, 2), "dilation": (2, 2)}),
        ({"padding": 1}, {"padding": ((1, 1), (1, 1))}),
        ({"padding": [(0, 2), -1]}, {"padding": ((0, 2), (-1, -1))}),
    ],
    ids=str,
)
def test_one_number_stands_for_two(short, pairs):
    x, kernel = normal(0, 2, 7, 6, 3), normal(1, 2, 2, 3, 4)
    np.testing.assert_array_equal(*(adder_conv(x, kernel, **options) for options in (short, pairs)))


X, KERNEL = np.ones((2, 6, 6, 4), np.float32), np.ones((3, 3, 4, 8), np.float32)
BAD_CALLS = {
    "rank of x": (ValueError, (X[0], KERNEL), {}, ["x has shape (6, 6, 4)", "[N, H, W, C]"]),
    "rank of kernel": (ValueError, (X, KERNEL[0]), {}, ["kernel has shape (3, 4, 8)"]),
    "channels": (
        ValueError, (X, KERNEL[:, :, :3]), {}, ["(2, 6, 6, 4)", "(3, 3, 3, 8)", "width >= 1, 4, O]"],
    ),
    "channels of groups": (ValueError, (X, KERNEL), {"feature_group_count": 2}, ["(3, 3, 4, 8)", "1, 2, O]"]),
    "groups": (ValueError, (X, KERNEL), {"feature_group_count": 3}, ["count=3", "(2, 6, 6, 4)"]),
    "group type": (ValueError, (X, KERNEL), {"feature_group_count": 1.0}, ["feature_group_count=1.0"]),
    "empty kernel": (ValueError, (X, KERNEL[:0]), {}, ["kernel has shape (0, 3, 4, 8)", "height >= 1"]),
    "integers": (TypeError, (X.astype(np.int32), KERNEL), {}, ["adder_conv: x", "int32", "astype"]),
    "list": (TypeError, (X, [1.0]), {}, ["kernel", "list"]),
    "stride": (ValueError, (X, KERNEL), {"strides": (0, 1)}, ["strides=(0, 1)", "at least 1"]),
    "three strides": (ValueError, (X, KERNEL), {"strides": (2, 2, 2)}, ["strides=(2, 2, 2)", "or two"]),
    "no strides": (ValueError, (X, KERNEL), {"strides": None}, ["strides=None", "whole number, or two"]),
    "text": (ValueError, (X, KERNEL), {"strides": "22"}, ["strides='22'", "whole number, or two"]),
    "one in an array": (ValueError, (X, KERNEL), {"strides": np.array(2)}, ["array(2)", "number, or two"]),
    "a set of strides": (ValueError, (X, KERNEL), {"strides": {1, 2}}, ["{1, 2}", "whole number, or two"]),
    "true": (ValueError, (X, KERNEL), {"dilation": True}, ["dilation=True", "whole number, or two"]),
    "dilation": (TypeError, (X, KERNEL), {"dilation": (1.5, 1)}, ["dilation=(1.5, 1)", "float"]),
    "padding": (ValueError, (X, KERNEL), {"padding": "FULL"}, ["'FULL'", "'SAME'", "'VALID'", "a pair"]),
    "pairs": (ValueError, (X, KERNEL), {"padding": (1, 1, 1)}, ["padding=(1, 1, 1)", "two entries"]),
    "crop": (ValueError, (X, KERNEL), {"padding": ((-4, -4), (0, 0))}, ["((-4, -4), (0, 0))", "crops"]),
    "rule": (ValueError, (X, KERNEL), {"grad_kernel": "tanh"}, ["grad_kernel", "'tanh'"]),
    "implementation": (ValueError, (X, KERNEL), {"implementation": "cuda"}, ["implementation", "'cuda'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    error, operands, options, parts = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        adder_conv(*operands, **options)
    for part in parts:
        assert part in str(raised.value)
