"""Speed of the adder operators on the shapes of vision transformers, beside torch and multiplication.

    python -m benchmarks.operators                         every case; 6 minutes on 2 CPU cores
    python -m benchmarks.operators --batches 1,8 --only scores
    python -m benchmarks.operators --page                  rewrite results/operators.md from the files there

An element is one term |x[m, k] - y[k, n]|. Times are medians of runs that alternate in one process. On a CPU
"kernels" is implementation="cpu", where a compiler builds it, and sums of int8 are timed too.
Results go to results/operators/NAME.json, one file a machine, and from there to results/operators.md.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adderflax import adder_matmul, pipes
from adderflax.operators._dispatch import unavailable
from benchmarks.operators_page import write_page
from benchmarks.timing import alternate, device_limits, limit_loop, machine, whole_rows

RESULTS = Path("results/operators")
# (K, N) of the linear layers of Ti, S and B: projections, and the two layers of the MLP.
LINEAR = [(192, 192), (192, 768), (768, 192), (384, 384), (384, 1536), (1536, 384), (768, 768)]
TOKENS, HEAD_WIDTH = (65, 197), 64
HEADS = 6
# Shapes at which torch.cdist and a hand-written loop were compared before this project began.
COMPARED = [(1024, 192, 768), (4096, 192, 192)]


class Case(NamedTuple):
    """x [*batch, M, K] against y [*batch, K, N]; `lengths` is (*batch, M, K, N)."""

    kind: str
    batch: int
    tokens: int
    lengths: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)


def cases(batches: tuple[int, ...], only: tuple[str, ...]) -> Iterator[Case]:
    """Linear layers on 197 tokens an image, and the scores of 6 heads."""
    for lengths in COMPARED if "linear" in only else ():
        yield Case("rows", 1, lengths[0], lengths)
    for batch in batches:
        for k, n in LINEAR if "linear" in only else ():
            yield Case("linear", batch, 197, (batch * 197, k, n))
        for tokens in TOKENS if "scores" in only else ():
            yield Case("scores", batch, tokens, (batch * HEADS, tokens, HEAD_WIDTH, tokens))


def measure(case: Case, limits: tuple[float, float] | None) -> Iterator[dict[str, Any]]:
    """One record for each method and contender of the case."""
    *batch, m, k, n = case.lengths
    random = np.random.default_rng(case.elements)
    x, y, g = (random.standard_normal((*batch, *shape), np.float32) for shape in ((m, k), (k, n), (m, n)))
    for method, contenders in _contenders(case, x, y, g).items():
        limit = None if limits is None else {"forward": limits[0], "input gradient": limits[1]}.get(method)
        times = alternate(contenders)
        if "limit loop" in times:  # on this shape and at this time, rather than before
            times["limit loop"] *= m / whole_rows(m)
            limit = case.elements / times["limit loop"]
        for name, seconds in times.items():
            rate = case.elements / seconds
            yield {
                **case._asdict(),
                "method": method,
                "contender": name,
                "seconds": seconds,
                "elements_per_second": rate,
                "share_of_limit": None if limit is None or name == "multiply" else rate / limit,
            }


def _contenders(case, x, y, g) -> dict[str, dict[str, Callable[[], Any]]]:
    operands = tuple(map(jnp.asarray, (x, y, g)))
    # Both sides of the scores are activations; a layer's weights take the exact difference.
    adder = functools.partial(adder_matmul, grad_y="hardtanh" if case.kind == "scores" else "full")
    multiply = functools.partial(jnp.matmul, precision="highest")
    methods = {
        "forward": lambda f, x, y, g: f(x, y),
        "input gradient": lambda f, x, y, g: jax.vjp(lambda x: f(x, y), x)[1](g),
        "whole backward": lambda f, x, y, g: jax.vjp(f, x, y)[1](g),
    }
    found = {
        method: {
            name: functools.partial(jax.jit(functools.partial(run, f)), *operands)
            for name, f in (("adderflax", adder), ("multiply", multiply))
        }
        for method, run in methods.items()
    }
    if len(case.lengths) == 3:
        rows, depth, columns = case.lengths
        if loop := limit_loop(whole_rows(rows), depth, columns):
            found["forward"]["limit loop"] = loop
    if jax.devices()[0].platform == "cpu":
        if unavailable("cpu") is None:
            by_kernels = functools.partial(adder, implementation="cpu")
            for method, run in methods.items():
                run = jax.jit(functools.partial(run, by_kernels))
                found[method]["kernels"] = functools.partial(run, *operands)
            found["int8"] = _int8(x, y, found["forward"]["multiply"])
        # Above these sizes a single call takes more than a second.
        if case.elements <= 3e9:
            found["forward"] |= _torch_forward(x, y)
        if case.elements <= 5e8:
            found["input gradient"] |= _torch_gradient(x, y, g)
    return found


def _int8(x, y, multiply):
    """Sums of int8 by either implementation, beside products in float32, and in int8 by torch."""
    x, y = (np.clip(np.round(32 * array), -128, 127).astype(np.int8) for array in (x, y))
    operands = tuple(map(jnp.asarray, (x, y)))
    adders = {"adderflax": adder_matmul, "kernels": functools.partial(adder_matmul, implementation="cpu")}
    found = {name: functools.partial(jax.jit(adder), *operands) for name, adder in adders.items()}
    found["multiply"] = multiply
    if (torch := _torch()) is not None and x.ndim == 2:
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        found["torch int8"] = lambda: torch._int_mm(x, y)
    return found


def _torch_forward(x, y):
    if (torch := _torch()) is None:
        return {}
    x, w = torch.from_numpy(x), torch.from_numpy(y).mT.contiguous()
    return {"torch.cdist": lambda: torch.cdist(x, w, p=1.0)}


def _torch_gradient(x, y, g):
    """The HardTanh rule as the official code writes it: by broadcasting, here in parts that fit in memory."""
    if (torch := _torch()) is None:
        return {}
    x, w, g = torch.from_numpy(x), torch.from_numpy(y).mT.contiguous(), torch.from_numpy(g)

    def run():
        parts = max(1, math.ceil(x[..., :1].numel() * w.shape[-2] * w.shape[-1] / 1e8))
        for x_part, g_part in zip(x.chunk(parts, -2), g.chunk(parts, -2)):
            difference = w[..., None, :, :] - x_part[..., :, None, :]
            (difference.clamp(-1, 1) * g_part[..., None]).sum(-2)

    return {"torch broadcast": run}


@functools.cache
def _torch():
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(machine()["cores"])
    return torch


@pipes.reader_may_leave()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", default="1,8,64", help="images, separated by commas")
    parser.add_argument("--only", default="linear,scores", help="linear, scores or both")
    parser.add_argument("--name", help="of the results file; default: from the device")
    parser.add_argument("--page", action="store_true", help="only rewrite the page and the plot")
    options = parser.parse_args(arguments)
    only = tuple(options.only.split(","))
    if unknown := set(only) - {"linear", "scores"}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is unknown; allowed are linear and scores.")
    try:
        batches = tuple(int(batch) for batch in options.batches.split(","))
    except ValueError:
        parser.error(f"--batches: {options.batches!r} is not a list of numbers such as 1,8,64.")
    if not options.page:
        about = machine()
        limits = device_limits()
        records = []
        print(about, "limits:", limits and [f"{limit / 1e9:.1f} G/s" for limit in limits], flush=True)
        for case in cases(batches, only):
            for record in measure(case, limits):
                records.append(record)
                print(_line(record), flush=True)
        name = options.name or "_".join(f"{about['device']} x{about['cores']}".split())
        RESULTS.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.operators " + " ".join(arguments or sys.argv[1:])
        file = RESULTS / f"{name}.json"
        written = {"machine": about, "command": command.strip(), "limits": limits, "records": records}
        file.write_text(json.dumps(written, indent=1) + "\n")
        print(f"written to {file}")
    print(f"written to {', '.join(map(str, write_page(RESULTS)))}")
    return 0


def _line(record: dict[str, Any]) -> str:
    share = (
        "" if record["share_of_limit"] is None else f"{100 * record['share_of_limit']:5.1f} % of the limit"
    )
    return (
        f"{record['kind']:7s} {record['lengths']!s:24s} {record['method']:15s} {record['contender']:16s}"
        f" {1e3 * record['seconds']:10.3f} ms {record['elements_per_second'] / 1e9:8.2f} G/s {share}"
    )


if __name__ == "__main__":
    sys.exit(main())
