"""The CPU kernels: every instruction set's text against float64, threads, and what calls them."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from kernel_operands import exact_sums

from adderflax.operators import _cpu, _cpu_library, _xla, adder_attention, adder_conv, adder_matmul
from adderflax.operators.rules import Rule

INSTRUCTIONS = {"native": (), "plain": ("-DADDERFLAX_PLAIN",)}
if platform.machine() == "x86_64":
    INSTRUCTIONS["avx2"] = ("-mno-avx512f",)
RULES = (Rule("hardtanh", 2.0), Rule("sign"))
# (M, K, N): whole and ragged tiles and panels in every axis, one element, more terms than a panel takes.
SHAPES = [
    (1, 1, 1),
    (2, 3, 4),
    (7, 8, 5),
    (13, 9, 16),
    (25, 40, 17),
    (6, 48, 48),
    (50, 31, 33),
    (5, 17, 100),
    (100, 64, 3),
    (3, 513, 8),
    (260, 7, 49),
    (4, 1100, 65),
    (530, 5, 20),
    (3, 9001, 20),
]


@pytest.fixture(autouse=True)
def compiled():
    if reason := _cpu.unavailable():
        pytest.skip(reason)


@functools.cache
def targets(name):
    return _cpu_library.registered(_cpu_library.built(INSTRUCTIONS[name]), f"adderflax_{name}")


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    """The kernels compiled for what this machine has, and for less."""
    monkeypatch.setattr(_cpu_library, "targets", lambda: targets(request.param))


def operands(m, k, n, *batch, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=(*batch, *shape)).astype(np.float32) for shape in ((m, k), (k, n), (m, n))]


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agree_with_float64(instructions, shape, batch):
    x, y, g = operands(*shape, *batch)
    bytes_x, bytes_y = (np.random.default_rng(1).integers(0, 256, a.shape, np.uint8) for a in (x, y))

    @jax.jit
    def run(x, y, g, bytes_x, bytes_y):
        gradients = [[f(x, y, g, rule) for f in (_cpu.gradient_x, _cpu.gradient_y)] for rule in RULES]
        return _cpu.forward(x, y), gradients, _cpu.byte_distances(bytes_x, bytes_y)

    out, gradients, sums = run(x, y, g, bytes_x, bytes_y)
    reference.assert_within(np.asarray(out), *reference.forward(x, y), "forward")
    for rule, found in zip(RULES, gradients):
        name = ("hardtanh", rule.slope) if rule.kind == "hardtanh" else rule.kind
        for actual, expected in zip(found, reference.gradients(x, y, g, name, name)):
            reference.assert_within(np.asarray(actual), *expected, f"gradient, {name}")
    np.testing.assert_array_equal(sums, exact_sums(bytes_x, bytes_y))


@pytest.mark.parametrize("offset", [0.0, 0.9, 1.5, 3.0, 100.0, -1e4])
@pytest.mark.parametrize("k", [9, 64, 600])
def test_sums_are_as_exact_where_operands_lie_far_from_zero(instructions, offset, k):
    """Sums of maxima, from which those of both operands are taken, would have lost digits there."""
    x, y, _ = operands(50, k, 70)
    x, y = x + np.float32(offset), y + np.float32(offset)
    y[:, 3] = x[7] + np.float32(1e-3)  # one pair that is close, whatever the others are
    x[9] = y[:, 11]
    found, (expected, _) = np.asarray(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y)), reference.forward(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[9, 11] == 0.0


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("k", [20, 64, 512])
def test_sums_are_as_exact_where_operands_sum_to_nothing(instructions, size, k):
    """Their own sums say nothing of how large the maxima's are."""
    x, y, _ = operands(50, k, 70)
    halves = np.float32(size) * np.repeat([1.0, -1.0], k // 2).astype(np.float32)
    x, y = x - x.mean(axis=1, keepdims=True) + halves, y - y.mean(axis=0) + halves[:, None]
    y[:, :50] = x.T + 1e-4 * y[:, :50]  # neighbors, as features of one layer are
    x[9], y[:, 3] = y[:, 11], x[3]
    found, (expected, _) = np.asarray(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y)), reference.forward(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[9, 11] == found[3, 3] == 0.0 and found.max() == 0.0


RELATIVE_ERRORS = {
    "normal": (1e-6, lambda random, *shape: random.normal(size=shape)),
    # What is rounded is several times as large as the result.
    "uniform": (3e-6, lambda random, *shape: random.uniform(size=shape)),
    "magnitudes of normal": (3e-6, lambda random, *shape: np.abs(random.normal(size=shape))),
    "pixels": (3e-6, lambda random, *shape: random.integers(0, 256, shape) / 255),
    "zeros and others": (3e-6, lambda random, *shape: np.maximum(random.normal(size=shape), 0)),
}


@pytest.mark.parametrize("k", [20, 64, 192, 512, 2000])
@pytest.mark.parametrize("name", RELATIVE_ERRORS)
def test_relative_errors(instructions, name, k):
    allowed, draw = RELATIVE_ERRORS[name]
    random = np.random.default_rng(0)
    x, y = (draw(random, *shape).astype(np.float32) for shape in ((60, k), (k, 70)))
    found, (expected, _) = (
        np.asarray(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y)),
        reference.forward(x, y),
    )
    np.testing.assert_allclose(found, expected, rtol=allowed)


@pytest.mark.parametrize("k", [64, 192, 512, 2000])
def test_sums_of_constants(instructions, k):
    """Each addition rounds in the same direction as the one before."""
    random = np.random.default_rng(0)
    x, y = random.uniform(1, 2, (60, 1)), random.uniform(0.5, 1, (1, 70))
    x, y = (
        x.astype(np.float32) + np.zeros((1, k), np.float32),
        y.astype(np.float32) + np.zeros((k, 1), np.float32),
    )
    found, (expected, _) = np.asarray(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y)), reference.forward(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_whole_numbers_whose_sizes_round_to_the_limit(instructions):
    x, y = np.float32([[2**24 - 1, 1.0]]), np.float32([[0.0] * 16, [1.0] * 16])
    found = jax.jit(lambda x, y: _cpu.forward(x, y))(x, y)
    np.testing.assert_array_equal(found, np.full((1, 16), 1.0 - 2**24))


@pytest.mark.parametrize(("largest", "k"), [(127, 600), (32767, 512), (65535, 300)])
def test_whole_numbers_are_summed_exactly(instructions, largest, k):
    """Up to 2^24, by which the sums of both operands' sizes are larger."""
    random = np.random.default_rng(0)
    x, y = (random.integers(0, largest + 1, shape).astype(np.float32) for shape in ((50, k), (k, 64)))
    expected = -np.abs(x.astype(np.int64)[:, :, None] - y.astype(np.int64)).sum(1)
    assert expected.min() > -(2**24)
    np.testing.assert_array_equal(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y), expected)


def test_sums_that_leave_the_range(instructions):
    x, y, _ = operands(20, 400, 40)
    x, y = np.sign(x) * np.float32(1e36), np.sign(y) * np.float32(1e36)
    x[:4], y[:, :5] = np.float32(1e36), np.float32(1e36)
    x[6:8], x[8] = np.float32(-1e36), np.float32(3e38)
    # Of these each is in range, but not what both sums are together.
    x[9], y[:, 7] = np.float32(5e35), np.float32([4e35, 6e35] * 200)
    found = np.asarray(jax.jit(lambda x, y: _cpu.forward(x, y))(x, y))
    with np.errstate(over="ignore"):
        expected = reference.forward(x, y)[0].astype(np.float32)
    assert np.isinf(expected).any() and np.isfinite(expected).any() and (expected == 0.0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [*RULES, None], ids=lambda rule: rule.kind if rule else "forward")
@pytest.mark.parametrize("method", ["gradient_x", "gradient_y"])
@pytest.mark.parametrize("where", ["both", "x", "y", "nowhere but one infinity", "g"])
def test_nan_and_infinity_pass_as_through_xla(instructions, method, rule, where):
    x, y, g = operands(9, 20, 35)
    if where in ("both", "x"):
        x[2, 3], x[4, 5], x[6, 7] = np.nan, np.inf, -np.inf
    if where in ("both", "y"):
        y[7, 7], y[8, 9], y[5, 30] = -np.inf, np.nan, np.inf
    if where == "both":
        x[8, 1] = y[1, 33] = np.inf  # whose difference is none
    if where == "nowhere but one infinity":
        x[4, 5] = np.inf
    if where == "g":
        g[3, 4], g[5, 6] = np.nan, np.inf
    if rule is None:
        method, keywords, given = "forward", {}, (x, y)
    else:
        keywords, given = {"rule": rule}, (x, y, g)
    actual, expected = (
        np.asarray(jax.jit(functools.partial(getattr(module, method), **keywords))(*given))
        for module in (_cpu, _xla)
    )
    finite = np.isfinite(expected)
    assert finite.any() and (where in ("g", "nowhere but one infinity") or not finite.all())
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_sum_does_not_depend_on_where_it_is_cut(instructions):
    # Hence not on the number of threads either. Some pairs are close, so that they are summed in another way.
    x, y, g = operands(700, 600, 130)
    x[200:400] += 3.0
    y[:, 30:60:2] += 3.0
    run = jax.jit(lambda x, y, g: (_cpu.forward(x, y), _cpu.gradient_x(x, y, g, RULES[0])))
    whole, part = run(x, y, g), run(x[301:307], y, g[301:307])
    for all_rows, rows in zip(whole, part):
        np.testing.assert_array_equal(all_rows[301:307], rows)
    columns = jax.jit(lambda x, y: _cpu.forward(x, y))(x, y[:, 40:59])
    np.testing.assert_array_equal(whole[0][:, 40:59], columns)


SIDE_BY_SIDE = """
import concurrent.futures, jax, numpy as np
from test_cpu import RULES, operands
from adderflax.operators import _cpu
x, y, g = operands(300, 40, 200, 4)
run = jax.jit(lambda x, y, g: (_cpu.forward(x, y), _cpu.gradient_x(x, y, g, RULES[0])))
expected = jax.block_until_ready(run(x, y, g))
with concurrent.futures.ThreadPoolExecutor(8) as threads:
    calls = [threads.submit(lambda: jax.block_until_ready(run(x, y, g))) for _ in range(200)]
    for call in calls:
        jax.tree.map(np.testing.assert_array_equal, call.result(), expected)
print("all")
"""


def in_another_process(*arguments, **environment):
    """Runs Python with these tests and the library to import; a program that waits for itself is ended."""
    folder = Path(__file__).parent
    given = {"PYTHONPATH": f"{folder}:{folder.parents[1]}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | given | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_programs_that_run_side_by_side():
    # More of them than XLA has threads, each waiting for its own parts.
    done = in_another_process("-c", SIDE_BY_SIDE)
    assert done.stdout.strip() == "all", done.stderr[-3000:]


LESS = [pytest.param(name, marks=pytest.mark.slow) for name in INSTRUCTIONS if name != "native"]


@pytest.mark.parametrize("name", ["native", *LESS])
def test_nothing_outside_of_the_operands_is_touched(name, tmp_path):
    libraries = []
    for sanitizer in ("asan", "ubsan"):
        command = [_cpu_library._compiler(), f"-print-file-name=lib{sanitizer}.so"]
        libraries.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler has no address and undefined behaviour sanitizers to preload")
    told = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    # In a cache of its own: what is compiled with sanitizers is of no use to anybody else.
    told["ADDERFLAX_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("cpu_sanitized.py")
    done = in_another_process(script, *INSTRUCTIONS[name], **told)
    assert done.stdout.strip() == "clean", done.stderr[-5000:]


# What the kernels take of XLA: threads that run what is scheduled.
THREADS = """#pragma once
#include <functional>
#include <thread>
#include <vector>
namespace xla::ffi {
struct ThreadPool {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 3; }
  void Schedule(std::function<void()> work) { threads.emplace_back(work); }
  ~ThreadPool() { for (auto& thread : threads) thread.join(); }
};
}
"""


@pytest.fixture(scope="session")
def on_arm(tmp_path_factory):
    """Runs the kernels, compiled for ARM, in an emulator, without XLA."""
    tools = [shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")]
    if None in tools:
        pytest.skip("Debian's packages g++-aarch64-linux-gnu and qemu-user are not installed")
    folder = tmp_path_factory.mktemp("arm")
    header = folder / "xla" / "ffi" / "api" / "ffi.h"
    header.parent.mkdir(parents=True)
    header.write_text(THREADS)
    source = Path(__file__).with_name("cpu_elsewhere.cpp")
    includes = [f"-I{folder}", f"-I{_cpu_library.SOURCE.parent}"]
    options = ["-std=c++17", "-O3", "-ffp-contract=fast", "-static", "-pthread", *includes]
    subprocess.run([tools[0], *options, str(source), "-o", str(folder / "kernels")], check=True)
    return lambda *arguments, **given: subprocess.run(
        [tools[1], str(folder / "kernels"), *map(str, arguments)], capture_output=True, check=True, **given
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agree_with_float64_on_an_emulated_arm(on_arm, shape, batch):
    x, y, g = operands(*shape, batch)
    bytes_x, bytes_y = (np.random.default_rng(1).integers(0, 256, a.shape, np.uint8) for a in (x, y))
    given = b"".join(array.tobytes() for array in (x, y, g, bytes_x, bytes_y))
    found = on_arm(batch, *shape, 0.5, input=given).stdout
    results = []
    for like, dtype in ((g, "f4"), (x, "f4"), (y, "f4"), (x, "f4"), (y, "f4"), (g, "i4")):
        results.append(np.frombuffer(found, dtype, like.size).reshape(like.shape))
        found = found[like.size * 4 :]
    assert not found
    out, *gradients, sums = results
    reference.assert_within(out, *reference.forward(x, y), "forward")
    for rule, pair in zip((("hardtanh", 2.0), "sign"), (gradients[:2], gradients[2:])):
        for actual, expected in zip(pair, reference.gradients(x, y, g, rule, rule)):
            factor = 2.0 if rule != "sign" else 1.0  # the slope, which the kernel does not multiply by
            reference.assert_within(actual * factor, *expected, f"gradient, {rule}")
    np.testing.assert_array_equal(sums, exact_sums(bytes_x, bytes_y))


@pytest.mark.parametrize("slope", [2.0**-30, 2.0**-20, 1e-3, 1e3, 2.0**20, 2.0**30])
@pytest.mark.parametrize("size", [1e-28, 1e28])
def test_slopes_do_not_leave_the_range_of_the_result(slope, size):
    x, y, g = operands(5, 60, 7)
    x, y, g = (np.float32(a) for a in (x / slope, y / slope, g * size))
    rule = "hardtanh", slope
    for method, expected in zip(("gradient_x", "gradient_y"), reference.gradients(x, y, g, rule, rule)):
        found = jax.jit(functools.partial(getattr(_cpu, method), rule=Rule(*rule)))(x, y, g)
        reference.assert_within(np.asarray(found), *expected, method)


def test_all_operators_run_them():
    x, y, _ = operands(20, 30, 40)
    images, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    query = jnp.ones((2, 5, 3, 8))
    calls = {
        "adderflax_forward": lambda name: adder_matmul(x, y, implementation=name),
        "adderflax_bytes": lambda name: adder_conv(
            images.astype(jnp.int8), kernel.astype(jnp.int8), implementation=name
        ),
        "adderflax_gradient_y": lambda name: jax.grad(
            lambda key: adder_attention(query, key, query, implementation=name).sum()
        )(query),
    }
    for target, call in calls.items():
        text = jax.jit(functools.partial(call, "cpu")).lower().as_text()
        assert target in text
        assert "adderflax" not in jax.jit(functools.partial(call, None)).lower().as_text()


def test_without_jit():
    x, y, g = operands(5, 6, 7)
    with jax.disable_jit():
        out = adder_matmul(x, y, implementation="cpu")
        dx = jax.grad(lambda x: (adder_matmul(x, y, implementation="cpu") * g).sum())(x)
    reference.assert_within(np.asarray(out), *reference.forward(x, y), "forward")
    reference.assert_within(np.asarray(dx), *reference.gradients(x, y, g, "hardtanh", "full")[0], "gradient")


def test_shapes_must_be_known():
    (rows,) = jax.export.symbolic_shape("rows")
    shaped = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 6), (6, 7))]
    assert "shapes must be known" in _cpu.refuses(*shaped)
