"""What the ledger makes of adder_conv and of AdderNet's ResNet-20."""

import functools

import jax
import jax.numpy as jnp
import pytest

from adderflax import AdderResNet, AdderResNetConfig, adder_conv
from adderflax.analysis import count_operations


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_convolution_is_one_operator(implementation):
    run = functools.partial(adder_conv, strides=(2, 2), feature_group_count=2, implementation=implementation)
    ledger = count_operations(run, array(2, 8, 8, 6), array(3, 3, 3, 4))
    terms = 2 * 4 * 4 * 4 * 27
    (entry,) = (entry for entry in ledger.entries if entry.kind == "adder")
    assert (entry.operator, entry.elements) == ("adder_conv", terms)
    assert ledger.operations == {"add": 2 * terms, "absolute": terms}


def test_gradients():
    def gradients(x, kernel, g):
        return jax.vjp(adder_conv, x, kernel)[1](g)

    ledger = count_operations(gradients, array(2, 8, 8, 3), array(3, 3, 3, 4), array(2, 8, 8, 4))
    terms = 2 * 8 * 8 * 4 * 27
    groups = ledger.group(lambda entry: entry.operator if entry.kind in ("adder", "product") else "")
    assert groups["adder_conv_gradient_x"].operations == {
        "add": 2 * terms,
        "compare": 2 * terms,
        "multiply": terms,
    }
    # The rule "full" is a convolution; without the products with padding, as for any convolution.
    assert 0.7 * terms < groups["conv_general_dilated"].macs <= terms
    assert "adder_matmul" not in groups


@pytest.mark.parametrize("axes, lots", [((0, None), 3), ((0, 0), 3), ((None, 2), 3)])
def test_vmap(axes, lots):
    def shape(axis, *shape):
        return shape if axis is None else (*shape[:axis], lots, *shape[axis:])

    shapes = array(*shape(axes[0], 2, 6, 6, 4)), array(*shape(axes[1], 3, 3, 4, 5))
    ledger = count_operations(jax.vmap(adder_conv, axes), *shapes)
    assert ledger.adder_elements == lots * 2 * 6 * 6 * 5 * 36


def test_resnet_20_has_40_million():
    model = AdderResNet(AdderResNetConfig())
    variables = jax.eval_shape(model.init, jax.random.key(0), array(1, 32, 32, 3))
    ledger = count_operations(model.apply, variables, array(1, 32, 32, 3))
    assert ledger.unknown == ledger.open_loops == ()
    assert round(ledger.adder_elements / 1e6, 2) == 40.37
    # Without the products with padding, of which the first convolution would have 13,272 more.
    assert ledger.macs + ledger.adder_elements == pytest.approx(40.81e6, rel=5e-4)
    parts = ledger.by_path(2)
    assert parts["AdderResNet/layer1_0"].adder_elements == 2 * 1024 * 9 * 16 * 16
    assert parts["AdderResNet/layer2_0"].adder_elements == 256 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    assert parts["AdderResNet/fc"].macs == 640
