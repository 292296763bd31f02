"""AdderNet's ResNet and the loader of its official weights, against a plain NumPy forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import AdderResNet, AdderResNetConfig, adder_conv, layers
from adderflax.models import load_addernet_weights
from adderflax.models.addernet_weights import convert_addernet_weights

SMALL = AdderResNetConfig(image_size=8, blocks=1, implementation="reference")


def official_state(blocks=3, classes=10, arithmetic="adder", seed=0):
    """Random weights under the names and shapes of the official code, as [O, I, height, width]."""
    random = np.random.default_rng(seed)
    state = {}

    def convolution(name, shape, kind):
        scale = 1.0 if kind == "adder" else 1 / np.sqrt(np.prod(shape[1:]))
        leaf = "adder" if kind == "adder" else "weight"
        state[f"{name}.{leaf}"] = random.normal(size=shape) * scale
        return np.prod(shape[1:]) if kind == "adder" else 0

    def norm(name, size, terms):
        # Statistics near those of the layer before, so that every layer matters for the logits.
        state[f"{name}.weight"] = random.uniform(0.5, 1.5, size)
        state[f"{name}.bias"] = random.normal(size=size) * 0.3
        state[f"{name}.running_mean"] = random.normal(size=size) * 0.3 - 1.1 * terms
        state[f"{name}.running_var"] = random.uniform(0.5, 1.5, size) * max(1.0, terms)
        state[f"{name}.num_batches_tracked"] = np.asarray(7)

    norm("bn1", 16, convolution("conv1", (16, 3, 3, 3), "multiply"))
    inputs = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            norm(f"{block}.bn1", width, convolution(f"{block}.conv1", (width, inputs, 3, 3), arithmetic))
            norm(f"{block}.bn2", width, convolution(f"{block}.conv2", (width, width, 3, 3), arithmetic))
            if inputs != width:
                shortcut = f"{block}.downsample"
                terms = convolution(f"{shortcut}.0", (width, inputs, 1, 1), arithmetic)
                norm(f"{shortcut}.1", width, terms)
            inputs = width
    norm("bn2", classes, convolution("fc", (classes, 64, 1, 1), "multiply"))
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


def numpy_forward(state, images, blocks=3):
    """The official network in evaluation mode, [B, C, H, W], in float64."""
    state = {name: array.astype(np.float64) for name, array in state.items()}

    def convolution(x, name, stride=1):
        adder = f"{name}.adder" in state
        kernel = state[f"{name}.adder" if adder else f"{name}.weight"]
        size = kernel.shape[2]
        pad = size // 2
        x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]
        out = np.empty((x.shape[0], len(kernel), *windows.shape[2:4]))
        for o, template in enumerate(kernel):
            template = template[:, None, None]
            terms = -np.abs(windows - template) if adder else windows * template
            out[:, o] = terms.sum((1, 4, 5))
        return out

    def norm(x, name):
        scale, bias, mean, var = (
            state[f"{name}.{leaf}"][:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm(convolution(images.astype(np.float64), "conv1"), "bn1"), 0)
    for stage in (1, 2, 3):
        for index in range(blocks):
            block, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = np.maximum(norm(convolution(x, f"{block}.conv1", stride), f"{block}.bn1"), 0)
            out = norm(convolution(out, f"{block}.conv2"), f"{block}.bn2")
            if f"{block}.downsample.1.weight" in state:
                x = norm(convolution(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
            x = np.maximum(out + x, 0)
    return norm(convolution(x.mean((2, 3), keepdims=True), "fc"), "bn2")[:, :, 0, 0]


def prefixed(state):
    return {f"module.{name}": array for name, array in state.items()}


def images(size=32, batch=2):
    return np.random.default_rng(1).normal(size=(batch, 3, size, size)).astype(np.float32)


def logits(config, variables, batch):
    return jax.jit(AdderResNet(config).apply)(variables, jnp.asarray(batch.transpose(0, 2, 3, 1)))


def test_official_logits(tmp_path):
    state = official_state()
    np.savez(tmp_path / "weights.npz", **prefixed(state))
    actual = logits(AdderResNetConfig(), load_addernet_weights(tmp_path / "weights.npz"), images())
    expected = numpy_forward(state, images())
    assert np.abs(expected).max() > 1.0 and np.ptp(expected, axis=0).max() > 0.1  # the image matters
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt"])
def test_pytorch_files(tmp_path, name):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    state = official_state(blocks=1)
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in prefixed(state).items()}
    torch.save(tensors, tmp_path / name)
    loaded = load_addernet_weights(tmp_path / name, SMALL)
    jax.tree.map(np.testing.assert_array_equal, loaded, convert_addernet_weights(state, SMALL))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_addernet_weights(tmp_path / "nothing.npz")
    (tmp_path / "weights.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a NumPy archive"):
        load_addernet_weights(tmp_path / "weights.npz")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="read from .pth, .pt, .safetensors or .npz files only"):
        load_addernet_weights(tmp_path / "weights.bin")


def test_unsafe_pytorch_files_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    torch.save({"conv1.weight": SMALL}, tmp_path / "weights.pth")  # any class could bring code
    with pytest.raises(ValueError, match="not a PyTorch state dict that can be read safely"):
        load_addernet_weights(tmp_path / "weights.pth")


def test_names_and_shapes_that_do_not_fit():
    state = official_state(blocks=1)
    assert convert_addernet_weights(state, SMALL)
    del state["layer2.0.downsample.0.adder"], state["bn2.running_var"]
    state["layer2.1.conv1.adder"] = np.zeros((32, 32, 3, 3))
    state["fc.weight"] = np.zeros((10, 64))
    with pytest.raises(ValueError) as raised:
        convert_addernet_weights(state, SMALL)
    for part in (
        "missing: bn2.running_var; layer2.0.downsample.0.adder.",
        "not in the network: layer2.1.conv1.adder.",
        "other shapes: fc.weight has (10, 64) and needs (10, 64, 1, 1).",
    ):
        assert part in str(raised.value)
    state = official_state(blocks=1)
    state["conv1.weight"] = state["conv1.weight"] * np.inf
    with pytest.raises(ValueError, match=r"Weights are not finite in conv1\.weight: their training"):
        convert_addernet_weights(state, SMALL)


def test_the_multiplying_twin_reads_its_names():
    config = AdderResNetConfig.from_variant("ResNet-20", "multiply", image_size=8, blocks=1)
    state = official_state(blocks=1, arithmetic="multiply")
    actual = logits(config, convert_addernet_weights(state, config), images(8))
    np.testing.assert_allclose(actual, numpy_forward(state, images(8), blocks=1), atol=1e-3)
    with pytest.raises(ValueError, match="missing: layer1.0.conv1.adder"):
        convert_addernet_weights(state, SMALL)


def test_training_updates_statistics_and_reaches_every_parameter():
    model = AdderResNet(SMALL)
    batch = jnp.asarray(images(8, 4).transpose(0, 2, 3, 1))
    variables = jax.jit(model.init)(jax.random.key(0), batch)

    def loss(params):
        out, updated = model.apply(variables | {"params": params}, batch, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(out + jnp.arange(10.0)[None])), updated["batch_stats"]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    changed = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), statistics, variables["batch_stats"])
    assert all(jax.tree.leaves(changed))
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    mean = statistics["layer1_0"]["bn1"]["mean"]
    assert -0.1 * 144 * 2 < float(mean.mean()) < -0.1 * 144 * 0.5  # a tenth of minus the fan-in


def test_the_exponent_reaches_every_adder_convolution(monkeypatch):
    exponents = []

    def record(*operands, p, **options):
        exponents.append(p)
        return adder_conv(*operands, p=p, **options)

    monkeypatch.setattr(layers, "adder_conv", record)
    model, batch = AdderResNet(dataclasses.replace(SMALL, implementation=None)), jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert exponents == [1.0] * 8
    jax.eval_shape(lambda v, p: model.apply(v, batch, p=p), variables, jnp.float32(1.5))
    assert len(exponents) == 16 and all(isinstance(p, jax.core.Tracer) for p in exponents[8:])


def test_parameters_and_variants():
    def count(config):
        shape = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        params = jax.eval_shape(AdderResNet(config).init, jax.random.key(0), shape)["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    # 432 + 13,824 + 50,688 + 202,752 for the blocks and shortcuts, 640, and 2 a channel of each BatchNorm.
    official = sum(array.size for name, array in official_state().items() if "running" not in name)
    official -= sum(name.endswith("tracked") for name in official_state())
    assert count(AdderResNetConfig()) == official == count(AdderResNetConfig.from_variant("ResNet-20"))
    assert AdderResNetConfig.from_variant("ResNet-32").blocks == 5


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"image_size": 30}, "image_size=30 must be a multiple of 4"),
        ({"shortcut": "none"}, "shortcut='none' is not known; choose one of 'adder', 'multiply'"),
        ({"blocks": 0}, "blocks=0 must be a whole number, at least 1"),
        ({"batch_norm_momentum": 1.0}, "batch_norm_momentum=1.0 must lie in"),
        ({"depth": 3}, "Unknown model field depth"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        AdderResNetConfig.from_variant("ResNet-20", **fields)


def test_other_image_sizes_are_refused():
    with pytest.raises(ValueError, match=r"takes \[batch, 8, 8, 3\]"):
        AdderResNet(SMALL).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
