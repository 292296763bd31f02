"""Runs the CPU kernels, compiled with sanitizers, on ragged operands; its arguments are compiler options.

The process must preload the sanitizers' libraries: they see XLA's allocations then, and guard its arrays too.
"""

import sys

import jax
import numpy as np
from test_cpu import RULES, SHAPES, operands

from adderflax.operators import _cpu, _cpu_library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main():
    names = _cpu_library.registered(_cpu_library.built((*SANITIZERS, *sys.argv[1:])), "sanitized")
    _cpu_library.targets = lambda: names
    for shape in SHAPES:
        x, y, g = operands(*shape, 3)
        results = [_cpu.forward(x, y), _cpu.byte_distances(x.astype(np.uint8), y.astype(np.uint8))]
        for rule in RULES:
            results += [_cpu.gradient_x(x, y, g, rule), _cpu.gradient_y(x, y, g, rule)]
        jax.block_until_ready(results)
    print("clean")


if __name__ == "__main__":
    main()
