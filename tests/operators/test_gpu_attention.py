"""The fused CUDA kernels of attention without a GPU: emulated, lowered, compiled."""

import functools
import math
import re
import shutil
import subprocess

import gpu_emulator
import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from adderflax.operators import _attention_xla, _gpu, adder_attention, adder_matmul
from adderflax.operators import _gpu_attention as attention
from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators.rules import canonical_rule

HARDTANH, SLOPE, SIGN = "hardtanh", ("hardtanh", 4.0), "sign"
# Two tiles along either side, two chunks of either depth; with an offset, the exact rule.
MUTATED = {kind: (1, 90, 100, 20, 18, "float32", (HARDTANH, HARDTANH), kind) for kind in ("normal", "offset")}
# (groups, queries, keys, depth, depth of the values, dtypes of query, key and value, rules of query
#  and key, kind of data). Between them every length, depth, rule and dtype, in tiles of both sizes.
EMULATED = [
    (1, 1, 1, 1, 1, "float32", (HARDTANH, HARDTANH), "normal"),
    (1, 65, 65, 64, 64, "float32", (HARDTANH, HARDTANH), "normal"),
    (1, 197, 65, 16, 33, "float32", (SIGN, HARDTANH), "normal"),
    (1, 65, 197, 33, 16, "bfloat16", (HARDTANH, SLOPE), "normal"),
    (1, 17, 65, 128, 1, "float32", (HARDTANH, HARDTANH), "small"),
    (2, 1, 197, 16, 128, "float16", (SLOPE, HARDTANH), "normal"),
    (1, 197, 1, 1, 64, "float32", (SIGN, HARDTANH), "large"),
    (1, 65, 17, 64, 33, "bfloat16", (HARDTANH, SIGN), "large"),
    (1, 17, 130, 128, 128, "float32", (SIGN, SLOPE), "offset"),
    *MUTATED.values(),
]


def operands(groups, queries, keys, depth, value_depth, dtype, kind, seed=0):
    """query, key, value in the dtype and g with values of the dtype; batch 1, groups heads."""
    random = np.random.default_rng(seed)
    shapes = (queries, depth), (keys, depth), (keys, value_depth), (queries, value_depth)
    query, key, value, g = (random.normal(size=(1, groups, *shape)) for shape in shapes)
    scale = {"small": 1e-6, "large": 1e6 if dtype == "float32" else 1e4}.get(kind, 1.0)
    shift = 1000.0 if kind == "offset" else 0.0
    query, key, value = query * scale + shift, key * scale + shift, value * scale
    dtype = reference.DTYPES[dtype]
    query, key, value, g = (array.astype(dtype) for array in (query, key, value, g))
    return query, key, value, g.astype(np.float32)


def scale_of(depth):
    return 1.0 / math.sqrt(2.0 * depth * (1.0 - 2.0 / math.pi))


def expectation(query, key, value, g, rules):
    """{name: (float64 value, sum of the magnitudes of its terms)}, by definition."""
    query, key, value, g = (array.astype(np.float64) for array in (query, key, value, g))
    scale = scale_of(query.shape[-1])
    difference = key[..., None, :, :] - query[..., :, None, :]
    logits = -np.abs(difference).sum(-1) * scale
    maximum = logits.max(-1, keepdims=True)
    unnormalized = np.exp(logits - maximum)
    sums = unnormalized.sum(-1, keepdims=True)
    weights = unnormalized / sums
    product = weights @ value
    delta = (g * product).sum(-1, keepdims=True)
    dproducts = g @ value.swapaxes(-1, -2)
    dscores = weights * (dproducts - delta) * scale
    # What the documented algorithm adds: the difference of two large numbers among it.
    magnitudes = weights * (
        np.abs(g) @ np.abs(value).swapaxes(-1, -2) + np.abs(g * product).sum(-1)[..., None]
    )
    magnitudes = magnitudes * scale
    by_query = reference.rule(rules[0], difference) * dscores[..., None]
    by_key = reference.rule(rules[1], -difference) * dscores[..., None]
    return {
        "product": (product, weights @ np.abs(value)),
        "maximum": (maximum, np.abs(maximum)),
        "sums": (sums, sums),
        "dquery": (by_query.sum(-2), np.broadcast_to(magnitudes.sum(-1)[..., None], query.shape)),
        "dkey": (by_key.sum(-3), np.broadcast_to(magnitudes.sum(-2)[..., None], key.shape)),
        "dvalue": (weights.swapaxes(-1, -2) @ g, weights.swapaxes(-1, -2) @ np.abs(g)),
    }


def emulate(folder, calls, edit=str):
    """Runs kernels in both orders of their threads; `calls` holds (problem, arrays by role, shapes)."""
    units = []
    for index, (problem, _, shapes) in enumerate(calls):
        text = edit(attention.source(problem))
        names = re.findall(r"(?m)^#define (\w+)", text.partition("\n//")[0])
        lengths = {"own": "OWN_LINES * DEPTH", "other": "OTHER_LINES * DEPTH"}
        if problem.part != "forward":
            lengths["own_value"] = "OWN_LINES * VALUE_DEPTH"
        lengths["other_value"] = "OTHER_LINES * VALUE_DEPTH"
        reads = [
            f"  auto {name} = emulation::read<{name.upper()}_TYPE>(input, {problem.groups} * {length});"
            for name, length in lengths.items()
        ]
        if problem.part != "forward":
            for name in ("maximum", "sums", "delta"):
                count = problem.groups * problem.queries
                reads.append(f"  auto {name} = emulation::read<float>(input, {count});")
                lengths[name] = None
        starts = offsets(shapes)
        arguments = ", ".join(
            [f"{name}.data()" for name in lengths] + [f"out + {start}" for start in starts[:-1]]
        )
        body = "\n".join(reads)
        undefine = "\n".join(f"#undef {name}" for name in names)
        units.append(f"""
namespace problem_{index} {{
#define {kernels.KERNEL_NAME} kernel_{index}
{text}
void run(std::FILE* input, std::FILE* output) {{
{body}
  emulation::run(output, {problem.blocks}u, {attention.THREADS}u, &shared, sizeof(shared), {starts[-1]},
                 [&](float* out) {{ {kernels.KERNEL_NAME}({arguments}); }});
}}
}}
{undefine}
#undef {kernels.KERNEL_NAME}
""")
    output = gpu_emulator.run_units(folder, units, [array for _, arrays, _ in calls for array in arrays])
    results = []
    for _, _, shapes in calls:
        starts = offsets(shapes)
        found, output = np.split(output, [starts[-1]])
        results.append(
            [found[start : start + math.prod(shape)].reshape(shape) for start, shape in zip(starts, shapes)]
        )
    return results


def offsets(shapes):
    """Where results begin that share one array, aligned as on a GPU, and its end."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + math.ceil(math.prod(shape) / 4) * 4)
    return starts


def forward_call(case, arrays):
    """What emulate takes."""
    *_, rules, _ = case
    query, key, value, g = arrays
    (problem,) = attention.problems_of("forward", scale_of(query.shape[-1]), rules, query, key, value)
    return problem, (query, key, value), attention.result_shapes("forward", query, key, value)


def backward_calls(case, arrays, product, maximum, sums):
    """Likewise, with results of the forward pass."""
    *_, rules, _ = case
    *operand, g = arrays
    delta = np.sum(g * product, axis=-1, keepdims=True)
    rest = maximum, sums, delta, g
    rules = [canonical_rule(rule, "rule") for rule in rules]
    problems = attention.problems_of("backward", scale_of(operand[0].shape[-1]), rules, *operand, *rest)
    dquery, dkey, dvalue = attention.result_shapes("backward", *operand)
    return [
        (problem, attention.by_role(problem.part, *operand, *rest), shapes)
        for problem, shapes in zip(problems, ((dquery,), (dvalue, dkey)))
    ]


def run_emulated(folder, cases):
    """{name: result} of each case, the backward pass with what the forward pass gave."""
    arrays = [operands(*case[:6], case[7]) for case in cases]
    forwards = emulate(folder, [forward_call(*pair) for pair in zip(cases, arrays)])
    calls = [
        call for case, own, rows in zip(cases, arrays, forwards) for call in backward_calls(case, own, *rows)
    ]
    backwards = iter(emulate(folder, calls))
    names = "product", "maximum", "sums", "dquery", "dvalue", "dkey"
    return [dict(zip(names, (*rows, *next(backwards), *next(backwards)))) for rows in forwards]


def check_case(case, actual):
    expected = expectation(*operands(*case[:6], case[7]), case[6])
    for name, (value, terms) in expected.items():
        assert np.all(np.isfinite(actual[name])), f"{name}: not finite, or another order of threads differs"
        # The last summand is for what is too small for float32.
        reference.assert_within(actual[name], value, terms + 1e-30, name)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    gpu_emulator.require()
    return run_emulated(tmp_path_factory.mktemp("emulated"), EMULATED)


@pytest.mark.parametrize("index", range(len(EMULATED)), ids=["-".join(map(str, case)) for case in EMULATED])
def test_emulated_kernels_are_within_the_bound(emulated, index):
    check_case(EMULATED[index], emulated[index])


# (kernel, text, its replacement): seen by the order of threads, the sanitizers or the numbers.
MUTATIONS = {
    "a barrier less": ("query", "__syncthreads();  // everyone has read the last chunk", ""),
    "a line too many": ("query", "first_line + line < LINES", "first_line + line <= LINES"),
    "a term too many": ("forward", "first_term + term < TERMS", "first_term + term <= TERMS"),
    "a row too many": ("key", "first_row + row < ROWS", "first_row + row <= ROWS"),
    "keys beyond the end": ("forward", "inside ? expf(map[i][j] - top)", "true ? expf(map[i][j] - top)"),
    "not rescaled": ("forward", "product.at[i][j] *= shrink", "product.at[i][j] *= 1.0f"),
    "no correction": ("key", "-= 0.5f * total[i]", "-= 0.4f * total[i]"),
    "the other side": ("query", "factor - held[i][j + k]", "held[i][j + k] - factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernels_are_caught(name, tmp_path):
    gpu_emulator.require()
    part, before, after = MUTATIONS[name]

    case = MUTATED["offset" if name == "the other side" else "normal"]
    arrays = operands(*case[:6], case[7])
    expected = expectation(*arrays, case[6])
    if part == "forward":
        call, names = forward_call(case, arrays), ("product", "maximum", "sums")
    else:
        rows = [expected[name][0].astype(np.float32) for name in ("product", "maximum", "sums")]
        call = backward_calls(case, arrays, *rows)[part == "key"]
        names = ("dquery",) if part == "query" else ("dvalue", "dkey")
    assert call[0].micro == 4 and attention.source(call[0]).count(before) == 1
    with pytest.raises((AssertionError, gpu_emulator.EmulationError)):
        (results,) = emulate(tmp_path, [call], lambda text: text.replace(before, after))
        for name, actual in zip(names, results):
            assert np.all(np.isfinite(actual))
            reference.assert_within(actual, *expected[name], name)


VIT = {
    "65 tokens": (768, 65, 64),
    "1025 tokens": (48, 1025, 64),
    "deep": (48, 197, 128),
}


def problem(part, groups, tokens, depth, dtype="float32"):
    rule = None if part == "forward" else canonical_rule(HARDTANH, "rule")
    dtypes = (dtype,) * 3 + (() if part == "forward" else ("float32",))
    return attention.Problem(part, rule, groups, tokens, tokens, depth, depth, scale_of(depth), dtypes)


@pytest.mark.gpu_compile
@pytest.mark.parametrize("part", ["forward", "query", "key"])
@pytest.mark.parametrize("name", VIT)
def test_kernels_compile_without_spills(name, part, tmp_path):
    if shutil.which("ptxas") is None or (kernels.unavailable() and shutil.which("nvcc") is None):
        pytest.skip("no ptxas on the PATH, or neither NVRTC nor nvcc")
    wanted, ptx = problem(part, *VIT[name]), tmp_path / "kernel.ptx"
    if kernels.unavailable():
        (tmp_path / "kernel.cu").write_text(attention.source(wanted))
        nvcc = f"nvcc -std=c++17 -ptx -arch=compute_{kernels.ARCHITECTURE} kernel.cu -o kernel.ptx"
        subprocess.run(nvcc.split(), cwd=tmp_path, check=True, capture_output=True)
        ptx.write_text(kernels.with_oldest_version(ptx.read_text()))
    else:
        ptx.write_text(kernels.compile_ptx(attention.source(wanted)))
    ptxas = ["ptxas", "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(ptxas, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    assert " 0 bytes spill stores, 0 bytes spill loads" in report, report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers * attention.THREADS * wanted.blocks_per_sm <= 65536
    assert int(re.search(r"(\d+) bytes smem", report)[1]) <= 48 * 1024


# --- as a JAX primitive ---


@pytest.fixture
def any_machine(monkeypatch):
    """NVRTC replaced, so that lowering needs nothing installed."""
    monkeypatch.setattr(kernels, "unavailable", lambda: None)
    monkeypatch.setattr(kernels, "compile_ptx", lambda source: "ptx")


def launch(problem, results, *operands):
    """The reference in the place of the kernel."""
    rules = {} if problem.rule is None else {"grad_x": problem.rule, "grad_y": problem.rule}
    compose = {"score": functools.partial(adder_matmul, **rules, implementation="reference")}
    query, key, value, *rest = operands
    operands = query, key, value, None, None, problem.scale, *rest
    if problem.part == "forward":
        return _attention_xla.forward(*operands, **compose)
    dquery, dkey, dvalue, *_ = _attention_xla.backward(*operands, **compose)
    return [dquery] if problem.part == "query" else [dvalue, dkey]


@pytest.fixture
def on_cpu(any_machine, monkeypatch):
    """The primitive lowered for the CPU; yields how often each kernel was lowered."""
    launched = []

    def counted(problem, *arguments):
        launched.append(problem.part)
        return launch(problem, *arguments)

    def plain(problem, tile, *arrays):
        return _gpu._plain(problem.method, problem.rule, *arrays)

    monkeypatch.setattr(attention, "launch", counted)
    monkeypatch.setattr(_gpu, "launch", plain)
    primitives = ((attention._attention_p, attention._lower), (_gpu._adder.primitive, _gpu._adder.lower))
    for primitive, lower in primitives:
        mlir.register_lowering(primitive, lower, platform="cpu")
    yield launched
    for primitive, _ in primitives:
        del mlir._platform_specific_lowerings["cpu"][primitive]


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def product_and_gradients(query, key, value, g, **options):
    attend = functools.partial(adder_attention, grad_query="sign", grad_key=("hardtanh", 4.0), **options)
    product, pull = jax.vjp(attend, query, key, value)
    return product, *pull(g)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


on_gpu = functools.partial(product_and_gradients, implementation="gpu")
KERNELS = ["forward", "query", "key"]


def test_attention_runs_the_kernels(on_cpu):
    arrays = [tokens(i, 2, 9, 3, 8) for i in range(4)]
    expected = product_and_gradients(*arrays)
    assert_same(jax.jit(on_gpu)(*arrays), expected)
    assert on_cpu == KERNELS
    nested = jax.jit(jax.vmap(jax.vmap(on_gpu)))(*(array[:, None] for array in arrays))
    assert_same([array[:, 0] for array in nested], expected)
    shared = jax.jit(jax.vmap(on_gpu, in_axes=(0, None, 0, 0)))(arrays[0], arrays[1][0], *arrays[2:])
    repeated = product_and_gradients(arrays[0], jnp.stack([arrays[1][0]] * 2), *arrays[2:])
    assert_same(shared, repeated)


def test_others_are_left_to_the_composed_form(on_cpu):
    arrays = [tokens(i, 2, 9, 3, 8) for i in range(4)]
    traced = {"scale": jnp.float32(0.5)}
    deep = [tokens(i, 1, 3, 1, 129) for i in range(4)]
    for options in ({"mask": jnp.ones((9, 9), bool)}, {"bias": jnp.ones((9, 9))}, traced):
        jax.jit(functools.partial(on_gpu, **options)).lower(*arrays)
    jax.jit(functools.partial(adder_attention, grad_key="full", implementation="gpu")).lower(*arrays[:3])
    assert_same(jax.jit(on_gpu)(*deep), jax.jit(product_and_gradients)(*deep))
    assert on_cpu == []


def test_lowering_for_cuda_holds_no_map(any_machine):
    arrays = [jax.ShapeDtypeStruct((2, 197, 3, 64), jnp.bfloat16)] * 4
    text = jax.jit(on_gpu).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.ptx") == 3
    assert "197x197" not in text


def test_exports_hold_xla_operations_only(any_machine):
    arrays = [tokens(i, 2, 9, 3, 8) for i in range(4)]
    exported = jax.export.export(jax.jit(on_gpu), platforms=["cpu", "cuda"])(*arrays)
    assert "xla.gpu.ptx" not in exported.mlir_module()
    assert_same(exported.call(*arrays), product_and_gradients(*arrays))


@pytest.mark.parametrize("axis", [0, 2])
def test_partitioned_over_batch_and_heads(on_cpu, axis):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [tokens(i, 2, 9, 2, 8) for i in range(4)]
    spec = PartitionSpec(*("i" if i == axis else None for i in range(4)))
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array in arrays]
    with jax.set_mesh(mesh):
        compiled = jax.jit(on_gpu).lower(*placed).compile()
    assert set(on_cpu) == set(KERNELS)
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()
    assert_same(compiled(*placed), product_and_gradients(*arrays))
    # Without a named mesh, XLA's operations, which XLA knows how to partition.
    on_cpu.clear()
    assert_same(jax.jit(lambda *a: on_gpu(*a))(*placed), product_and_gradients(*arrays))
    assert on_cpu == []


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map(on_cpu, check_vma):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [tokens(i, 2, 9, 3, 8) for i in range(4)]
    spec = PartitionSpec("i")
    run = jax.shard_map(on_gpu, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    assert_same(jax.jit(run)(*arrays), product_and_gradients(*arrays))
    assert on_cpu == KERNELS
