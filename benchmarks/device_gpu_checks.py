"""Correctness of the CUDA kernels on a GPU, against float64 on the CPU; see device_gpu.py.

Every case draws fresh operands, leaves NaN in the memory that the result is likely to get, runs
twice, which must agree bit by bit, and compares whole reductions for some rows and columns.
"""

import concurrent.futures
import functools
import itertools
import json
import math
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def record(**fields):
    """A finding; the parent collects these lines."""
    print("RECORD " + json.dumps(fields), flush=True)


@functools.cache
def operators():
    """(_gpu, _gpu_kernels, _xla, Rule) alone: the package around them would import flax."""
    package = types.ModuleType("adderflax")
    package.__path__ = [str(ROOT / "adderflax")]
    sys.modules["adderflax"] = package
    from adderflax.operators import _gpu, _gpu_kernels, _xla
    from adderflax.operators.rules import Rule

    return _gpu, _gpu_kernels, _xla, Rule


def guarded(what, function, *arguments):
    """Calls the function; a failure is reported and the next one begins."""
    try:
        return function(*arguments)
    except Exception as error:
        note = f"{type(error).__name__}: {str(error)[:400]}"
        print(f"FAIL {what}: {note}", flush=True)
        record(kind="failure", what=what, note=note)


def cases(method):
    """(lengths, rule, dtype, kind of data): edges of tiles, then anything."""
    import numpy as np

    all_lengths = [
        (1, 1, 1), (5, 3, 7), (128, 64, 64), (129, 65, 67), (131, 37, 66), (1, 192, 1000), (1000, 7, 1),
        (1024, 192, 768), (1027, 193, 771), (2, 197, 64, 197), (12, 65, 64, 65), (3, 1025, 64, 1025),
        (5, 66, 64, 62), (50432, 192, 192), (50431, 191, 190), (384, 50432, 96), (700, 17, 16, 17),
        (70000, 3, 4, 5), (300, 768, 3072), (24, 4099, 40),
    ]  # fmt: skip
    random = np.random.default_rng(len(method))
    for rank in (3, 4) * 6:
        lengths = np.exp(random.uniform(0, np.log((20, 700, 700, 700)))).astype(int)
        all_lengths.append(tuple(map(int, lengths[-rank:])))
    _, _, _, Rule = operators()
    rules = [Rule("hardtanh"), Rule("sign"), Rule("hardtanh", 4.0)] if method != "forward" else [None]
    settings = itertools.cycle(
        [("float32", "normal"), ("float32", "offset"), ("bfloat16", "normal"), ("float32", "one sign"),
         ("float16", "normal"), ("float32", "large"), ("bfloat16", "offset")]
    )  # fmt: skip
    return [
        (lengths, rule, *setting)
        for lengths, rule, setting in zip(all_lengths, itertools.cycle(rules), settings)
    ]


def draw(random, lengths, dtype, kind):
    """Fresh x [..., M, K], y [..., K, N] in the dtype and g [..., M, N] in float32."""
    import jax.numpy as jnp
    import numpy as np

    *batch, m, k, n = lengths
    x, y, g = (random.standard_normal((*batch, *shape), np.float32) for shape in ((m, k), (k, n), (m, n)))
    if kind == "offset":
        x, y = x + 1000, y + 1000
    if kind == "large":
        x, y = x * 1e6, y * 1e6
    if kind == "one sign":
        x, g = x * np.float32(1e-3), np.abs(g)
    return x.astype(jnp.dtype(dtype)), y.astype(jnp.dtype(dtype)), g


def exact(method, rule, x, y, g):
    """float64 (value, sum of the magnitudes of its terms), by definition."""
    import numpy as np

    if method == "gradient_y":
        x, y, g = y.mT, x.mT, g.mT
    if method == "forward":
        value = -np.abs(x[..., :, None, :] - y.mT[..., None, :, :]).sum(-1)
        return value, -value
    difference = y[..., None, :, :] - x[..., :, :, None]
    shaped = np.sign(difference) if rule.kind == "sign" else np.clip(rule.slope * difference, -1, 1)
    value = (shaped * g[..., :, None, :]).sum(-1)
    terms = np.broadcast_to(np.abs(g).sum(-1)[..., None], value.shape)
    return (value.mT, terms.mT) if method == "gradient_y" else (value, terms)


def some(random, length, count):
    import numpy as np

    return np.sort(random.permutation(length)[: max(1, int(count))])


def check_case(method, index, lengths, rule, dtype, kind):
    """Runs a case twice and compares a part of the result; (is right, note)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    gpu, *_ = operators()
    random = np.random.default_rng([index, time.time_ns()])
    operands = draw(random, lengths, dtype, kind)
    placed = [jax.device_put(array) for array in (operands[:2] if method == "forward" else operands)]
    static = () if rule is None else (rule,)
    run = jax.jit(lambda *arrays: getattr(gpu, method)(*arrays, *static)).lower(*placed).compile()
    shape = jax.tree.leaves(run.out_info)[0].shape
    jnp.full(shape, jnp.nan).block_until_ready()  # memory that the result is likely to get
    actual, again = np.asarray(run(*placed)), np.asarray(run(*placed))

    x, y, g = (array.astype(np.float64) for array in operands)
    if len(lengths) == 4:
        part = some(random, lengths[0], 20)
        x, y, g, compared = x[part], y[part], g[part], actual[part]
    else:
        compared = actual
    # Whole reductions, for some rows and columns of the result.
    terms = {"forward": lengths[-2], "gradient_x": lengths[-1], "gradient_y": lengths[-3]}[method]
    side = math.sqrt(12e6 / terms / max(1, x[..., 0, 0].size))
    rows, columns = some(random, shape[-2], side), some(random, shape[-1], side)
    compared = compared[..., rows, :][..., columns]
    if method == "forward":
        x, y = x[..., rows, :], y[..., columns]
    elif method == "gradient_x":
        x, y, g = x[..., rows, :][..., columns], y[..., columns, :], g[..., rows, :]
    else:
        x, y, g = x[..., rows], y[..., rows, :][..., columns], g[..., columns]
    value, magnitudes = exact(method, rule, x, y, g)
    bound = 1e-5 * np.abs(value).max() + 1e-6 * magnitudes
    worst = float(np.max(np.abs(compared - value) / np.maximum(bound, 1e-300)))
    finite, repeats = bool(np.isfinite(actual).all()), bool(np.array_equal(actual, again))
    note = f"error/bound {worst:.3f}, finite {finite}, repeats {repeats}, {value.size} compared"
    return worst <= 1 and finite and repeats, note


def check_one_buffer():
    """x and y in one buffer: XLA must still pass it to the kernel twice."""
    import jax
    import numpy as np

    gpu, *_ = operators()
    x = np.random.default_rng().standard_normal((96, 96), np.float32)
    actual = np.asarray(jax.jit(lambda x: gpu.forward(x, x))(x))
    return np.allclose(actual, exact("forward", None, *[x.astype(np.float64)] * 3)[0], rtol=1e-5), ""


def check(method):
    jobs = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, case in enumerate(cases(method)):
            jobs[pool.submit(guarded, f"{method} {case}", check_case, method, index, *case)] = str(case)
        if method == "forward":
            jobs[pool.submit(guarded, "one buffer", check_one_buffer)] = "one buffer as x and y"
        for job in concurrent.futures.as_completed(jobs):
            good, note = job.result() or (False, "raised")
            print(f"{'ok  ' if good else 'FAIL'} {method} {jobs[job]}: {note}", flush=True)
            record(kind="check", method=method, case=jobs[job], good=bool(good), note=note)


def sanitize():
    """A few small kernels of each kind."""
    import jax
    import numpy as np

    gpu, _, _, Rule = operators()
    for lengths in ((131, 37, 67), (2, 65, 64, 65), (2, 197, 16, 197), (130, 68, 300)):
        x, y, g = draw(np.random.default_rng(), lengths, "float32", "normal")
        jax.block_until_ready(jax.jit(gpu.forward)(x, y))
        for method, rule in itertools.product((gpu.gradient_x, gpu.gradient_y), ("hardtanh", "sign")):
            jax.block_until_ready(jax.jit(functools.partial(method, rule=Rule(rule)))(x, y, g))
        print("ran", lengths, flush=True)
