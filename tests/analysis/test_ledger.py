"""The operation ledger against counts by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

from adderflax.analysis import count_operations
from adderflax.operators import adder_matmul, available_implementations

IMPLEMENTATIONS = (None, *available_implementations("cpu"))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_plain_mlp():
    def mlp(x, w1, b1, w2):
        hidden = x @ w1
        return jax.nn.relu(hidden + jnp.broadcast_to(b1, hidden.shape)) @ w2

    ledger = count_operations(mlp, array(5, 7), array(7, 11), array(11), array(11, 3))
    macs = 5 * 7 * 11 + 5 * 11 * 3
    assert ledger.macs == macs and ledger.adder_elements == 0
    assert ledger.operations == {"multiply": macs, "add": macs + 5 * 11, "compare": 5 * 11}
    assert not ledger.unknown and not ledger.open_loops


def test_special_functions_and_reductions_have_names():
    ledger = count_operations(lambda x: jax.nn.softmax(x, axis=-1), array(4, 10))
    assert ledger.operations == {
        # Each row's maximum, and once more against the -inf with which jax.nn starts it.
        "compare": 4 * 9 + 4,
        "add": 4 * 10 + 4 * 9,
        "exponential": 40,
        "divide": 40,
    }

    def functions(x):
        return jnp.abs(lax.erf(lax.rsqrt(x)) + lax.tanh(lax.log(x))) ** 5

    assert count_operations(functions, array(6)).operations == {
        "square_root": 6,
        "divide": 6,
        "erf": 6,
        "logarithm": 6,
        "tanh": 6,
        "add": 6,
        "absolute": 6,
        "multiply": 3 * 6,  # x^5 = (x^2)^2 x
    }
    counts = count_operations(lambda x: lax.sort(lax.cumsum(x, 1), dimension=1), array(3, 8))
    assert counts.operations == {"add": 3 * 7, "compare": 3 * 8 * 3}


def convolution(x, kernel, **keywords):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **keywords)


@pytest.mark.parametrize(
    ("keywords", "kernel", "macs"),
    [
        # 9 x 9 -> 5 x 5 with stride 2: padding counts as if it were multiplied.
        ({"window_strides": (2, 2), "padding": "SAME"}, (3, 3, 6, 8), 2 * 25 * 8 * 9 * 6),
        ({"window_strides": (1, 1), "padding": "VALID"}, (3, 3, 6, 8), 2 * 49 * 8 * 9 * 6),
        # Three groups: each output sees two of the six channels.
        (
            {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 3},
            (3, 3, 2, 9),
            2 * 81 * 9 * 9 * 2,
        ),
        # Depthwise.
        (
            {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 6},
            (5, 5, 1, 6),
            2 * 81 * 6 * 25,
        ),
        # A dilated 3 x 3 kernel spans 5 x 5.
        (
            {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 2)},
            (3, 3, 6, 8),
            2 * 25 * 8 * 9 * 6,
        ),
        # Transposed: the zeros between the inputs are not multiplied.
        (
            {"window_strides": (1, 1), "padding": [(2, 2)] * 2, "lhs_dilation": (2, 2)},
            (3, 3, 6, 8),
            2 * 81 * 6 * 9 * 8,
        ),
    ],
)
def test_convolutions(keywords, kernel, macs):
    def function(x, k):
        return convolution(x, k, **keywords)

    ledger = count_operations(function, array(2, 9, 9, 6), array(*kernel))
    assert ledger.macs == macs
    assert ledger.operations == {"multiply": macs, "add": macs}


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_of_a_strided_convolution_cost_what_it_costs(groups):
    def loss(x, kernel):
        out = convolution(x, kernel, window_strides=(2, 2), padding="SAME", feature_group_count=groups)
        return jnp.sum(out * out)

    ledger = count_operations(jax.grad(loss, argnums=(0, 1)), array(2, 9, 9, 6), array(3, 3, 6 // groups, 9))
    assert ledger.macs == 3 * 2 * 25 * 9 * 9 * 6 // groups


def test_loops_are_multiplied_out():
    w = array(8, 8)

    def scanned(x, w):
        return lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    def nested(x, w):
        return lax.fori_loop(0, 3, lambda i, c: scanned(c, w), x)

    assert count_operations(scanned, array(4, 8), w).macs == 7 * 4 * 8 * 8
    assert count_operations(nested, array(4, 8), w).macs == 3 * 7 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("first", "test", "step", "turns"),
    [
        (0, lambda i: i < 10, 1, 10),
        (0, lambda i: i < 10, 3, 4),
        (2, lambda i: i <= 10, 2, 5),
        (10, lambda i: i > 0, -2, 5),
        (9, lambda i: lax.le(jnp.int32(0), i), -3, 4),
        (0, lambda i: i != 6, 2, 3),
        (5, lambda i: i < 5, 1, 0),
    ],
)
def test_while_loops_that_say_how_often_they_turn(first, test, step, turns):
    def function(x, w):
        def body(carry):
            return carry[0] + step, carry[1] @ w

        return lax.while_loop(lambda carry: test(carry[0]), body, (first, x))[1]

    ledger = count_operations(function, array(4, 8), array(8, 8))
    assert ledger.macs == turns * 4 * 8 * 8 and not ledger.open_loops
    # The test runs once more than the body.
    assert ledger.operations["compare"] == turns + 1


def test_while_loop_through_jit_with_a_bound_in_its_carry():
    @jax.jit
    def power(x, n):
        return lax.while_loop(
            lambda carry: carry[0] < carry[1], lambda c: (c[0] + 1, c[1], c[2] * c[2]), (0, n, x)
        )[2]

    assert count_operations(lambda x: power(x, 6), array(5)).operations["multiply"] == 30


def test_a_loop_of_unknown_length_is_listed():
    def function(x, n):
        return lax.fori_loop(0, n, lambda i, c: c * c, x)

    ledger = count_operations(function, array(5), array(dtype=jnp.int32))
    assert [loop.primitive for loop in ledger.open_loops] == ["while"]
    assert ledger.operations["multiply"] == 5


def test_vmap():
    ledger = count_operations(jax.vmap(jnp.dot, (0, None)), array(6, 4, 5), array(5, 3))
    assert ledger.macs == 6 * 4 * 5 * 3
    inner = jax.vmap(lambda x: jnp.sum(jnp.abs(x)))
    assert count_operations(inner, array(6, 4)).operations == {"absolute": 24, "add": 6 * 3}


def test_calls():
    @jax.custom_vjp
    def doubled(x):
        return x + x

    doubled.defvjp(lambda x: (x + x, None), lambda _, g: (g * 2.0,))

    @jax.custom_jvp
    def squared(x):
        return x * x

    squared.defjvp(lambda primals, tangents: (primals[0] ** 2, tangents[0]))

    def function(x):
        return jax.jit(doubled)(jax.checkpoint(squared)(x))

    assert count_operations(function, array(7)).operations == {"add": 7, "multiply": 7}


def test_of_a_cond_the_heavier_branch_counts():
    def function(p, x):
        return lax.cond(p, lambda x: x * x * x, lambda x: x + 1.0, x)

    ledger = count_operations(function, array(dtype=jnp.bool_), array(9))
    assert ledger.operations == {"multiply": 18}


def test_of_a_choice_by_platform_the_common_form_counts():
    def function(x):
        return lax.platform_dependent(x, tpu=lambda x: x * x * x, default=lambda x: x + 1.0)

    assert count_operations(function, array(9)).operations == {"add": 9}


def test_dead_code_is_not_counted():
    @jax.jit
    def both(x):
        return jnp.exp(x), jnp.tanh(x)

    def function(x):
        unused = jnp.sqrt(x)
        del unused
        return both(x)[1]

    assert count_operations(function, array(3)).operations == {"tanh": 3}


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def function(x, w):
        return lax.psum(jnp.sum(x @ w, 0), "data")

    sharded = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    ledger = count_operations(sharded, array(6, 4), array(4, 10))
    macs = 6 * 4 * 10
    # 2 rows are added on each device, and the two partial sums to each other.
    assert ledger.macs == macs
    assert ledger.operations == {"multiply": macs, "add": macs + 2 * 2 * 10 + 10}


def test_unknown_primitives_are_listed():
    def function(x):
        with jax.named_scope("solver"):
            return lax.scan(lambda c, _: (jnp.linalg.cholesky(c), None), x, None, length=3)[0] * x

    ledger = count_operations(function, array(4, 4))
    assert ("cholesky", "solver", 3) in ledger.unknown
    assert ledger.operations["multiply"] >= 16
    branches = count_operations(
        lambda p, x: lax.cond(p, jnp.linalg.cholesky, jnp.tanh, x), array(dtype=bool), array(4, 4)
    )
    assert "cholesky" in {item.primitive for item in branches.unknown}
    complex_product = count_operations(jnp.dot, *[array(4, 4, dtype=jnp.complex64)] * 2)
    assert [item.primitive for item in complex_product.unknown] == ["dot_general"]
    assert complex_product.operations == {}


def test_symbolic_shapes_are_refused():
    (length,) = jax.export.symbolic_shape("n")
    with pytest.raises(ValueError, match="symbolic shape"):
        count_operations(lambda x: x + x, array(length))


def test_movement_costs_bytes_and_no_arithmetic():
    def function(x):
        return jnp.concatenate([x.T, x[::-1].T]).reshape(2, -1)[:, 3:]

    ledger = count_operations(function, array(4, 4))
    assert ledger.operations == {} and not ledger.unknown
    # Two transposes and a reversal of 16, concatenating 32, slicing 2 x 13 of 2 x 16.
    assert ledger.bytes_read == ledger.bytes_written == 4 * (3 * 16 + 32 + 2 * 13)


def test_what_follows_from_indices_does_not_count():
    ledger = count_operations(lambda x: x + 2.0 * jnp.eye(4), array(4, 4))
    assert ledger.operations == {"add": 16} and not ledger.unknown


def test_what_has_no_argument_counts():
    ledger = count_operations(lambda: jnp.ones((10, 20)) @ jnp.ones((20, 30)))
    assert ledger.macs == 6000
    ledger = count_operations(lambda x: x + lax.rng_uniform(0.0, 1.0, shape=(4,)), array(4))
    assert [found.primitive for found in ledger.unknown] == ["rng_uniform"]
    ledger = count_operations(lambda x: x + jax.random.normal(jax.random.key(0), (4,)), array(4))
    assert "random_bits" in {found.primitive for found in ledger.unknown}


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_narrow_operands_of_any_kind_are_counted(promotion):
    half, eighth = array(3, 3, dtype=jnp.bfloat16), array(3, 3, dtype=jnp.float8_e4m3fn)
    with jax.numpy_dtype_promotion(promotion):
        (product,) = count_operations(jnp.dot, eighth, eighth).entries
        assert product.operations == {("multiply", "float8_e4m3fn"): 27, ("add", "float32"): 27}
        for operands, difference in (((half, half), "bfloat16"), ((half, array(3, 3)), "float32")):
            (entry,) = count_operations(adder_matmul, *operands).entries
            expected = Counter({("add", difference): 27, ("absolute", difference): 27})
            expected["add", "float32"] += 27
            assert entry.operations == expected and entry.sums == "float32"
        options = {"grad_x": "sign", "grad_y": "sign"}
        ledger = count_operations(jax.grad(lambda x, y: adder_matmul(x, y, **options).sum()), half, half)
        (entry,) = (entry for entry in ledger.entries if entry.operator.endswith("gradient_x"))
        assert entry.operations == {
            ("add", "bfloat16"): 27,
            ("compare", "bfloat16"): 54,
            ("multiply", "float32"): 27,
            ("add", "float32"): 27,
        }


def test_bytes_of_a_product_and_of_a_broadcast():
    def function(x, w, b):
        product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        return product + jnp.broadcast_to(b, product.shape)

    operands = (array(5, 7, dtype=jnp.bfloat16), array(7, 11, dtype=jnp.bfloat16), array(11))
    ledger = count_operations(function, *operands)
    product, addition = ledger.entries
    assert product.read == {"bfloat16": 5 * 7 + 7 * 11} and product.written == {"float32": 55}
    assert product.operations == {("multiply", "bfloat16"): 385, ("add", "float32"): 385}
    # The broadcast is not stored: the 11 numbers behind it are read.
    assert addition.read == {"float32": 55 + 11} and addition.written == {"float32": 55}
    assert ledger.bytes_read == 2 * 112 + 4 * 66 and ledger.bytes_written == 4 * 110


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first", use_bias=False)(x)
        return nn.remat(nn.Dense)(3, name="second", use_bias=False)(nn.relu(x))


def test_paths_are_those_of_the_modules():
    model, x = Model(), array(2, 5)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    macs = {"Model/first": 2 * 5 * 4, "Model/second": 2 * 4 * 3}
    ledger = count_operations(model.apply, variables, x)
    assert {path: part.macs for path, part in ledger.by_path().items() if part.macs} == macs
    assert {path: part.macs for path, part in ledger.by_path(1).items()} == {"Model": 64}

    def loss(variables, x):
        return jnp.sum(model.apply(variables, x) ** 2)

    backward = count_operations(jax.grad(loss), variables, x)
    counted = {path: part.macs for path, part in backward.by_path().items() if part.macs}
    # Forward and weight gradient; for the second layer the gradient of its input too. Nobody uses
    # the product that remat computes again, for that gradient needs the layer's input only.
    assert counted == {"Model/first": 2 * 40, "Model/second": 3 * 24}


def test_what_is_computed_again_keeps_its_path():
    def loss(x):
        with jax.named_scope("layer"):
            return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x))

    parts = count_operations(jax.grad(loss), array(6)).by_path()
    assert set(parts) == {"layer"}
    # The inner sine, and the cosines of both.
    assert parts["layer"].operations == {"sine": 6, "cosine": 12, "multiply": 12}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("x", "y", "elements"),
    [
        ((5, 17), (17, 40), 5 * 17 * 40),
        ((3, 5, 17), (17, 40), 3 * 5 * 17 * 40),
        ((2, 3, 5, 17), (2, 3, 17, 4), 6 * 5 * 17 * 4),
        ((5, 17), (6, 17, 4), 6 * 5 * 17 * 4),
        # By the lengths alone the axis that is summed could be one of 4 as well.
        ((4, 4, 2, 1), (4, 4, 1, 2), 4 * 4 * 2 * 2),
    ],
)
def test_adder_products_count_by_definition(implementation, x, y, elements):
    def function(x, y):
        return adder_matmul(x, y, implementation=implementation)

    ledger = count_operations(function, array(*x), array(*y))
    assert ledger.adder_elements == elements and ledger.macs == 0
    assert ledger.operations == {"add": 2 * elements, "absolute": elements}
    (entry,) = (entry for entry in ledger.entries if entry.kind == "adder")
    assert entry.operator == "adder_matmul"


@pytest.mark.parametrize("axes", [(0, None), (1, None), (2, None), (2, 1), (None, 0), (1, 2)])
def test_vmapped_adder_products(axes):
    x, y = [5, 17], [17, 4]
    for shape, axis in zip((x, y), axes):
        if axis is not None:
            shape.insert(axis, 6)
    ledger = count_operations(jax.vmap(adder_matmul, axes), array(*x), array(*y))
    assert ledger.adder_elements == 6 * 5 * 17 * 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ["hardtanh", "sign", ("hardtanh", 4.0)])
def test_adder_gradients(implementation, rule):
    def loss(x, y):
        return jnp.sum(adder_matmul(x, y, grad_x=rule, implementation=implementation))

    elements = 5 * 17 * 40
    ledger = count_operations(jax.grad(loss, argnums=(0, 1)), array(5, 17), array(17, 40))
    groups = {entry.operator: entry for entry in ledger.entries if entry.elements}
    # The sum of the products is not asked for, so the forward product is not computed.
    assert set(groups) == {"adder_matmul_gradient_x", "dot_general"}
    assert groups["dot_general"].elements == elements
    assert groups["adder_matmul_gradient_x"].operations == {
        ("add", "float32"): 2 * elements,
        ("compare", "float32"): 2 * elements,
        ("multiply", "float32"): elements,
    }


def test_an_adder_convolution_is_recognized_by_its_name():
    def adder_conv(x, kernel):
        return -convolution(abs(x), abs(kernel), window_strides=(1, 1), padding="SAME")

    ledger = count_operations(jax.jit(adder_conv), array(2, 8, 8, 3), array(3, 3, 3, 16))
    elements = 2 * 8 * 8 * 16 * 27
    assert ledger.adder_elements == elements and ledger.macs == 0
    assert ledger.operations == {"add": 2 * elements, "absolute": elements}


def test_a_function_that_only_shares_the_name_is_counted_as_it_is():
    @jax.jit
    def adder_matmul(x, y, z):
        return x * y * z

    assert count_operations(adder_matmul, *[array(4, 4)] * 3).operations == {"multiply": 32}


def test_what_is_computed_from_constants_alone_does_not_count():
    def function(weights, x):
        scale = jnp.sum(jnp.abs(weights["w"]), axis=0)  # once and for all
        shifted = jax.jit(lambda w, x, s: x @ (2.0 * w) + jnp.broadcast_to(s, (3, 5)))(weights["w"], x, scale)
        return shifted * jnp.tanh(weights["b"])[None]

    weights = {"b": jnp.ones(5), "w": jnp.ones((4, 5))}
    everything = count_operations(function, weights, jnp.ones((3, 4)))
    ledger = count_operations(function, weights, jnp.ones((3, 4)), constant_argnums=(0,))
    assert everything.operations["tanh"] == 5 and everything.operations["absolute"] == 20
    assert ledger.operations == {"multiply": 60 + 15, "add": 60 + 15}
    assert ledger.macs == everything.macs == 60


def test_a_branch_knows_its_constants():
    def function(w, x):
        return jax.lax.cond(x[0] > 0, lambda w, x: x * jnp.tanh(w), lambda w, x: x, w, x)

    ledger = count_operations(function, jnp.ones(6), jnp.ones(6), constant_argnums=(0,))
    assert "tanh" not in ledger.operations and ledger.operations["multiply"] == 6


def test_constants_are_arguments():
    with pytest.raises(ValueError, match=r"constant_argnums: \[2\] are no indices of 2 arguments, 0 to 1"):
        count_operations(jnp.add, jnp.ones(3), jnp.ones(3), constant_argnums=(0, 2))
