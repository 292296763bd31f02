"""The CUDA kernels: which tile a problem gets, the source with its constants, and its PTX.

Nothing here needs a GPU, and jax is asked for its version only.
"""

import ctypes
import functools
import importlib.util
import itertools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

from adderflax.operators.rules import Rule

KERNEL_NAME = "adder_kernel"
# Versions of jax whose CUDA plugin has been seen to hold the custom call that runs PTX.
_JAX_VERSIONS = ((0, 10, 2), (0, 12))
ARCHITECTURE = 75  # Turing, the oldest that CUDA 13 compiles for; the driver adapts PTX to newer ones
PTX_VERSION = "6.3"  # of that architecture
CPP_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16", "uint32": "bytes"}
_OPERATIONS = {"forward": 0, "hardtanh": 1, "sign": 2, "bytes": 3}

# What the model of a kernel's time assumes: an H200, and registers as ptxas hands them out.
_MULTIPROCESSORS, _SCHEDULERS = 132, 4
_RESIDENT_WARPS = {(8, 8): 12, (8, 4): 16, (4, 4): 16}
_CACHE_BYTES_PER_CLOCK, _STORE_BYTES_PER_CLOCK = 20, 16  # second-level cache, device memory
_BLOCK_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 17, 20, 25, 26, 32)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SHORTEST_SPLIT = 128
_SHARED_BYTES = 48 * 1024


class Problem(NamedTuple):
    """One call: out[b, r, c] = sum over t of a term of A[b, r, t], B[b, t, c] and H[b, r, c].

    Attributes:
        method: "forward" (A = x, B = y), "gradient_x" (A = g, B = y, H = x) or "gradient_y"
            (A = x, B = g, H = y).
        rule: of the gradients; None for the forward method.
        batch, rows, columns, terms: lengths of b, r, c, t.
        dtypes: names of the dtypes of A, B and, for gradients, H. A forward method of uint32 has four uint8
            in each term.
    """

    method: str
    rule: Rule | None
    batch: int
    rows: int
    columns: int
    terms: int
    dtypes: tuple[str, ...]

    @property
    def operation(self) -> str:
        """What the kernel computes: "forward", "bytes", or the kind of the rule."""
        if self.rule is not None:
            return self.rule.kind
        return "bytes" if self.dtypes[0] == "uint32" else "forward"

    @property
    def result_dtype(self) -> str:
        return "int32" if self.operation == "bytes" else "float32"

    @property
    def a_terms_contiguous(self) -> bool:
        """Whether A lies as [row, term] in memory."""
        return self.method != "gradient_y"

    @property
    def b_terms_contiguous(self) -> bool:
        """Whether B lies as [column, term] in memory."""
        return self.method == "gradient_x"


class Tile(NamedTuple):
    """How a problem is cut.

    Attributes:
        threads_down, threads_across: threads of a block along rows and columns.
        micro_rows, micro_columns: results of a thread, multiples of 4.
        depth: terms in shared memory at a time, a power of two from 4.
        blocks_per_sm: for how many blocks on a multiprocessor the registers must suffice.
        splits: parts into which the terms are cut, each with results of its own.
    """

    threads_down: int
    threads_across: int
    micro_rows: int
    micro_columns: int
    depth: int
    blocks_per_sm: int
    splits: int

    @property
    def threads(self) -> int:
        return _round_up(self.threads_down * self.threads_across, 32)

    @property
    def rows(self) -> int:
        return self.threads_down * self.micro_rows

    @property
    def columns(self) -> int:
        return self.threads_across * self.micro_columns

    def split_terms(self, problem: Problem) -> int:
        return _round_up(math.ceil(problem.terms / self.splits), self.depth)

    def blocks(self, problem: Problem) -> int:
        tiles = math.ceil(problem.rows / self.rows) * math.ceil(problem.columns / self.columns)
        return tiles * problem.batch * self.splits


def candidates(problem: Problem) -> list[Tile]:
    """Tiles for a problem, the fastest by the model first."""
    micros = ((8, 8), (8, 4), (4, 4)) if problem.method == "forward" else ((8, 4), (4, 4))
    found = []
    for micro, down, across in itertools.product(micros, _BLOCK_SIZES, _BLOCK_SIZES):
        # Two blocks at least share a multiprocessor: one computes while another waits.
        resident = _RESIDENT_WARPS[micro] // math.ceil(down * across / 32)
        if resident < 2:
            continue
        tile = Tile(down, across, *micro, 8 if micro == (8, 8) else 16, resident, 1)
        # One more row and column of tiles than needed would compute nothing.
        oversized = tile.rows >= 2 * max(problem.rows, 32) or tile.columns >= 2 * max(problem.columns, 32)
        if oversized or _shared_bytes(problem, tile) > _SHARED_BYTES:
            continue
        for splits in _SPLITS:
            if splits > 1 and problem.terms < splits * _SHORTEST_SPLIT:
                break
            split = tile._replace(splits=splits)
            # The last part must not be empty.
            if split.split_terms(problem) * (splits - 1) < problem.terms:
                found.append(split)
            if split.blocks(problem) > 4 * _MULTIPROCESSORS * tile.blocks_per_sm:
                break
    return sorted(found, key=lambda tile: estimated_clocks(problem, tile))


@functools.cache
def choose_tile(problem: Problem) -> Tile:
    """The first of the candidates."""
    return candidates(problem)[0]


def estimated_clocks(problem: Problem, tile: Tile) -> float:
    """Clocks from the start to the end of the kernel, by counting its instructions."""
    warps = tile.threads // 32
    # Differences of bytes are one instruction, which issues every other clock.
    math_instructions = 3 if problem.operation == "sign" else 2
    wide_reads, narrow_reads = tile.micro_rows // 4, tile.micro_columns
    if problem.columns % 4 == 0:
        wide_reads, narrow_reads = wide_reads + narrow_reads // 4, 0
    term = tile.micro_rows * tile.micro_columns * math_instructions + wide_reads + narrow_reads
    # Shared memory serves the four schedulers in turn, a wide read in up to four passes.
    term = max(term, _SCHEDULERS * (4 * wide_reads + narrow_reads))
    chunk = tile.depth * term + 25
    for lines, length, contiguous in (
        (problem.rows, tile.rows, problem.a_terms_contiguous),
        (problem.columns, tile.columns, problem.b_terms_contiguous),
    ):
        width = 4 if (problem.terms if contiguous else lines) % 4 == 0 else 1
        passes = math.ceil(length * tile.depth / width / tile.threads)
        chunk += passes * (2 + (width if contiguous else 1))
    warp = chunk * tile.split_terms(problem) / tile.depth + 200 + 4 * tile.micro_rows * tile.micro_columns

    blocks = math.ceil(tile.blocks(problem) / _MULTIPROCESSORS)  # on one multiprocessor
    rounds = math.ceil(blocks / tile.blocks_per_sm)
    # A warp that has its scheduler to itself issues at most every other clock.
    busy = max(warp * blocks * warps / _SCHEDULERS, 2 * warp * rounds)
    # Bytes move while others compute, but not for nothing: small tiles load more often.
    arriving = 4 * (tile.rows + tile.columns) * tile.split_terms(problem)
    # Unaligned results leave in runs of neighbouring threads, in sectors of 32 bytes.
    leaving = tile.rows * tile.columns * (4 if problem.columns % 4 == 0 else 4 + 32 / tile.threads_across)
    traffic = blocks * (arriving + leaving) / _CACHE_BYTES_PER_CLOCK
    results = problem.batch * problem.rows * problem.columns
    summing = 5000 + 8 * tile.splits * results / (_MULTIPROCESSORS * _STORE_BYTES_PER_CLOCK)
    return busy + traffic / 4 + 2000 + (summing if tile.splits > 1 else 0)


def _shared_bytes(problem: Problem, tile: Tile) -> int:
    """An upper bound of the shared memory of a block, in step with Operand in the CUDA source."""
    lines = 0
    for length, count, contiguous in (
        (tile.rows, problem.rows, problem.a_terms_contiguous),
        (tile.columns, problem.columns, problem.b_terms_contiguous),
    ):
        width = 4 if (problem.terms if contiguous else count) % 4 == 0 else 1
        if contiguous:
            lines += _round_up(length, tile.threads * width // tile.depth) + 8
        else:
            lines += _round_up(length, tile.threads * width if length > tile.threads * width else 1)
    sums = 0 if problem.method == "forward" else tile.depth
    return 4 * lines * (2 * tile.depth + sums)


def _round_up(value: int, step: int) -> int:
    return math.ceil(value / step) * step


@functools.cache
def with_constants(name: str, **constants: object) -> str:
    """A CUDA source of this folder, with its constants and what all sources share before it."""
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    common, text = (Path(__file__).with_name(file).read_text() for file in ("_gpu_common.cu", name))
    return defines + common + text


def half_slope(rule: Rule | None) -> str:
    """The factor of a difference whose clip, or sign, is twice a saturation, less one."""
    # Any difference that is not subnormal saturates after this factor: its sign remains.
    return f"{2.0**127 if rule is None or rule.kind == 'sign' else rule.slope / 2:.9e}f"


def source(problem: Problem, tile: Tile) -> str:
    """The CUDA C++ of a problem: constants, then the text that all problems share."""
    constants = {
        "OPERATION": _OPERATIONS[problem.operation],
        "WEIGHT_IS_A": int(problem.method == "gradient_x"),
        "BATCH": problem.batch,
        "ROWS": problem.rows,
        "COLUMNS": problem.columns,
        "TERMS": problem.terms,
        "SPLITS": tile.splits,
        "SPLIT_TERMS": tile.split_terms(problem),
        "THREADS_DOWN": tile.threads_down,
        "THREADS_ACROSS": tile.threads_across,
        "MICRO_ROWS": tile.micro_rows,
        "MICRO_COLUMNS": tile.micro_columns,
        "DEPTH": tile.depth,
        "BLOCKS_PER_SM": tile.blocks_per_sm,
        "A_TERMS_CONTIGUOUS": str(problem.a_terms_contiguous).lower(),
        "B_TERMS_CONTIGUOUS": str(problem.b_terms_contiguous).lower(),
        "HALF_SLOPE": half_slope(problem.rule),
    }
    for letter, dtype in zip("ABH", problem.dtypes):
        constants[f"{letter}_TYPE"] = CPP_TYPES[dtype]
    return with_constants("_gpu_kernels.cu", **constants)


@functools.cache
def unavailable() -> str | None:
    """Why no kernel can be compiled here, or None."""
    oldest, end = _JAX_VERSIONS
    if not oldest <= jax.__version_info__ < end:
        return (
            f"the CUDA kernels run through a custom call that is internal to XLA and known from jax "
            f"{'.'.join(map(str, oldest))} to below {'.'.join(map(str, end))}, not in {jax.__version__}"
        )
    try:
        _nvrtc()
    except OSError:
        return (
            "NVIDIA's run-time compiler, libnvrtc, was not found in the packages nvidia-cuda-nvrtc "
            "or nvidia-cuda-nvrtc-cu12, under CUDA_HOME or CUDA_PATH, or by the dynamic linker; "
            'install it with pip install "jax[cuda13]"'
        )
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Loads libnvrtc; raises OSError where there is none."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        folders += [Path(package, "cu13", "lib"), Path(package, "cuda_nvrtc", "lib")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable], "lib64"))
    found = [path for folder in folders for path in sorted(folder.glob("libnvrtc.so*"))]
    for name in (*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            library = ctypes.CDLL(str(name))
        except OSError:
            continue
        # NVRTC opens this one by name; the wheels of CUDA 13.0 do not say where it lies.
        for builtins in Path(name).parent.glob("libnvrtc-builtins.so*") if name in found else ():
            ctypes.CDLL(str(builtins))
        return library
    raise OSError("libnvrtc was not found")


@functools.cache
def compile_ptx(cuda_source: str) -> str:
    """PTX that every driver and GPU from Turing on takes.

    Raises:
        RuntimeError: NVRTC rejects the source, with its log.
    """
    library, program = _nvrtc(), ctypes.c_void_p()

    def read(kind: str) -> str:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{kind}")(program, text)
        return text.value.decode()

    status = library.nvrtcCreateProgram(
        ctypes.byref(program), cuda_source.encode(), b"adder.cu", 0, None, None
    )
    if status != 0:
        raise RuntimeError(f"NVRTC could not start: nvrtcCreateProgram returned {status}.")
    try:
        options = (f"--gpu-architecture=compute_{ARCHITECTURE}", "--std=c++17", "-diag-suppress=177")
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments) != 0:
            raise RuntimeError(
                f"NVRTC could not compile an adder kernel; choose implementation='xla' instead. Its "
                f"log:\n{read('ProgramLog')}"
            )
        return with_oldest_version(read("PTX"))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def with_oldest_version(ptx: str) -> str:
    """PTX that says it is of the version its instructions need, not of the compiler's.

    A driver rejects PTX of a newer version than its own, and NVRTC's wheels are often newer. Their
    hint that a vector is loaded of which not every element is used is newer as well.
    """
    ptx = re.sub(r'(?m)^\s*\.pragma "used_bytes_mask[^"]*";\n', "", ptx)
    return re.sub(r"(?m)^\.version .*$", f".version {PTX_VERSION}", ptx, count=1)
