"""Compiles CUDA kernels for the CPU, through gpu_emulation.h, and runs them on NumPy arrays."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from adderflax.operators import _gpu_kernels as kernels

HEADER = Path(__file__).with_name("gpu_emulation.h")
_FLAGS = "-std=c++17 -O0 -march=native -ffp-contract=off -w".split()
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class EmulationError(RuntimeError):
    """The sanitizers or the scheduler of the emulation found a fault; their report."""


def require() -> None:
    """Skips the test where kernels cannot be emulated."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    command = ["g++", *_SANITIZERS, "-x", "c++", "-", "-o", "/dev/null"]
    tried = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    if tried.returncode:
        pytest.skip("g++ has no address and undefined behaviour sanitizers")


def emulate(folder: Path, calls, edit=lambda text: text) -> list[np.ndarray]:
    """Runs kernels, each in two orders of its threads.

    Args:
        folder: for the program and its files.
        calls: (problem, tile, arrays A, B and, for gradients, H in their dtypes).
        edit: applied to the CUDA source of each, for mutations.

    Returns:
        The results [batch, rows, columns] in float32, of bytes int32; infinite where the orders disagree.

    Raises:
        EmulationError: a kernel left its arrays or its threads their barriers.
    """
    units = [
        _unit(i, problem, tile, edit(kernels.source(problem, tile)))
        for i, (problem, tile, _) in enumerate(calls)
    ]
    output = run_units(folder, units, [array for _, _, operands in calls for array in operands])
    results = []
    for problem, tile, _ in calls:
        shape = (tile.splits, problem.batch, problem.rows, problem.columns)
        taken, output = np.split(output, [np.prod(shape)])
        results.append(taken.view(problem.result_dtype).reshape(shape).sum(0, dtype=problem.result_dtype))
    return results


def run_units(folder: Path, units: list[str], arrays: list[np.ndarray]) -> np.ndarray:
    """Compiles and runs C++ that defines problem_0::run, problem_1::run, ...

    Args:
        arrays: what they read, in order.

    Returns:
        What they write, in order.

    Raises:
        EmulationError: a kernel left its arrays or its threads their barriers.
    """
    runs = "\n".join(f"  problem_{i}::run(input, output);" for i in range(len(units)))
    main = (
        'int main(int, char** names) {\n  std::FILE* input = std::fopen(names[1], "rb");\n'
        f'  std::FILE* output = std::fopen(names[2], "wb");\n{runs}\n  std::fclose(output);\n}}\n'
    )
    program, source = folder / "kernels", folder / "kernels.cc"
    source.write_text("\n".join(['#include "gpu_emulation.h"', *units, main]))
    command = ["g++", *_FLAGS, *_SANITIZERS, f"-I{HEADER.parent}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)

    (folder / "input").write_bytes(b"".join(array.tobytes() for array in arrays))
    ran = subprocess.run([program, folder / "input", folder / "output"], capture_output=True, text=True)
    if ran.returncode != 0:
        raise EmulationError(ran.stderr[-3000:])
    return np.fromfile(folder / "output", np.float32)


def _unit(index: int, problem: kernels.Problem, tile: kernels.Tile, text: str) -> str:
    """A kernel in a namespace of its own, and the reading and writing of its arrays."""
    constants = re.findall(r"(?m)^#define (\w+)", text.partition("\n//")[0])
    lengths = {"A": "ROWS * TERMS", "B": "COLUMNS * TERMS", "H": "ROWS * COLUMNS"}
    names = "ABH"[: len(problem.dtypes)]
    reads = "\n".join(
        f"  auto {name} = emulation::read<{name}_TYPE>(input, size_t(BATCH) * {lengths[name]});"
        for name in names
    )
    arguments = ", ".join(f"{name}.data()" for name in names)
    undefine = "\n".join(f"#undef {name}" for name in constants)
    return f"""
namespace problem_{index} {{
#define {kernels.KERNEL_NAME} kernel_{index}
{text}
void run(std::FILE* input, std::FILE* output) {{
{reads}
  emulation::run(output, {tile.blocks(problem)}u, {tile.threads}u, &shared, sizeof(shared),
                 size_t(SPLITS) * BATCH * ROWS * COLUMNS,
                 [&](float* out) {{ {kernels.KERNEL_NAME}({arguments}, out); }});
}}
}}
{undefine}
#undef {kernels.KERNEL_NAME}
"""
