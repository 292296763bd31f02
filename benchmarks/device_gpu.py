"""Checks and times the CUDA kernels on a GPU: `python3 benchmarks/device_gpu.py`, under 7 minutes.

Needs jax with CUDA and numpy; torch, where installed, is timed beside. Each section runs in a
process of its own, so that one that crashes the GPU leaves the others alone; the checks, which time
nothing, run at once. Results go to $OUT/device_results.json, or ./device_results.json; the times of the dense
shapes also to operators.json beside it, to be kept as results/operators/NAME.json.

    python3 benchmarks/device_gpu.py                 checks and timings
    python3 benchmarks/device_gpu.py check-forward   one section, or several
    python3 benchmarks/device_gpu.py tune            other tiles than the chosen ones
    python3 benchmarks/device_gpu.py sanitize        small kernels under compute-sanitizer

Times are medians of rounds of many calls that rotate among sets of random operands. An element
is an (m, n, k) triple; the limits are those of an H200: 132 multiprocessors x 128 lanes x
1.98 GHz over the instructions of an element.
"""

import concurrent.futures
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from device_gpu_checks import (
    ROOT,
    attention_operands,
    attention_run,
    check,
    check_attention,
    check_bytes,
    check_convolutions,
    guarded,
    operators,
    record,
    sanitize,
)
from device_kit import reader_may_leave

TWO, THREE = 16_700e9, 11_130e9  # elements/s at two and three instructions each
FOUR_A_TURN = 66_900e9  # of bytes, four an instruction that issues every other clock
SETS = 3  # of operands, in rotation
DENSE = [(50432, 384, 1536), (50432, 1536, 384), (50432, 192, 192), (16384, 256, 512)]  # M, K, N
WHOLE_ATTENTION = [(64, 197, 6, 64), (256, 65, 3, 64), (8, 1025, 6, 64)]  # batch, tokens, heads, depth
ATTENTION = [(768, 197, 64, 197), (1024, 65, 64, 65)]  # batch, M, K, N


def median_time(function, operand_sets, seconds=0.5):
    """(median, smallest, largest) seconds of a call, rotating among operand sets."""
    import jax

    def calls(count):
        start = time.perf_counter()
        for operands in itertools.islice(itertools.cycle(operand_sets), count):
            result = function(*operands)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    calls(2 * SETS)
    count = max(2, min(2000, int(seconds / 7 / calls(SETS))))
    samples = sorted(calls(count) for _ in range(7))
    return samples[3], samples[0], samples[-1]


def random_sets(lengths, dtype="float32", scale=1.0, copies=1):
    """SETS triples (x, y, g), each a tuple of `copies` arrays, on the device."""
    import jax
    import jax.numpy as jnp

    *batch, m, k, n = lengths
    seeds = itertools.count(time.time_ns() % 2**30)

    def normal(shape, dtype):
        return (scale * jax.random.normal(jax.random.key(next(seeds)), shape)).astype(dtype)

    shapes = (((*batch, m, k), dtype), ((*batch, k, n), dtype), ((*batch, m, n), jnp.float32))
    return jax.block_until_ready(
        [tuple(tuple(normal(*s) for _ in range(copies)) for s in shapes) for _ in range(SETS)]
    )


def measure(what, lengths, function, limit, passes=1, seconds=0.5, sets=None, **extra):
    """Times function(x, y, g), prints and records it."""
    import jax

    elements = math.prod(lengths) * passes
    # Launching a program must not be what is timed: small calls are repeated inside of it.
    copies = max(1, min(16, int(1.5e9 / elements)))
    sets = sets or random_sets(lengths, copies=copies)
    copies = len(sets[0][0])
    program = jax.jit(lambda *operands: [function(*pieces) for pieces in zip(*operands)])
    report(what, lengths, elements, [t / copies for t in median_time(program, sets, seconds)], limit, **extra)


def report(what, lengths, elements, times, limit, **extra):
    median, smallest, largest = times
    rate = elements / median
    share = f"{100 * rate / limit:5.1f} %" if limit else " " * 7
    line = f"{what:42s} {lengths!s:22s} {1e3 * median:9.4f} ms {rate / 1e9:9.1f} G/s {share}"
    print(f"{line}  ({1e3 * smallest:.4f} to {1e3 * largest:.4f})", flush=True)
    record(kind="time", what=what, lengths=lengths, ms=1e3 * median, ms_range=[1e3 * smallest, 1e3 * largest],
           rate=rate / 1e9, share=limit and rate / limit, line=line, **extra)  # fmt: skip


def methods_of(lengths, exact_loop=False):
    """(name, function of x, y, g, limit, passes over the elements)."""
    import jax
    import jax.numpy as jnp

    gpu, _, _, Rule = operators()
    hardtanh, sign, limit = Rule("hardtanh"), Rule("sign"), THREE if exact_loop else TWO

    def weight_gradient(x, y, g):
        product = jnp.matmul(x.astype(jnp.float32).T, g, precision=jax.lax.Precision.HIGHEST)
        return product - y.astype(jnp.float32) * jnp.sum(g, axis=0, keepdims=True)

    def backward(x, y, g):
        dy = gpu.gradient_y(x, y, g, hardtanh) if len(lengths) == 4 else weight_gradient(x, y, g)
        return gpu.gradient_x(x, y, g, hardtanh), dy

    yield "forward", lambda x, y, g: gpu.forward(x, y), TWO, 1
    yield "input gradient, hardtanh", lambda x, y, g: gpu.gradient_x(x, y, g, hardtanh), limit, 1
    yield "input gradient, sign", lambda x, y, g: gpu.gradient_x(x, y, g, sign), THREE, 1
    if len(lengths) == 4:
        yield "key gradient, hardtanh", lambda x, y, g: gpu.gradient_y(x, y, g, hardtanh), limit, 1
    yield "whole backward", backward, None, 2 if len(lengths) == 4 else 1


def time_kernels(all_lengths, tag="", exact_loop=False, **data):
    for lengths in all_lengths:
        sets = random_sets(lengths, **data) if data else None
        for name, function, limit, passes in methods_of(lengths, exact_loop):
            what = name + tag
            guarded(f"{what} {lengths}", measure, what, lengths, function, limit, passes, 0.5, sets)


def time_variants():
    # Large operands make the hardtanh gradients take their loop of three instructions.
    time_kernels(DENSE[:1], ", |x| ~ 30", exact_loop=True, scale=30.0)
    time_kernels(DENSE[:1], ", bfloat16", dtype="bfloat16")
    operators()
    from adderflax.operators import adder_matmul, available_implementations

    if "gpu" not in available_implementations():
        print("adder_matmul has no implementation 'gpu': its own path is not timed", flush=True)
        return

    def through_the_operator(x, y, g):
        import jax

        out, vjp = jax.vjp(functools.partial(adder_matmul, implementation="gpu"), x, y)
        return out, *vjp(g)

    what = "adder_matmul and its vjp"
    guarded(what, measure, what, DENSE[0], through_the_operator, None, 3)


def time_bytes():
    """int8, of which the packing of the templates into words is a part."""
    operators()
    from adderflax.operators import adder_matmul

    def forward(x, y, g):
        return adder_matmul(x, y, implementation="gpu")

    for lengths in DENSE:
        sets = random_sets(lengths, dtype="int8", scale=40.0)
        guarded(f"int8 {lengths}", measure, "forward, int8", lengths, forward, FOUR_A_TURN, 1, 0.3, sets)


def time_xla():
    """XLA's forms of the same, and its multiply."""
    import jax.numpy as jnp

    _, _, xla, Rule = operators()
    for lengths in (DENSE[0], DENSE[2], *ATTENTION):
        for what, function, limit in (
            ("xla: multiply, float32", lambda x, y, g: jnp.matmul(x, y, precision="highest"), None),
            ("xla: forward", lambda x, y, g: xla.forward(x, y), TWO),
            ("xla: input gradient", lambda x, y, g: xla.gradient_x(x, y, g, Rule("hardtanh")), TWO),
        ):
            guarded(f"{what} {lengths}", measure, what, lengths, function, limit, 1, 0.3)


def time_whole_attention():
    """adder_attention with the fused kernels and in XLA's composed form."""
    import jax
    import numpy as np

    random = np.random.default_rng()
    for lengths, dtype in itertools.product(WHOLE_ATTENTION, ("float32", "bfloat16")):
        sets = [attention_operands(random, lengths, dtype) for _ in range(SETS)]
        batch, tokens, heads, depth = lengths
        for backward, implementation in itertools.product((False, True), ("gpu", "xla")):
            run = jax.jit(attention_run(implementation, backward=backward))
            passes = "forward and backward" if backward else "forward"
            what = f"attention {passes}, {implementation}, {dtype}"
            times = guarded(f"{what} {lengths}", median_time, run, sets, 0.3)
            if times:
                report(what, lengths, batch * heads * tokens**2 * depth, times, None)


def time_torch():
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False

    def timed(function, sets):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        samples = []
        for _ in range(6):
            start.record()
            for operands in sets:
                function(*operands)
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3 / len(sets))
        samples = sorted(samples[1:])
        return samples[2], samples[0], samples[-1]

    for lengths in (DENSE[0], DENSE[2], *ATTENTION):
        *batch, m, k, n = lengths
        shapes = ((*batch, m, k), (*batch, n, k))
        sets = [tuple(torch.randn(*shape, device="cuda") for shape in shapes) for _ in range(SETS)]
        for what, function, limit in (
            ("torch: multiply, float32", lambda x, w: x @ w.mT, None),
            ("torch: cdist(p=1)", lambda x, w: torch.cdist(x, w, p=1.0), TWO),
        ):
            times = guarded(f"{what} {lengths}", timed, function, sets)
            if times:
                report(what, lengths, math.prod(lengths), times, limit)


def tune():
    """Other tiles, to correct the model that chooses among them."""
    gpu, kernels, _, Rule = operators()
    extra = [kernels.Tile(16, 8, 8, 8, 8, 3, 1), kernels.Tile(16, 16, 8, 8, 8, 2, 1),
             kernels.Tile(16, 16, 8, 4, 16, 2, 1), kernels.Tile(16, 8, 8, 4, 16, 4, 1)]  # fmt: skip
    all_lengths = (DENSE[0], DENSE[2], DENSE[3], *ATTENTION)
    for lengths, method in itertools.product(all_lengths, ("forward", "gradient_x")):
        sets = random_sets(lengths, copies=max(1, min(16, int(1.5e9 / math.prod(lengths)))))
        count = 2 if method == "forward" else 3
        rule = None if method == "forward" else Rule("hardtanh")
        problem = gpu.problem_of(method, rule, *(operand[0] for operand in sets[0][:count]))
        ranked = kernels.candidates(problem)
        # The best of all, then the best of other micro tiles and sizes of blocks.
        others = {(tile[2:4], tile.threads): tile for tile in reversed(ranked)}
        tiles = [ranked[0], *sorted(others.values(), key=ranked.index)[:5], *extra]
        for tile in dict.fromkeys(tiles):
            what = f"{method} {tuple(tile)}"

            def call(*operands, problem=problem, tile=tile, count=count):
                return gpu.launch(problem, tile, *operands[:count])

            model = kernels.estimated_clocks(problem, tile) / 1.98e6
            guarded(what, functools.partial(measure, model_ms=model), what, lengths, call, TWO, 1, 0.2, sets)


# --- sections, each in a child ---

SECTIONS = {  # name: (function, seconds it may take, whether it runs unasked)
    "check-forward": (functools.partial(check, "forward"), 100, True),
    "check-gradient_x": (functools.partial(check, "gradient_x"), 100, True),
    "check-gradient_y": (functools.partial(check, "gradient_y"), 100, True),
    "check-attention": (check_attention, 100, True),
    "check-bytes": (check_bytes, 100, True),
    "check-convolution": (check_convolutions, 100, True),
    "time-dense": (functools.partial(time_kernels, DENSE), 90, True),
    "time-bytes": (time_bytes, 60, True),
    "time-attention": (functools.partial(time_kernels, ATTENTION), 60, True),
    "time-whole-attention": (time_whole_attention, 90, True),
    "time-variants": (time_variants, 60, True),
    "time-xla": (time_xla, 60, True),
    "time-torch": (time_torch, 40, True),
    "tune": (tune, 400, False),
    "sanitize": (sanitize, 500, False),
}


def run_section(name, results, say=print):
    """Runs a section in a child and passes its lines on; its records join the results."""
    say(f"\n== {name}")
    command = [sys.executable, __file__, "--section", name]
    tools = ("memcheck", "racecheck") if name == "sanitize" else (None,)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONUNBUFFERED": "1"}
    for tool in tools:
        started = time.time()
        child = subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, *command] if tool else command,
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        timer = threading.Timer(SECTIONS[name][1], child.kill)
        timer.start()
        for line in child.stdout:
            if line.startswith("RECORD "):
                results["records"].append({"section": name, **json.loads(line[7:])})
            else:
                say(line.rstrip("\n"))
        status, seconds = child.wait(), round(time.time() - started, 1)
        timer.cancel()
        results["sections"][name] = {"status": status, "seconds": seconds}
        say(f"== {name}: exit status {status} after {seconds} s")
    return results


def run_at_once(names, results):
    """Runs sections that time nothing side by side, and prints each one whole, in order."""

    def run(name):
        lines = []
        return lines, run_section(name, {"sections": {}, "records": []}, lines.append)

    with concurrent.futures.ThreadPoolExecutor(max(len(names), 1)) as pool:
        for lines, found in pool.map(run, names):
            print("\n".join(lines), flush=True)
            results["records"] += found["records"]
            results["sections"] |= found["sections"]


def operator_figures(results):
    """The times of the dense shapes as results/operators/NAME.json has them, for its page."""
    methods = {"forward": "forward", "input gradient, hardtanh": "input gradient"}
    methods["whole backward"] = "whole backward"
    records = [
        {"kind": "linear", "batch": 256, "tokens": found["lengths"][0] // 256, "lengths": found["lengths"],
         "method": methods[found["what"]], "contender": "adderflax", "seconds": found["ms"] / 1e3,
         "elements_per_second": found["rate"] * 1e9, "share_of_limit": found["share"]}
        for found in results["records"]
        if found["section"] == "time-dense" and found["kind"] == "time" and found["what"] in methods
    ]  # fmt: skip
    about = {
        "device": results["machine"]["gpu"].partition(",")[0],
        "platform": "cuda",
        "devices": 1,
        "cores": os.cpu_count(),
        "jax": results["machine"]["jax, jaxlib"].partition(" ")[0],
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    command = "python3 benchmarks/device_gpu.py time-dense"
    return {"machine": about, "command": command, "limits": [TWO, TWO], "records": records}


def machine():
    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"unknown: {error}"

    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total,power.limit"
    # Nothing where JAX has no NVIDIA GPU.
    versions = "import jax, jaxlib; jax.devices('cuda'); print(jax.__version__, jaxlib.__version__)"
    jax = output(sys.executable, "-c", versions)
    return {"gpu": output("nvidia-smi", query, "--format=csv,noheader"), "jax, jaxlib": jax}


@reader_may_leave()
def main(arguments):
    if arguments[:1] == ["--section"]:
        try:
            return SECTIONS[arguments[1]][0]()
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nSections: {', '.join(SECTIONS)}.")
        return
    if unknown := [name for name in arguments if name not in SECTIONS]:
        sys.exit(f"error: there is no section {unknown[0]!r}; choose among {', '.join(SECTIONS)}.")
    results = {"machine": machine(), "sections": {}, "records": []}
    if not results["machine"]["jax, jaxlib"]:
        sys.exit(
            "error: JAX finds no NVIDIA GPU here, and these kernels run on nothing else. On a machine that"
            " has one, install jax[cuda13] as the first line of requirements.txt says."
        )
    print(results["machine"], flush=True)
    path = Path(os.environ.get("OUT") or ".") / "device_results.json"
    names = arguments or [name for name, (_, _, unasked) in SECTIONS.items() if unasked]
    checks = [name for name in names if name.startswith("check-")]
    run_at_once(checks, results)
    path.write_text(json.dumps(results, indent=1))
    for name in names:
        if name not in checks:
            run_section(name, results)
            path.write_text(json.dumps(results, indent=1))
    if "time-dense" in names:
        path.with_name("operators.json").write_text(json.dumps(operator_figures(results), indent=1))

    print("\n== summary of", results["machine"])
    for found in results["records"]:
        if found["kind"] == "time":
            print(found["line"])
    for found in results["records"]:
        if found["kind"] == "failure" or not found.get("good", True):
            print("FAIL", {key: found[key] for key in ("section", "note", "what", "case") if key in found})
    checks = [found["good"] for found in results["records"] if found["kind"] == "check"]
    print(f"{sum(checks)} of {len(checks)} correctness cases are right; written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
