"""Descriptions of blocks: what they refuse, what unset fields mean, and the layers they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_reference import SMALL

from adderflax import AdderResNetConfig, AdderSelfAttention, EncoderConfig
from adderflax.encoder_config import convolution


def test_what_unset_fields_stand_for():
    found = EncoderConfig(embed_dim=24, num_heads=3, mlp_kernel_size=3, linear="multiply").resolved()
    assert (found.mlp_dim, found.mlp_convolution) == (96, "multiply")
    assert found.attention_scale == pytest.approx(1 / np.sqrt(2 * 8 * (1 - 2 / np.pi)))
    assert EncoderConfig(similarity="dot", embed_dim=32, num_heads=2).resolved().attention_scale == 0.25
    given = EncoderConfig(mlp_dim=5, attention_scale=0.5, mlp_kernel_size=3, mlp_convolution="multiply")
    assert given.resolved() == given
    assert EncoderConfig().resolved().mlp_convolution is None


@pytest.mark.parametrize("describe", [EncoderConfig, AdderResNetConfig])
def test_a_dtype_may_be_jaxs_own(describe):
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), np.float32):
        described = describe(dtype=dtype)
        assert described == describe(dtype=jnp.dtype(dtype).name) and isinstance(described.dtype, str)
    for wrong in (jnp.float16, "bf16", None, 3.0):
        with pytest.raises(ValueError, match="dtype=.* is not known; choose one of 'float32', 'bfloat16'"):
            describe(dtype=wrong)


def test_a_description_with_a_rule_of_a_file_is_hashable():
    config = EncoderConfig(grad_inputs=["hardtanh", 4.0])
    assert hash(config) == hash(EncoderConfig(grad_inputs=("hardtanh", 4.0)))


@pytest.mark.parametrize("flag", [True, False])
def test_flags_may_be_those_of_numpy(flag):
    tokens = jnp.ones((1, 5, 8))
    config = dataclasses.replace(SMALL, identity=np.bool_(flag), centered=np.bool_(flag))
    found, expected = (
        AdderSelfAttention(given).init_with_output(jax.random.key(0), tokens)[0]
        for given in (config, dataclasses.replace(SMALL, identity=flag, centered=flag))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("arithmetic", ["adder", "multiply"])
def test_a_convolution_is_what_the_configuration_describes(arithmetic):
    fields = {"power_activation": True, "centered": True, "implementation": "xla", "grad_kernel": "sign"}
    config = dataclasses.replace(
        SMALL, **fields, grad_inputs="full", layer_norm_epsilon=1e-3, dtype="bfloat16"
    )
    layer = convolution(config, arithmetic, 6, 5, "conv", stride=2, feature_group_count=3)
    fields |= {"grad_x": "full", "normalization": "layer"}
    expected = {"epsilon": 1e-3, "dtype": jnp.bfloat16, "features": 6, "name": "conv", "strides": (2, 2)}
    expected |= {"kernel_size": (5, 5), "padding": ((2, 2), (2, 2)), "feature_group_count": 3}
    expected |= fields if arithmetic == "adder" else {}
    assert {name: getattr(layer, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10 is not divisible by num_heads=4"),
        ({"linear": "add"}, "linear='add' is not known; choose one of 'adder', 'multiply'"),
        ({"power_activation": True, "normalization": "none"}, "power_activation=True.*'layer'"),
        ({"similarity": "l2"}, "similarity='l2' is not known; choose one of 'l1', 'dot'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate='0.1' must be a number"),
        ({"drop_path_rate": None}, "drop_path_rate=None must be a number"),
        *(
            ({name: value}, f"{name}={value!r} must be True or False")
            for value in ("no", 1)
            for name in ("identity", "power_activation", "centered", "use_bias", "remat")
        ),
        ({"mlp_dim": 0}, "mlp_dim=0 must be a whole number, at least 1, or None"),
        ({"embed_dim": 8.0}, "embed_dim=8.0 must be a whole number, at least 1"),
        ({"num_heads": True}, "num_heads=True must be a whole number"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon=-1e-06 must be a number greater than 0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon=inf must be a number"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon='x' must be a number"),
        ({"attention_scale": "x"}, "attention_scale='x' must be a finite number, or None"),
        ({"attention_scale": True}, "attention_scale=True must be a finite number, or None"),
        ({"attention_scale": float("inf")}, "attention_scale=inf must be a finite number, or None"),
        ({"mlp_kernel_size": 2}, "mlp_kernel_size=2 must be an odd whole number"),
        ({"mlp_kernel_size": True}, "mlp_kernel_size=True must be an odd whole number"),
        ({"mlp_kernel_size": 3.0}, "mlp_kernel_size=3.0 must be an odd whole number, as 3 or 5, or None"),
        ({"mlp_convolution": "adder"}, "mlp_convolution='adder' .* set mlp_kernel_size, as 3, or leave"),
        ({"grad_inputs": "hardtahn"}, "grad_inputs.*hardtahn"),
        ({"grad_key": ("hardtanh", -1.0)}, "grad_key"),
        ({"implementation": "fast"}, "implementation='fast' is not known; choose one of None, 'reference'"),
        ({"dtype": "float64"}, "dtype='float64' is not known; choose one of 'float32', 'bfloat16'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**fields)
