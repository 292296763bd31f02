"""What one jaxpr equation costs: the arithmetic of every primitive that the ledger knows.

Operations are counted for the definition of a primitive, not for one way to compute it: a sum
of n numbers is n - 1 additions, a softmax's exponential one exponential. Names of operations:
"add" (subtractions too), "multiply", "absolute", "compare", "divide", "exponential",
"square_root", "negate" (a flipped sign), "round", "bitwise" (logic on bits) and the special
functions "logarithm", "tanh", "erf", "logistic", "power", "sine" and "cosine".

Matrix products and convolutions are multiply-accumulates, one "multiply" and one "add" each. A
convolution has one for each output, kernel position and input channel of the output's group, as
the published counts have it: positions where the kernel meets padding are counted. For a
transposed convolution, whose input is spread out by zeros, it has one for each input, kernel
position and output channel of the input's group: the inserted zeros are not multiplied.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

PRODUCT, ADDER, ELEMENTWISE, MOVEMENT = "product", "adder", "elementwise", "movement"


class Cost(NamedTuple):
    """The arithmetic of one equation.

    Attributes:
        kind: PRODUCT (matrix product or convolution), ADDER (|x - w| terms), ELEMENTWISE
            (all other arithmetic) or MOVEMENT (none).
        operations: (operation, dtype) -> count.
        elements: multiply-accumulates of a PRODUCT, |x - w| terms of an ADDER, otherwise 0.
        sums: dtype in which those are added up, "" where there are none.
    """

    kind: str
    operations: dict[tuple[str, str], int]
    elements: int = 0
    sums: str = ""


# Operations for each element of the result.
_ELEMENTWISE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub", "add_any"), ("add",)),
    **dict.fromkeys(("mul", "square"), ("multiply",)),
    "one_minus_square": ("multiply", "add"),
    "neg": ("negate",),
    "abs": ("absolute",),
    "div": ("divide",),
    "rem": ("divide", "round", "multiply", "add"),
    "sign": ("compare", "compare"),
    "clamp": ("compare", "compare"),
    **dict.fromkeys(("max", "min", "is_finite"), ("compare",)),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), ("compare",)),
    **dict.fromkeys(("eq_to", "lt_to", "le_to"), ("compare",)),
    **dict.fromkeys(("exp", "exp2"), ("exponential",)),
    "expm1": ("exponential", "add"),
    **dict.fromkeys(("log", "log2"), ("logarithm",)),
    "log1p": ("logarithm", "add"),
    "sqrt": ("square_root",),
    "rsqrt": ("square_root", "divide"),
    "tanh": ("tanh",),
    **dict.fromkeys(("erf", "erfc"), ("erf",)),
    "logistic": ("logistic",),
    "pow": ("power",),
    "sin": ("sine",),
    "cos": ("cosine",),
    **dict.fromkeys(("floor", "ceil", "round"), ("round",)),
    **dict.fromkeys(("and", "or", "xor", "not"), ("bitwise",)),
    **dict.fromkeys(("shift_left", "shift_right_logical", "shift_right_arithmetic"), ("bitwise",)),
    **dict.fromkeys(("population_count", "clz"), ("bitwise",)),
}
# Operations for each element of the operand but the first of every group that is reduced.
_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_prod": "multiply",
    **dict.fromkeys(("reduce_max", "reduce_min", "argmax", "argmin"), "compare"),
    **dict.fromkeys(("reduce_and", "reduce_or", "reduce_xor"), "bitwise"),
}
_CUMULATIVE = {
    "cumsum": "add",
    "cumprod": "multiply",
    **dict.fromkeys(("cummax", "cummin"), "compare"),
}
_WINDOWS = {
    "reduce_window_sum": "add",
    **dict.fromkeys(("reduce_window_max", "reduce_window_min"), "compare"),
}
# Operations for each element of the update.
_SCATTERS = {
    "scatter": (),
    **dict.fromkeys(("scatter-add", "scatter-sub"), ("add",)),
    "scatter-mul": ("multiply",),
    **dict.fromkeys(("scatter-max", "scatter-min"), ("compare",)),
}
_REDUCE_ACROSS = {
    **dict.fromkeys(("psum", "psum_invariant"), "add"),
    **dict.fromkeys(("pmax", "pmin"), "compare"),
}
# Another look at the same numbers, or numbers made from an index: nothing is read or written.
# A broadcast is read by its users at the size at which it was stored.
VIEWS = frozenset(
    "reshape squeeze broadcast_in_dim broadcast_to bitcast_convert_type stop_gradient name iota "
    "empty empty2 zeros_like optimization_barrier sharding_constraint reshard layout_constraint "
    "relayout pvary reduced_vary_cast_p vary_unreduced_cast_p axis_index platform_index "
    "shape_assertion create_token after_all debug_callback debug_print random_wrap random_unwrap "
    "tie".split()
)
# Numbers are copied from one place to another: bytes, but no arithmetic.
_MOVES = frozenset(
    "transpose slice dynamic_slice dynamic_update_slice concatenate pad gather rev copy "
    "select_n convert_element_type reduce_precision device_put split stack unstack tile real "
    "imag complex all_gather all_gather_invariant all_to_all ppermute".split()
)
# They read as much as they write, not the whole operand.
_READS_RESULT = frozenset(("slice", "dynamic_slice", "gather", "split", "unstack"))


def arithmetic(eqn: Any, axis_sizes: dict[str, int]) -> Cost | None:
    """The cost of a primitive equation, or None where the primitive is not known.

    Args:
        eqn: an equation of a jaxpr without inner jaxprs.
        axis_sizes: sizes of the named axes of the surrounding shard_map.
    """
    name = eqn.primitive.name
    if name in VIEWS or name in _MOVES:
        return Cost(MOVEMENT, {})
    operands, result = [v.aval for v in eqn.invars], eqn.outvars[0].aval
    if any(_is_complex(aval) for aval in (*operands, result)):
        return None
    if name in _ELEMENTWISE:
        # A comparison works in the type of what it compares; so does every other operation.
        dtype = result.dtype if result.dtype != np.bool_ else operands[0].dtype
        return _elementwise(_ELEMENTWISE[name], size(result), dtype)
    if name == "integer_pow":
        return _integer_power(eqn.params["y"], result)
    if name in _REDUCTIONS:
        count = size(operands[0]) - size(result)
        return _elementwise((_REDUCTIONS[name],), count, operands[0].dtype)
    if name in _CUMULATIVE:
        length = operands[0].shape[eqn.params["axis"]]
        count = size(result) - size(result) // max(length, 1)
        return _elementwise((_CUMULATIVE[name],), count, result.dtype)
    if name in _WINDOWS:
        count = size(result) * (math.prod(eqn.params["window_dimensions"]) - 1)
        return _elementwise((_WINDOWS[name],), count, result.dtype)
    if name == "select_and_scatter_add":
        source = size(operands[0])
        compares = source * (math.prod(eqn.params["window_dimensions"]) - 1)
        dtype = str(result.dtype)
        return Cost(ELEMENTWISE, {("compare", dtype): compares, ("add", dtype): source})
    if name in _SCATTERS:
        return _elementwise(_SCATTERS[name], size(operands[2]), result.dtype)
    if name == "sort":
        length = operands[0].shape[eqn.params["dimension"]]
        count = size(operands[0]) * math.ceil(math.log2(max(length, 1)))
        return _elementwise(("compare",), count, operands[0].dtype)
    if name in _REDUCE_ACROSS:
        # n - 1 operations a group of n devices, that is (n - 1) / n on each, rounded up.
        axes = eqn.params["axes"]
        n = math.prod(axis_sizes.get(axis, 1) for axis in axes)
        count = sum(-(-size(aval) * (n - 1) // n) for aval in operands)
        return _elementwise((_REDUCE_ACROSS[name],), count, result.dtype)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(operands[0].shape[axis] for axis in contracted)
        return _multiply_accumulate(size(result) * terms, operands[0].dtype, result.dtype)
    if name == "conv_general_dilated":
        return _multiply_accumulate(_convolution(eqn), operands[0].dtype, result.dtype)
    return None


def traffic(eqn: Any, stored: dict[Any, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Elements that an operator reads and writes, by dtype: each operand and result once.

    Args:
        eqn: an equation that is not one of VIEWS.
        stored: elements in memory behind variables that views made larger.
    """
    name = eqn.primitive.name
    inputs = [(v.aval, stored.get(v, size(v.aval))) for v in eqn.invars if not is_literal(v)]
    outputs = [(v.aval, size(v.aval)) for v in eqn.outvars]
    if name in _READS_RESULT:
        inputs = outputs + inputs[1:]
    elif name == "dynamic_update_slice":
        outputs = [(eqn.invars[0].aval, size(eqn.invars[1].aval))]
        inputs = inputs[1:]
    elif name in _SCATTERS:
        updates = (eqn.invars[0].aval, size(eqn.invars[2].aval))
        inputs = inputs[1:] if name == "scatter" else [updates, *inputs[1:]]
        outputs = [updates]
    return _by_dtype(inputs), _by_dtype(outputs)


def _multiply_accumulate(elements: int, factor_dtype: Any, sum_dtype: Any) -> Cost:
    """Multiply-accumulates: products in the operands' type, sums in the result's, but float32 at least.

    Matrix units add up half-precision products in float32, and round the result afterwards.
    """
    if jnp.issubdtype(sum_dtype, jnp.floating) and sum_dtype.itemsize < 4:
        sum_dtype = "float32"
    operations = {("multiply", str(factor_dtype)): elements, ("add", str(sum_dtype)): elements}
    return Cost(PRODUCT, operations, elements, str(sum_dtype))


def size(aval: Any) -> int:
    """Number of elements; 0 for tokens and the like.

    Raises:
        ValueError: a dimension is symbolic.
    """
    shape = getattr(aval, "shape", None)
    if shape is None:
        return 0
    if not all(isinstance(length, (int, np.integer)) for length in shape):
        raise ValueError(
            f"The program has an array of the symbolic shape {shape}, and a count needs numbers: "
            "trace it with fixed shapes."
        )
    return math.prod(map(int, shape))


def is_literal(variable: Any) -> bool:
    """Whether an operand of an equation is a constant written into it."""
    return hasattr(variable, "val")


def _elementwise(names: tuple[str, ...], count: int, dtype: Any) -> Cost:
    operations: dict[tuple[str, str], int] = {}
    for name in names:
        key = (name, str(dtype))
        operations[key] = operations.get(key, 0) + count
    return Cost(ELEMENTWISE, operations)


def _integer_power(exponent: int, result: Any) -> Cost:
    magnitude = abs(exponent)
    # Repeated squaring.
    multiplications = magnitude.bit_length() + magnitude.bit_count() - 2 if magnitude else 0
    names = ("multiply",) * multiplications + ("divide",) * (exponent < 0)
    return _elementwise(names, size(result), result.dtype)


def _convolution(eqn: Any) -> int:
    """Multiply-accumulates of conv_general_dilated."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    inputs, kernel = eqn.invars[0].aval, eqn.invars[1].aval
    features, _, *positions = numbers.rhs_spec
    window = math.prod(kernel.shape[axis] for axis in positions)
    elements = size(eqn.outvars[0].aval) * size(kernel) // max(kernel.shape[features], 1)
    if any(dilation > 1 for dilation in params["lhs_dilation"]):
        groups = params["feature_group_count"] * params["batch_group_count"]
        by_input = size(inputs) * window * kernel.shape[features] // groups
        return min(elements, by_input)
    return elements


def _is_complex(aval: Any) -> bool:
    # PRNG keys have a dtype that NumPy does not know.
    dtype = getattr(aval, "dtype", None)
    return isinstance(dtype, np.dtype) and dtype.kind == "c"


def _by_dtype(arrays: list[tuple[Any, int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for aval, elements in arrays:
        if elements:
            counts[str(aval.dtype)] = counts.get(str(aval.dtype), 0) + elements
    return counts
