"""The CUDA kernels without a GPU: emulated, and compiled by NVIDIA's compilers."""

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
from kernel_operands import exact_sums, expectation, operands

from adderflax.operators import _gpu
from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators.rules import canonical_rule

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
    gpu_emulator.require()
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


def test_emulated_sums_of_bytes_are_exact(tmp_path):
    gpu_emulator.require()
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
    gpu_emulator.require()

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
    gpu_emulator.require()
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


def test_unknown_versions_of_jax_and_a_missing_compiler_are_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))
    assert "internal to XLA" in kernels.unavailable.__wrapped__()
    monkeypatch.undo()

    def missing():
        raise OSError

    monkeypatch.setattr(kernels, "_nvrtc", missing)
    assert 'pip install "jax[cuda13]"' in kernels.unavailable.__wrapped__()
