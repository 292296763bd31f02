"""The CUDA kernels without a GPU: emulated, lowered, and compiled by NVIDIA's compilers."""

import functools
import re
import shutil
import subprocess

import gpu_emulator
import gpu_sass
import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from adderflax.operators import _gpu, _reference, adder_matmul
from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators.rules import Rule, canonical_rule

# (threads down, across, rows and columns a thread, depth, blocks a multiprocessor, splits)
LARGE = kernels.Tile(16, 8, 8, 8, 8, 3, 1)
WIDE = kernels.Tile(5, 25, 8, 8, 8, 3, 1)  # 197 columns in one tile; 3 spare threads
FORWARD_65 = kernels.Tile(9, 17, 8, 4, 16, 3, 1)
GRADIENT = kernels.Tile(16, 16, 8, 4, 16, 2, 1)
GRADIENT_197 = kernels.Tile(13, 16, 8, 4, 16, 2, 1)
ODD = kernels.Tile(3, 5, 4, 4, 16, 8, 1)  # half of its only warp is spare
SPLIT = kernels.Tile(2, 3, 8, 4, 16, 8, 4)

# (method, rule, batch, rows, columns, terms of the kernel, tile or None for the chosen one,
#  dtypes of x and y, kind of data)
EMULATED = [
    ("forward", None, 1, 1, 1, 1, None, "float32", "normal"),
    ("forward", None, 1, 5, 7, 3, None, "float32", "normal"),
    ("forward", None, 2, 65, 65, 64, None, "float32", "normal"),
    ("forward", None, 1, 128, 64, 24, LARGE, "float32", "normal"),
    ("forward", None, 1, 131, 67, 37, LARGE, "float32", "offset"),
    ("forward", None, 1, 130, 68, 28, LARGE, "bfloat16", "normal"),
    ("forward", None, 2, 41, 197, 20, WIDE, "float32", "normal"),
    ("forward", None, 1, 65, 65, 21, FORWARD_65, "float16", "normal"),
    ("forward", None, 1, 13, 24, 300, SPLIT, "float32", "normal"),
    ("forward", None, 3, 14, 23, 17, ODD, "bfloat16", "large"),
    ("forward", None, 1, 9, 12, 40, ODD, "float32", "mixed"),
    ("forward", None, 1, 9, 14, 35, ODD, "float32", "not finite"),
    ("gradient_x", "hardtanh", 1, 1, 1, 1, None, "float32", "normal"),
    ("gradient_x", "hardtanh", 2, 65, 64, 65, None, "float32", "normal"),
    ("gradient_x", "hardtanh", 1, 128, 64, 32, GRADIENT, "float32", "normal"),
    ("gradient_x", "hardtanh", 1, 131, 67, 37, GRADIENT, "bfloat16", "normal"),
    ("gradient_x", ("hardtanh", 4.0), 1, 130, 68, 20, GRADIENT, "float32", "normal"),
    ("gradient_x", "hardtanh", 1, 104, 64, 67, GRADIENT_197, "float32", "offset"),
    ("gradient_x", "hardtanh", 1, 20, 24, 300, ODD, "float32", "one sign"),
    ("gradient_x", "hardtanh", 1, 13, 24, 300, SPLIT, "float32", "one sign"),
    ("gradient_x", "hardtanh", 3, 14, 23, 17, ODD, "float16", "normal"),
    ("gradient_x", ("hardtanh", 0.25), 1, 9, 12, 40, ODD, "float32", "small"),
    ("gradient_x", "hardtanh", 1, 9, 12, 40, ODD, "float32", "large"),
    ("gradient_x", ("hardtanh", 1e30), 1, 9, 12, 40, ODD, "float32", "mixed"),
    ("gradient_x", "sign", 1, 37, 20, 50, ODD, "float32", "ties"),
    ("gradient_x", "sign", 1, 131, 67, 37, GRADIENT, "bfloat16", "ties"),
    ("gradient_x", "sign", 1, 9, 12, 40, ODD, "float32", "small"),
    ("gradient_y", "hardtanh", 1, 1, 1, 1, None, "float32", "normal"),
    ("gradient_y", "hardtanh", 2, 64, 65, 65, None, "float32", "normal"),
    ("gradient_y", "hardtanh", 1, 128, 64, 32, GRADIENT, "float32", "normal"),
    ("gradient_y", "hardtanh", 1, 131, 67, 37, GRADIENT, "bfloat16", "offset"),
    ("gradient_y", ("hardtanh", 0.25), 1, 104, 197, 18, WIDE, "float32", "large"),
    ("gradient_y", "hardtanh", 1, 20, 24, 300, ODD, "float32", "one sign"),
    ("gradient_y", "hardtanh", 1, 13, 24, 300, SPLIT, "float32", "normal"),
    ("gradient_y", "sign", 3, 14, 23, 17, ODD, "float16", "ties"),
    ("gradient_y", "sign", 1, 37, 20, 50, ODD, "float32", "ties"),
]


def operands(method, batch, rows, columns, terms, dtype, kind, seed=0):
    """x [B, M, K], y [B, K, N], g [B, M, N] of the problem that the kernel sees so."""
    lengths = {
        "forward": (rows, terms, columns),
        "gradient_x": (rows, columns, terms),
        "gradient_y": (terms, rows, columns),
    }
    m, k, n = lengths[method]
    random = np.random.default_rng(seed)
    x, y, g = (random.normal(size=(batch, *shape)) for shape in ((m, k), (k, n), (m, n)))
    scale_x, scale_y = {"small": (1e-6, 1e-6), "large": (1e6, 1e6), "mixed": (1e-6, 1e6)}.get(kind, (1, 1))
    x, y = x * scale_x, y * scale_y
    if kind == "offset":  # differences far smaller than the operands
        x, y = x + 1000, y + 1000
    if kind == "ties":
        x, y = np.round(x), np.round(y)
    if kind == "not finite":
        x[..., 2, 0], x[..., 3, 1], y[..., 1, 5] = np.nan, np.inf, np.inf
    if kind == "one sign":  # the gradient is far smaller than the sum of its terms
        x, y, g = x * 1e-3, np.sign(y) * 0.5, np.abs(g)
    dtype = reference.DTYPES[dtype]
    return x.astype(dtype), y.astype(dtype), g.astype(np.float32)


def expectation(method, rule, x, y, g):
    """(value, sum of the magnitudes of its terms) in float64."""
    if method == "forward":
        with np.errstate(invalid="ignore"):
            return reference.forward(x, y)
    return reference.gradients(x, y, g, rule, rule)[method == "gradient_y"]


def call_of(method, rule, arrays, tile):
    """What gpu_emulator.emulate takes."""
    rule = canonical_rule(rule, "rule") if rule else None
    x, y, g = arrays
    used = (x, y) if method == "forward" else (x, y, g)
    problem = _gpu.problem_of(method, rule, *used)
    by_role = {"forward": (x, y), "gradient_x": (g, y, x), "gradient_y": (x, g, y)}[method]
    return problem, tile or kernels.choose_tile(problem), by_role


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    reason = gpu_emulator.unavailable()
    if reason:
        pytest.skip(reason)
    calls = [
        call_of(method, rule, operands(method, *lengths, dtype, kind), tile)
        for method, rule, *lengths, tile, dtype, kind in EMULATED
    ]
    return gpu_emulator.emulate(tmp_path_factory.mktemp("emulated"), calls)


def label(case):
    method, rule, batch, rows, columns, terms, tile, dtype, kind = case
    return f"{method}-{rule}-{batch}x{rows}x{columns}x{terms}-{tile and tile[:2]}-{dtype}-{kind}"


@pytest.mark.parametrize("index", range(len(EMULATED)), ids=[label(case) for case in EMULATED])
def test_emulated_kernels_are_within_the_bound(emulated, index):
    method, rule, *lengths, _, dtype, kind = EMULATED[index]
    arrays = operands(method, *lengths, dtype, kind)
    value, terms = expectation(method, rule, *arrays)
    finite = np.isfinite(value)
    assert np.all(np.isfinite(emulated[index]) == finite)
    assert finite.all() or kind == "not finite"
    value, terms, actual = (np.where(finite, array, 0) for array in (value, terms, emulated[index]))
    reference.assert_within(actual, value, terms, method)


# Bytes: batch, rows, columns, terms, tile.
BYTES = [
    (1, 1, 1, 1, None),
    (1, 5, 7, 6, None),
    (2, 65, 65, 64, None),
    (1, 131, 67, 147, LARGE),
    (1, 128, 64, 96, LARGE),
    (1, 13, 24, 1201, SPLIT),
    (3, 14, 23, 70, ODD),
]


def byte_operands(batch, rows, columns, terms):
    random = np.random.default_rng(terms)
    x, y = (
        random.integers(0, 256, shape, np.uint8) for shape in ((batch, rows, terms), (batch, terms, columns))
    )
    x[:, 0], y[..., 0] = 255, 0  # the largest sum
    return x, y


def byte_call(x, y, tile):
    words = tuple(map(np.asarray, _gpu.packed(jnp.asarray(x), jnp.asarray(y))))
    problem = _gpu.problem_of("forward", None, *words)
    return problem, tile or kernels.choose_tile(problem), words


def exact_sums(x, y):
    return -np.abs(x[..., :, None, :].astype(int) - y.mT[..., None, :, :].astype(int)).sum(-1)


def test_emulated_sums_of_bytes_are_exact(tmp_path):
    reason = gpu_emulator.unavailable()
    if reason:
        pytest.skip(reason)
    pairs = [byte_operands(*lengths) for *lengths, _ in BYTES]
    calls = [byte_call(*pair, tile) for pair, (*_, tile) in zip(pairs, BYTES)]
    for actual, pair in zip(gpu_emulator.emulate(tmp_path, calls), pairs):
        assert actual.dtype == np.int32
        np.testing.assert_array_equal(actual, exact_sums(*pair))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("__float_as_uint(b.at[j]));", "__float_as_uint(b.at[0]));"),
        ("__uint_as_float(0u - sum)", "__uint_as_float(sum)"),
        ("buffer ^ 1]);\n      __syncthreads();", "buffer ^ 1]);"),
    ],
)
def test_mutated_sums_of_bytes_are_caught(before, after, tmp_path):
    reason = gpu_emulator.unavailable()
    if reason:
        pytest.skip(reason)

    def mutate(text):
        assert text.count(before) == 1
        return text.replace(before, after)

    x, y = byte_operands(1, 21, 18, 560)
    call = byte_call(x, y, kernels.Tile(4, 9, 4, 4, 16, 8, 1))
    with pytest.raises((AssertionError, gpu_emulator.EmulationError)):
        np.testing.assert_array_equal(gpu_emulator.emulate(tmp_path, [call], mutate)[0], exact_sums(x, y))


# (method, text, its replacement). Each must be seen: by the order of the threads, by the
# sanitizers, or by the numbers.
MUTATIONS = {
    "a barrier less": ("forward", "buffer ^ 1]);\n      __syncthreads();", "buffer ^ 1]);"),
    "one buffer": ("forward", "const int buffer = chunk & 1;", "const int buffer = 0;"),
    "a line too many": ("forward", "inside = line < lines_left;", "inside = line <= lines_left;"),
    "a term too many": ("forward", "inside && term < terms_left;", "inside && term <= terms_left;"),
    "a result too many": ("forward", "row >= ROWS || column >= COLUMNS) c", "row > ROWS) c"),
    "another column": ("forward", "line(column_lane, j);\n      if", "line(column_lane, j + 1);\n      if"),
    "sums overwritten": ("gradient_x", "__syncthreads();  // everyone has read", "// everyone has read"),
    "sums too early": ("gradient_y", "b.store_sums(shared.sums);\n      __syncthreads();",
                       "b.store_sums(shared.sums);"),
    "no correction": ("gradient_x", "-= 0.5f * weights.at[i]", "-= 0.0f * weights.at[i]"),
    "the other side": ("gradient_y", "other - held[i][j]", "held[i][j] - other"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernels_are_caught(name, tmp_path):
    reason = gpu_emulator.unavailable()
    if reason:
        pytest.skip(reason)
    method, before, after = MUTATIONS[name]

    def mutate(text):
        assert text.count(before) == 1
        return text.replace(before, after)

    rule = None if method == "forward" else "hardtanh"
    # A correction after eight of nine chunks, and at once another; operands that need every loop.
    arrays = operands(method, 1, 21, 18, 140, "float32", "offset" if name == "the other side" else "normal")
    call = call_of(method, rule, arrays, kernels.Tile(4, 9, 4, 4, 16, 8, 1))
    with pytest.raises((AssertionError, gpu_emulator.EmulationError)):
        (actual,) = gpu_emulator.emulate(tmp_path, [call], mutate)
        assert np.all(np.isfinite(actual))
        reference.assert_within(actual, *expectation(method, rule, *arrays), name)


# What a ViT asks of the kernels: method, rule, batch, rows, columns, terms.
VIT = {
    "forward of a dense layer": ("forward", None, 1, 50432, 1536, 384),
    "forward of a small one": ("forward", None, 1, 1024, 768, 192),
    "forward of attention, 197 tokens": ("forward", None, 768, 197, 197, 64),
    "forward of attention, 65 tokens": ("forward", None, 1024, 65, 65, 64),
    "input gradient of a dense layer": ("gradient_x", "hardtanh", 1, 50432, 384, 1536),
    "query gradient, 197 tokens": ("gradient_x", "hardtanh", 768, 197, 64, 197),
    "key gradient, 65 tokens": ("gradient_y", "hardtanh", 1024, 64, 65, 65),
    "true input gradient": ("gradient_x", "sign", 1, 50432, 192, 768),
}
WORDS = {  # of four bytes
    "bytes of a dense layer": ("forward", None, 1, 50432, 1536, 96),
    "bytes of attention, 197 tokens": ("forward", None, 768, 197, 197, 16),
}


def problem(method, rule, *lengths, dtype="float32"):
    rule = canonical_rule(rule, "rule") if rule else None
    return kernels.Problem(method, rule, *lengths, (dtype,) * (2 if method == "forward" else 3))


def compiled(problem, tile, folder, architecture):
    """The kernel's machine code, by nvcc and ptxas; beside it what ptxas says of it, as .txt."""
    (folder / "kernel.cu").write_text(kernels.source(problem, tile))
    nvcc = f"nvcc -std=c++17 -ptx -arch=compute_{kernels.ARCHITECTURE} kernel.cu -o kernel.ptx"
    subprocess.run(nvcc.split(), cwd=folder, check=True, capture_output=True)
    ptx = folder / "kernel.ptx"
    ptx.write_text(kernels.with_oldest_version(ptx.read_text()))
    ptxas = ["ptxas", f"-arch={architecture}", "-v", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(ptxas, cwd=folder, check=True, capture_output=True, text=True).stderr
    (folder / "kernel.txt").write_text(report)
    return folder / "kernel.cubin"


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", [*VIT, *WORDS])
def test_kernels_compile_without_spills(name, tmp_path):
    if shutil.which("nvcc") is None or shutil.which("ptxas") is None:
        pytest.skip("no nvcc and ptxas on the PATH")
    wanted = problem(*VIT[name]) if name in VIT else problem(*WORDS[name], dtype="uint32")
    tile = kernels.choose_tile(wanted)
    for architecture in ("sm_80", "sm_90a"):
        report = compiled(wanted, tile, tmp_path, architecture).with_suffix(".txt").read_text()
        assert " 0 bytes spill stores, 0 bytes spill loads" in report, report
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        assert registers * tile.threads * tile.blocks_per_sm <= 65536
        shared = int(re.search(r"(\d+) bytes smem", report)[1])
        assert shared * tile.blocks_per_sm <= 164 * 1024, "the multiprocessor of an A100 holds fewer blocks"


@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", ["forward of a dense layer", "input gradient of a dense layer"])
def test_loops_consist_of_arithmetic(name, tmp_path):
    if kernels.unavailable():
        pytest.skip(kernels.unavailable())
    if shutil.which("ptxas") is None or gpu_sass.disassembler() is None:
        pytest.skip("no ptxas on the PATH or no nvdisasm there or in nvidia-cuda-nvdisasm")
    wanted = problem(*VIT[name])
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(kernels.compile_ptx(kernels.source(wanted, kernels.choose_tile(wanted))))
    ptxas = ["ptxas", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    subprocess.run(ptxas, cwd=tmp_path, check=True, capture_output=True)
    assert gpu_sass.arithmetic_share(tmp_path / "kernel.cubin") > 0.92


@pytest.mark.gpu_compile
def test_bytes_are_four_terms_an_instruction(tmp_path):
    if shutil.which("nvcc") is None or shutil.which("ptxas") is None or gpu_sass.disassembler() is None:
        pytest.skip("no nvcc, ptxas or nvdisasm on the PATH")
    wanted = problem("forward", None, 1, 50432, 1536, 96, dtype="uint32")
    tile = kernels.choose_tile(wanted)
    loop = gpu_sass.longest_loop(compiled(wanted, tile, tmp_path, "sm_90a"))
    sums = [opcode for opcode in loop if opcode == "VABSDIFF4.U8.ACC"]
    assert len(sums) == tile.micro_rows * tile.micro_columns * tile.depth and len(sums) > 0.85 * len(loop)


@pytest.mark.gpu_compile
def test_nvrtc_compiles_for_every_dtype():
    if kernels.unavailable():
        pytest.skip(kernels.unavailable())
    for dtype in reference.DTYPES:
        for method in ("forward", "gradient_x", "gradient_y"):
            small = problem(method, None if method == "forward" else "hardtanh", 2, 5, 7, 9, dtype=dtype)
            ptx = kernels.compile_ptx(kernels.source(small, kernels.choose_tile(small)))
            assert f".version {kernels.PTX_VERSION}\n.target sm_{kernels.ARCHITECTURE}" in ptx
            assert f".entry {kernels.KERNEL_NAME}(" in ptx


@pytest.mark.parametrize("name", VIT)
def test_tiles_fit(name):
    wanted = problem(*VIT[name])
    for tile in kernels.candidates(wanted):
        assert 32 <= tile.threads <= 256
        last_split = tile.split_terms(wanted) * (tile.splits - 1)
        assert last_split < wanted.terms <= last_split + tile.split_terms(wanted)
        assert tile.split_terms(wanted) % tile.depth == 0
    assert kernels.choose_tile(wanted).blocks(wanted) >= 132, "an H200 would be idle in part"


def test_huge_grids_stay_below_the_limit_of_an_axis():
    tile = kernels.choose_tile(problem("forward", None, 1 << 20, 197, 197, 64))
    assert tile.blocks(problem("forward", None, 1 << 20, 197, 197, 64)) < 2**31


# --- as a JAX primitive ---


def fake_ptx(source):
    constants = dict(re.findall(r"(?m)^#define (\w+) (\S+)", source))
    return '.version 6.3\n\t"' + " ".join(constants[name] for name in ("ROWS", "COLUMNS", "TERMS")) + '"\\'


@pytest.fixture
def any_machine(monkeypatch):
    """NVRTC replaced, so that lowering needs nothing installed."""
    monkeypatch.setattr(kernels, "unavailable", lambda: None)
    monkeypatch.setattr(kernels, "compile_ptx", fake_ptx)


def specs(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lowered(function, *arguments, platforms=("cuda",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def test_lowering_for_cuda_holds_the_call(any_machine):
    def run(x, y, g):
        rule = Rule("hardtanh")
        return _gpu.forward(x, y), _gpu.gradient_x(x, y, g, rule), _gpu.gradient_y(x, y, g, rule)

    traced = jax.jit(run).trace(*specs((3, 65, 64), (3, 64, 60), (3, 65, 60)))
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    main = module.body.operations[0].regions[0].blocks[0]
    calls = [op for op in main if op.name == "stablehlo.custom_call"]
    expected = (((0, 1), "65 60 64"), ((2, 1, 0), "65 64 60"), ((0, 2, 1), "64 60 65"))
    assert len(calls) == len(expected)
    for call, (arguments, lengths) in zip(calls, expected):
        assert list(call.operands) == [main.arguments[i] for i in arguments]
        assert call.attributes["call_target_name"].value == "__gpu$xla.gpu.ptx"
        # As XLA reads it.
        config = mlir.ir.Attribute.parse(call.attributes["backend_config"].value, module.context)
        assert config["kernel_data"].value == f'.version 6.3\n\t"{lengths}"\\'
        assert config["block_x"].value >= 32 and config["grid_x"].value >= 3


def test_the_kernels_are_what_runs_on_cuda_by_default(any_machine):
    def run(x, y):
        out, pull = jax.vjp(adder_matmul, x, y)
        return out, *pull(out)

    # The result, and the gradient of x; that of the templates is a product.
    assert lowered(run, *specs((70, 64), (64, 60))).count("__gpu$xla.gpu.ptx") == 2
    assert "__gpu$xla.gpu.ptx" not in lowered(run, *specs((70, 64), (64, 60)), platforms=("cpu",))


def test_nothing_is_compiled_for_other_platforms(any_machine, monkeypatch):
    def explode(source):
        raise AssertionError("compiled")

    monkeypatch.setattr(kernels, "compile_ptx", explode)
    run = functools.partial(jax.lax.platform_dependent, cuda=_gpu.forward, default=_reference.forward)
    arguments = specs((5, 6), (6, 7))
    assert "xla.gpu.ptx" not in lowered(run, *arguments, platforms=("cpu",))
    with pytest.raises(AssertionError, match="compiled"):
        lowered(run, *arguments)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs.*lowered for tpu"):
        lowered(lambda x, y: _gpu.forward(x, y), *arguments, platforms=("tpu",))


def test_exports_hold_xla_operations_only(any_machine):
    run = functools.partial(jax.lax.platform_dependent, cuda=_gpu.forward, default=_reference.forward)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda"])(*specs((5, 6), (6, 7)))
    assert "xla.gpu.ptx" not in exported.mlir_module()
    x, y, _ = operands("forward", 1, 5, 7, 6, "float32", "normal")
    np.testing.assert_allclose(exported.call(x[0], y[0]), reference.forward(x, y)[0][0], rtol=1e-5)


def test_refusals(any_machine, monkeypatch):
    assert _gpu.refuses(*specs((5, 6), (6, 7))) is None
    rows, *_ = jax.export.symbolic_shape("rows")
    assert "shapes must be known" in _gpu.refuses(*specs((rows, 6), (6, 7)))
    assert "no axis may be longer" in _gpu.refuses(*specs((2**30 + 1, 6), (6, 7)))
    monkeypatch.setattr(kernels, "unavailable", lambda: "no compiler")
    assert _gpu.refuses(*specs((5, 6), (6, 7))) == "no compiler"


def test_unknown_versions_of_jax_and_a_missing_compiler_are_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))
    assert "internal to XLA" in kernels.unavailable.__wrapped__()
    monkeypatch.undo()

    def missing():
        raise OSError

    monkeypatch.setattr(kernels, "_nvrtc", missing)
    assert 'pip install "jax[cuda13]"' in kernels.unavailable.__wrapped__()


@pytest.fixture
def on_cpu(any_machine, monkeypatch):
    """The primitive lowered for the CPU, with the reference in the place of the kernel."""

    def launch(problem, tile, *arrays):
        if problem.operation == "bytes":
            return _reference.forward(*_gpu.unpacked(*arrays)).astype(jnp.int32)
        rule = () if problem.rule is None else (problem.rule,)
        if problem.method == "gradient_y":
            x, y, g = (jnp.swapaxes(array, -1, -2) for array in arrays)
            return jnp.swapaxes(_reference.gradient_x(y, x, g, *rule), -1, -2)
        return getattr(_reference, problem.method)(*arrays, *rule)

    monkeypatch.setattr(_gpu, "launch", launch)
    mlir.register_lowering(_gpu._adder_p, _gpu._lower, platform="cpu")
    yield
    del mlir._platform_specific_lowerings["cpu"][_gpu._adder_p]


METHODS = [("forward", ()), ("gradient_x", (Rule("hardtanh"),)), ("gradient_y", (Rule("sign"),))]


def check(method, rule, actual, x, y, g):
    name = rule[0].kind if rule else None
    value, terms = expectation(method, name, *(np.asarray(array) for array in (x, y, g)))
    reference.assert_within(np.asarray(actual), value, terms, method)


def used(method, x, y, g):
    return (x, y) if method == "forward" else (x, y, g)


@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_batches_fold_and_vmap(on_cpu, method, rule):
    x, y, g = operands("forward", 4, 5, 7, 6, "float32", "normal")
    function = lambda *arrays: getattr(_gpu, method)(*arrays, *rule)  # noqa: E731
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
def test_empty_operands(on_cpu, method, rule):
    for m, k, n in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, y, g = jnp.ones((m, k)), jnp.ones((k, n)), jnp.ones((m, n))
        check(method, rule, getattr(_gpu, method)(*used(method, x, y, g), *rule), x, y, g)


SHARDINGS = {
    "rows": (("i", None), (None, None), ("i", None)),
    "columns": ((None, None), (None, "i"), (None, "i")),
    "contracted": ((None, "i"), ("i", None), (None, None)),
    "one side only": (("i", None), ("i", None), (None, "i")),
}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_partitioned_by_the_compiler(on_cpu, method, rule, sharding):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [array[0] for array in operands("forward", 1, 8, 6, 10, "float32", "normal")]
    placed = [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
        for array, axes in zip(arrays, SHARDINGS[sharding])
    ]
    function = lambda *arrays: getattr(_gpu, method)(*arrays, *rule)  # noqa: E731
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*used(method, *placed)).compile()
    check(method, rule, compiled(*used(method, *placed)), *arrays)
    text = compiled.as_text()
    if (sharding, method) in (("rows", "forward"), ("rows", "gradient_x"), ("columns", "forward")):
        assert "all-gather" not in text and "all-reduce" not in text
    if (sharding, method) in (("contracted", "forward"), ("rows", "gradient_y"), ("columns", "gradient_x")):
        assert "all-gather" not in text and "all-reduce" in text


def test_without_a_mesh_the_compiler_partitions_the_xla_form(on_cpu, monkeypatch, caplog):
    def launch(*arguments):
        raise AssertionError("a kernel in a program that the compiler would replicate")

    monkeypatch.setattr(_gpu, "launch", launch)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y, _ = (array[0] for array in operands("forward", 1, 8, 6, 10, "float32", "normal"))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("i", None)))
    actual = jax.jit(lambda x, y: _gpu.forward(x, y))(rows, y)
    np.testing.assert_allclose(actual, reference.forward(x, y)[0], rtol=1e-5)
    assert "name the mesh with jax.set_mesh" in caplog.text
    # Under a shard_map over some axes, XLA partitions over the others.
    mesh = jax.make_mesh((1, 2), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("i")
    partly = jax.shard_map(_gpu.forward, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"i"})
    np.testing.assert_allclose(jax.jit(partly)(x, y), reference.forward(x, y)[0], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("method", "rule"), METHODS)
def test_under_shard_map(on_cpu, method, rule, check_vma):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = operands("forward", 2, 8, 6, 10, "float32", "normal")
    spec = PartitionSpec("i")

    def function(*arrays):
        result = getattr(_gpu, method)(*arrays, *rule)
        if check_vma:
            assert jax.typeof(result).manual_axis_type.varying == {"i"}
        return result

    run = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    check(method, rule, jax.jit(run)(*used(method, *arrays)), *arrays)


# --- integers ---


def integer_operands(*lengths, dtype=np.int8):
    *batch, m, k, n = lengths
    random, ends = np.random.default_rng(k), np.iinfo(dtype)
    return [random.integers(ends.min, ends.max + 1, (*batch, *s), dtype) for s in ((m, k), (k, n))]


def named(x, y):
    return adder_matmul(x, y, implementation="gpu")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1), (5, 7, 6), (3, 9, 13, 4), (2, 3, 4, 8, 5), (3, 0, 4), (0, 3, 4)]
)
def test_integers_take_the_kernel_of_bytes_where_it_is_named(on_cpu, monkeypatch, lengths, dtype):
    launched = []
    launch = _gpu.launch
    monkeypatch.setattr(
        _gpu, "launch", lambda problem, *rest: launched.append(problem) or launch(problem, *rest)
    )
    x, y = integer_operands(*lengths, dtype=dtype)
    found = jax.jit(named)(x, y)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, exact_sums(x, y))
    if 0 not in lengths:
        (problem,) = launched
        assert problem.operation == "bytes" and problem.terms == -(-lengths[-2] // 4)
    # Not where it is left to us to choose, nor where int8 meets uint8.
    launched.clear()
    np.testing.assert_array_equal(jax.jit(adder_matmul)(x, y), exact_sums(x, y))
    assert not any(problem.operation == "bytes" for problem in launched)
    np.testing.assert_array_equal(named(x, y.view(np.uint8)), exact_sums(x, y.view(np.uint8)))
    assert dtype == np.uint8 or not any(problem.operation == "bytes" for problem in launched)


def test_batches_of_integers_fold_and_vmap(on_cpu):
    x, y = integer_operands(4, 5, 7, 6)
    np.testing.assert_array_equal(jax.vmap(named)(x, y), exact_sums(x, y))
    np.testing.assert_array_equal(jax.vmap(named, (0, None))(x, y[0]), exact_sums(x, y[:1]))
    np.testing.assert_array_equal(named(x, y[0]), exact_sums(x, y[:1]))
    np.testing.assert_array_equal(named(x[0], y), exact_sums(x[:1], y))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_integers_partitioned_by_the_compiler(on_cpu, sharding):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = integer_operands(8, 16, 10)
    placed = [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
        for array, axes in zip(arrays, SHARDINGS[sharding])
    ]
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(named)(*placed), exact_sums(*arrays))
    # Without a mesh the compiler partitions the plain form.
    np.testing.assert_array_equal(jax.jit(lambda x, y: named(x, y))(*placed), exact_sums(*arrays))


def test_exported_integers_hold_xla_operations_only(any_machine):
    x, y = integer_operands(5, 7, 6)
    exported = jax.export.export(jax.jit(named), platforms=["cuda"])(*specs(x.shape, y.shape, dtype=jnp.int8))
    assert "xla.gpu.ptx" not in exported.mlir_module()
    assert "xla.gpu.ptx" in lowered(named, x, y)
    assert exported.out_avals[0].dtype == jnp.int32
