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


def attention_run(implementation, rules=("hardtanh", "hardtanh"), backward=True):
    """(query, key, value, g) -> the output of adder_attention and, if asked, its gradients."""
    import jax

    operators()
    from adderflax.operators import adder_attention

    def run(query, key, value, g):
        def attend(query, key, value):
            options = {"grad_query": rules[0], "grad_key": rules[1], "implementation": implementation}
            return adder_attention(query, key, value, identity=False, **options)

        if not backward:
            return (attend(query, key, value),)
        output, pull = jax.vjp(attend, query, key, value)
        return output, *pull(g.astype(output.dtype))

    return run


def attention_operands(random, lengths, dtype="float32", keys=None, value_depth=None):
    """query, key, value and the cotangent, [B, T, H, D] each, on the device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    batch, queries, heads, depth = lengths
    keys, value_depth = keys or queries, value_depth or depth
    sizes = (queries, depth), (keys, depth), (keys, value_depth), (queries, value_depth)
    shapes = [(batch, tokens, heads, size) for tokens, size in sizes]
    arrays = [random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes]
    return jax.block_until_ready([jax.device_put(array) for array in arrays])


ATTENTION_CASES = [  # [B, T, H, D], keys, depth of the values, dtype, rules
    ((1, 1, 1, 1), 1, 1, "float32", ("hardtanh", "hardtanh")),
    ((2, 17, 3, 16), 197, 33, "float32", ("sign", "hardtanh")),
    ((3, 65, 2, 33), 17, 128, "float32", (("hardtanh", 4.0), "sign")),
    ((2, 197, 2, 128), 65, 1, "float32", ("hardtanh", "hardtanh")),
    ((64, 197, 6, 64), 197, 64, "float32", ("hardtanh", "hardtanh")),
    ((256, 65, 3, 64), 65, 64, "float32", ("hardtanh", "sign")),
    ((8, 1025, 6, 64), 1025, 64, "float32", ("hardtanh", "hardtanh")),
    ((64, 197, 6, 64), 197, 64, "bfloat16", ("hardtanh", "hardtanh")),
    ((256, 65, 3, 64), 65, 64, "float16", ("sign", "hardtanh")),
]


def check_attention():
    """The fused kernels against XLA's composed form with exact multiplies."""
    import jax
    import numpy as np

    for case in ATTENTION_CASES:
        guarded(f"attention {case}", check_attention_case, jax, np, case)


def check_attention_case(jax, np, case):
    lengths, keys, value_depth, dtype, rules = case
    arrays = attention_operands(np.random.default_rng(), lengths, dtype, keys, value_depth)
    run = jax.jit(attention_run("gpu", rules))
    held = "xla.gpu.ptx" in run.lower(*arrays).as_text()
    actual, again = ([np.asarray(a, np.float32) for a in run(*arrays)] for _ in range(2))
    with jax.default_matmul_precision("highest"):
        expected = [np.asarray(a, np.float32) for a in jax.jit(attention_run("xla", rules))(*arrays)]
    # Of the largest element. The composed form rounds weights to the operands' dtype.
    allowed = 1e-4 if dtype == "float32" else 2e-2
    errors = [float(np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)) for a, e in zip(actual, expected)]
    if keys == 1:  # one key has no softmax to differentiate: its gradient is rounding
        errors = [errors[0], errors[3]]
    repeats = all(map(np.array_equal, actual, again))
    good = held and repeats and max(errors) <= allowed
    note = f"errors {[f'{error:.1e}' for error in errors]}, repeats {repeats}, kernels used {held}"
    print(f"{'ok  ' if good else 'FAIL'} attention {case}: {note}", flush=True)
    record(kind="check", method="attention", case=str(case), good=good, note=note)


BYTES = [  # M, K, N, before them a batch
    (1, 1, 1), (5, 3, 7), (129, 65, 67), (1, 192, 1000), (1000, 7, 1), (1027, 193, 771), (2, 197, 64, 197),
    (12, 65, 64, 65), (50432, 192, 192), (50431, 191, 190), (384, 50432, 96), (300, 768, 3072),
    (24, 4099, 40),
]  # fmt: skip


def check_bytes():
    """The sums of int8 and uint8, which are exact."""
    for lengths, dtype in zip(BYTES, itertools.cycle(("int8", "uint8"))):
        guarded(f"bytes {lengths} {dtype}", check_bytes_case, lengths, dtype)


def check_bytes_case(lengths, dtype):
    import jax
    import numpy as np

    operators()
    from adderflax.operators import adder_matmul

    *batch, m, k, n = lengths
    random, ends = np.random.default_rng(), np.iinfo(dtype)
    x, y = (random.integers(ends.min, ends.max + 1, (*batch, *s), dtype) for s in ((m, k), (k, n)))
    run = jax.jit(functools.partial(adder_matmul, implementation="gpu"))
    held = "xla.gpu.ptx" in run.lower(x, y).as_text()
    actual, again = np.asarray(run(x, y)), np.asarray(run(x, y))
    side = math.sqrt(12e6 / k / math.prod(batch))
    rows, columns = some(random, m, side), some(random, n, side)
    x, y, part = x[..., rows, :], y[..., columns], actual[..., rows, :][..., columns]
    expected = -np.abs(x[..., :, None, :].astype(int) - y.mT[..., None, :, :].astype(int)).sum(-1)
    good = held and bool(np.array_equal(part, expected) and np.array_equal(actual, again))
    print(f"{'ok  ' if good else 'FAIL'} bytes {lengths} {dtype}: {part.size} compared, {held=}", flush=True)
    record(kind="check", method="bytes", case=f"{lengths} {dtype}", good=good, note=f"kernels used {held}")


CONVOLUTIONS = [  # x, kernel, strides, groups, dtype, rule; the padding is one pixel on every side
    ((64, 8, 8, 512), (3, 3, 1, 512), (1, 1), 512, "float32", "hardtanh"),
    ((64, 8, 8, 512), (3, 3, 1, 512), (1, 1), 512, "bfloat16", "hardtanh"),
    ((3, 9, 7, 6), (3, 2, 1, 12), (2, 1), 6, "float32", "sign"),
    ((8, 12, 12, 32), (3, 3, 32, 64), (1, 1), 1, "float32", "hardtanh"),
    ((5, 11, 8, 12), (3, 3, 4, 9), (2, 2), 3, "float32", "sign"),
    ((2, 16, 16, 16), (3, 3, 16, 16), (1, 1), 1, "bfloat16", "hardtanh"),
]


def check_convolutions():
    """`adder_conv`, its sums of int8, and the depthwise convolution that multiplies."""
    for case in CONVOLUTIONS:
        guarded(f"convolution {case}", check_convolution, *case)


def check_convolution(x_shape, kernel_shape, strides, groups, dtype, rule):
    """Compares outputs and both gradients with float64, and the sums of integers with the exact ones."""
    import jax
    import numpy as np

    operators()
    from adderflax.operators import adder_conv
    from adderflax.operators._depthwise import depthwise_conv

    geometry = {"strides": strides, "padding": ((1, 1), (1, 1))}
    random = np.random.default_rng()
    x, kernel = (random.standard_normal(shape, np.float32) for shape in (x_shape, kernel_shape))
    x, kernel = (array.astype(jax.numpy.dtype(dtype)) for array in (x, kernel))
    adds = functools.partial(
        adder_conv, feature_group_count=groups, grad_x=rule, grad_kernel=rule, **geometry
    )
    forms = {"adds": adds}
    if kernel_shape[2] == 1:
        forms["multiplies"] = functools.partial(depthwise_conv, **geometry)
    for what, function in forms.items():
        g = random.standard_normal(jax.eval_shape(function, x, kernel).shape, np.float32)

        def run(x, kernel, g, function=function):
            out, pull = jax.vjp(function, x, kernel)
            return out, *pull(g.astype(out.dtype))

        actual, again = ([np.asarray(a, np.float64) for a in jax.jit(run)(x, kernel, g)] for _ in range(2))
        seen = np.asarray(g.astype(x.dtype), np.float64) if what == "multiplies" else g
        expected = exact_convolution(what, rule, x, kernel, seen, strides, groups)
        # Without a gradient it may be another program.
        alone = np.asarray(jax.jit(function)(x, kernel), np.float64)
        pairs = [*zip(actual, expected), (alone, expected[0])]
        errors = [np.abs(a - e).max() / np.abs(e).max() for a, e in pairs]
        # Gradients have the operands' dtype; the sums of the adding form are float32.
        rounded = 2e-2 if dtype == "bfloat16" else 1e-5
        summed = 1e-5 if what == "adds" else rounded
        bounds = [summed, rounded, rounded, summed]
        # The libraries' sums may differ from run to run; ours may not.
        repeats = all(map(np.array_equal, actual, again))
        good = repeats and all(error <= bound for error, bound in zip(errors, bounds))
        note = f"errors {[f'{error:.1e}' for error in errors]}, repeats {repeats}"
        case = f"{what} {(x_shape, kernel_shape, strides, groups, dtype, rule)}"
        print(f"{'ok  ' if good else 'FAIL'} convolution {case}: {note}", flush=True)
        record(kind="check", method="convolution", case=case, good=bool(good), note=note)
    x, kernel = (random.integers(-128, 128, shape, np.int8) for shape in (x_shape, kernel_shape))
    sums = np.asarray(jax.jit(adds)(x, kernel))
    expected = exact_convolution("adds", rule, x, kernel, np.zeros(sums.shape), strides, groups)[0]
    good = bool(np.array_equal(sums, expected))
    print(f"{'ok  ' if good else 'FAIL'} convolution of int8 {x_shape, kernel_shape}", flush=True)
    record(kind="check", method="convolution", case=f"int8 {x_shape, kernel_shape}", good=good, note="")


def exact_convolution(what, rule, x, kernel, g, strides, groups):
    """float64 (out, dx, dkernel), by definition, with one pixel of padding."""
    import numpy as np

    x, kernel, g = (np.asarray(array, np.float64) for array in (x, kernel, g))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    (height, width), filters = g.shape[1:3], kernel.shape[3] // groups
    out, dpadded, dkernel = np.zeros(g.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j, group in itertools.product(*map(range, kernel.shape[:2]), range(groups)):
        seen = slice(group * kernel.shape[2], (group + 1) * kernel.shape[2])
        rows = slice(i, i + (height - 1) * strides[0] + 1, strides[0])
        columns = slice(j, j + (width - 1) * strides[1] + 1, strides[1])
        of = slice(group * filters, (group + 1) * filters)
        taps, weights = padded[:, rows, columns, seen, None], kernel[i, j, :, of]
        cotangent = g[..., None, of]
        if what == "multiplies":
            out[..., of] += (taps * weights).sum(3)
            to_x, to_kernel = weights * cotangent, taps * cotangent
        else:
            out[..., of] -= np.abs(taps - weights).sum(3)
            shaped = np.sign(weights - taps) if rule == "sign" else np.clip(weights - taps, -1, 1)
            to_x, to_kernel = shaped * cotangent, -shaped * cotangent
        dpadded[:, rows, columns, seen] += to_x.sum(4)
        dkernel[i, j, :, of] += to_kernel.sum((0, 1, 2))
    return out, dpadded[:, 1:-1, 1:-1], dkernel


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
    for lengths, keys, value_depth, dtype, rules in ATTENTION_CASES[:4]:
        arrays = attention_operands(np.random.default_rng(), lengths, dtype, keys, value_depth)
        jax.block_until_ready(jax.jit(attention_run("gpu", rules))(*arrays))
        print("ran attention of", lengths, flush=True)
