"""float64 NumPy definitions of the operators, and the generated cases that are held to them."""

import dataclasses

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def rule(name, difference):
    if name == "full":
        return difference
    if name == "sign":
        return np.sign(difference)
    slope = 1.0 if name == "hardtanh" else name[1]
    return np.clip(slope * difference, -1.0, 1.0)


def forward(x, y):
    """(out, sum of the magnitudes of its terms), both float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    distance = np.abs(x[..., :, :, None] - y[..., None, :, :]).sum(-2)
    return -distance, distance


def gradients(x, y, g, grad_x, grad_y):
    """((dx, S), (dy, S)) for the cotangent g; S sums what the documented algorithm adds."""
    x64, y64, g64 = (a.astype(np.float64) for a in (x, y, g))
    difference = y64[..., None, :, :] - x64[..., :, :, None]
    g_all = g64[..., :, None, :]
    dx = (rule(grad_x, difference) * g_all).sum(-1)
    dy = (rule(grad_y, -difference) * g_all).sum(-3)
    magnitude = np.abs(g64)
    if grad_x == "full":
        dx_terms = magnitude @ np.abs(y64).swapaxes(-1, -2)
        dx_terms = dx_terms + np.abs(x64) * magnitude.sum(-1, keepdims=True)
    else:
        dx_terms = np.broadcast_to(magnitude.sum(-1, keepdims=True), dx.shape)
    if grad_y == "full":
        dy_terms = np.abs(x64).swapaxes(-1, -2) @ magnitude
        dy_terms = dy_terms + np.abs(y64) * magnitude.sum(-2, keepdims=True)
    else:
        dy_terms = np.broadcast_to(magnitude.sum(-2, keepdims=True), dy.shape)
    return tuple(
        (unbroadcast(value, operand.shape), unbroadcast(terms, operand.shape))
        for value, terms, operand in ((dx, dx_terms, x), (dy, dy_terms, y))
    )


def unbroadcast(array, shape):
    """Sums over the dimensions along which an operand of this shape was broadcast."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1)
    return array.sum(axes, keepdims=True)


def assert_within(actual, expected, terms, what):
    """|error| <= 1e-5 max|expected| + 1e-6 S + a rounding of the result's own dtype."""
    assert actual.shape == expected.shape, what
    if not expected.size:
        return
    bound = 1e-5 * np.abs(expected).max() + 1e-6 * terms
    if actual.dtype != np.float32:  # a gradient in its primal's dtype
        bound = bound + ml_dtypes.finfo(actual.dtype).eps * np.abs(expected)
        bound = bound + float(ml_dtypes.finfo(actual.dtype).smallest_subnormal)
    error = np.abs(actual.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert np.all(error <= bound), (
        f"{what}: at {worst} got {actual[worst]}, expected {expected[worst]}, error "
        f"{error[worst]:.3g} over the bound {bound[worst]:.3g}"
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One generated call."""

    shape_x: tuple[int, ...]
    shape_y: tuple[int, ...]
    dtype_x: str
    dtype_y: str
    grad_x: object
    grad_y: object
    scale_x: float
    scale_y: float
    seed: int

    def operands(self):
        """x and y, rounded to their dtypes, and a float32 cotangent."""
        random = np.random.default_rng(self.seed)
        x = random.normal(size=self.shape_x) * self.scale_x
        y = random.normal(size=self.shape_y) * self.scale_y
        batch = np.broadcast_shapes(self.shape_x[:-2], self.shape_y[:-2])
        g = random.normal(size=(*batch, self.shape_x[-2], self.shape_y[-1]))
        return x.astype(DTYPES[self.dtype_x]), y.astype(DTYPES[self.dtype_y]), g.astype(np.float32)

    def __str__(self):
        shapes = "_".join("x".join(map(str, shape)) for shape in (self.shape_x, self.shape_y))
        rules = "_".join(
            name if isinstance(name, str) else f"{name[0]}{name[1]:g}" for name in (self.grad_x, self.grad_y)
        )
        return f"{shapes}-{self.dtype_x}_{self.dtype_y}-{rules}-{self.scale_x:g}_{self.scale_y:g}"


RULES = [
    ("hardtanh", "full"),
    ("sign", "hardtanh"),
    ("full", "sign"),
    (("hardtanh", 4.0), ("hardtanh", 0.25)),
]
DTYPE_PAIRS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
SCALES = [(1.0, 1.0), (1e-6, 1e-6), (1e6, 1e6), (1e-6, 1e6), (1e-3, 1.0), (30.0, 1.0)]


def generate(shapes, rules_per_shape, scales_per_program):
    """Cases over the shapes; each program (shape, dtypes, rules) meets several magnitudes."""
    cases = []
    for index, (shape_x, shape_y) in enumerate(shapes):
        for step in range(rules_per_shape):
            program = index + step
            grad_x, grad_y = RULES[program % len(RULES)]
            dtype_x, dtype_y = DTYPE_PAIRS[program % len(DTYPE_PAIRS)]
            for turn in range(scales_per_program):
                scale_x, scale_y = SCALES[(program + turn) % len(SCALES)]
                cases.append(
                    Case(
                        shape_x,
                        shape_y,
                        dtype_x,
                        dtype_y,
                        grad_x,
                        grad_y,
                        scale_x,
                        scale_y,
                        seed=len(cases),
                    )  # fmt: skip
                )
    return cases


# Ragged, prime, one, zero; batched, and broadcast on either side or both; one block of columns
# and several; few columns (rows in lanes); more terms than one pass takes, and one.
BUCKETS = [
    ((37, 19), (19, 53)),
    ((1, 1), (1, 1)),
    ((5, 1), (1, 7)),
    ((0, 4), (4, 3)),
    ((4, 0), (0, 3)),
    ((2, 3, 4), (4, 0)),
    ((1, 197), (197, 3)),
    ((67, 40), (40, 2)),
    ((8, 33), (33, 521)),
    ((6, 768), (768, 16)),
    ((3, 11, 24), (24, 13)),
    ((2, 3, 17, 16), (2, 3, 16, 17)),
    ((2, 1, 9, 10), (3, 10, 11)),
    ((7, 31), (3, 31, 6)),
    ((1, 5, 12), (4, 12, 6)),
    ((4, 5, 12), (1, 12, 6)),
    ((2, 1, 5, 6), (1, 3, 6, 4)),
]


def random_shapes(count, seed):
    """Shapes for the long run: each axis 0, 1, a power of two, a prime or anything."""
    random = np.random.default_rng(seed)

    def size(largest):
        kind = random.integers(12)
        if kind == 0:
            return int(random.integers(2))
        if kind < 5:
            return int(2 ** random.integers(1, np.log2(largest) + 1))
        if kind < 8:
            primes = (2, 3, 5, 7, 11, 13, 17, 31, 67, 127, 197, 257, 521)
            return int(random.choice([p for p in primes if p <= largest]))
        return int(random.integers(1, largest + 1))

    shapes = []
    for _ in range(count):
        batch = tuple(int(random.integers(1, 4)) for _ in range(random.integers(3)))
        long = int(random.integers(3))
        m, k, n = (size(600 if axis == long else 40) for axis in range(3))
        sides = []
        for _ in range(2):
            kept = batch[random.integers(len(batch) + 1) :]
            sides.append(tuple(1 if random.integers(4) == 0 else b for b in kept))
        shapes.append(((*sides[0], m, k), (*sides[1], k, n)))
    return shapes
