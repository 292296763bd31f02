"""The loader of timm, DeiT and google-research weights, against a plain NumPy forward pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import VisionTransformer, VisionTransformerConfig
from adderflax.models import load_vit_weights
from adderflax.models.vit_weights import convert_vit_weights

D, HEADS, HIDDEN, PATCH, CLASSES = 24, 3, 40, 4, 5
CONFIG = VisionTransformerConfig.from_variant(
    "Ti/16", "vit", image_size=12, patch_size=PATCH, channels=2, num_classes=CLASSES, depth=2
)
CONFIG = dataclasses.replace(CONFIG, embed_dim=D, num_heads=HEADS, mlp_dim=HIDDEN)


def timm_state(seed=0):
    """Random weights under timm's names; every bias and scale matters for the logits."""
    random = np.random.default_rng(seed)
    state = {"cls_token": random.normal(size=(1, 1, D)), "pos_embed": random.normal(size=(1, 10, D))}

    def linear(name, outputs, *inputs):
        state[f"{name}.weight"] = random.normal(size=(outputs, *inputs)) / np.sqrt(np.prod(inputs))
        state[f"{name}.bias"] = random.normal(size=outputs) * 0.3

    def norm(name):
        state[f"{name}.weight"] = random.uniform(0.5, 1.5, D)
        state[f"{name}.bias"] = random.normal(size=D) * 0.3

    linear("patch_embed.proj", D, 2, PATCH, PATCH)
    for block in ("blocks.0", "blocks.1"):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * D, D)
        linear(f"{block}.attn.proj", D, D)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", HIDDEN, D)
        linear(f"{block}.mlp.fc2", D, HIDDEN)
    norm("norm")
    linear("head", CLASSES, D)
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


def google_state(state):
    """The same weights under google-research's names and in its layouts."""
    heads = (HEADS, D // HEADS)
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": np.einsum("ocyx->yxco", state["patch_embed.proj.weight"]),
        "embedding/bias": state["patch_embed.proj.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    norms = {"Transformer/encoder_norm": "norm"}
    for i in (0, 1):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        norms |= {f"{theirs}/LayerNorm_0": f"{ours}.norm1", f"{theirs}/LayerNorm_2": f"{ours}.norm2"}
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights = np.split(state[f"{ours}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            out[f"{attention}/{part}/kernel"] = weight.T.reshape(D, *heads)
            out[f"{attention}/{part}/bias"] = bias.reshape(heads)
        out[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(*heads, D)
        out[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for j in (0, 1):
            out[f"{theirs}/MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}.mlp.fc{j + 1}.weight"].T
            out[f"{theirs}/MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}.mlp.fc{j + 1}.bias"]
    for theirs, ours in norms.items():
        out[f"{theirs}/scale"], out[f"{theirs}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
    return out


def numpy_forward(state, images, heads=HEADS, tanh_gelu=False):
    """timm's VisionTransformer in float64 on images [B, C, H, W]."""
    state = {name: np.asarray(array, np.float64) for name, array in state.items()}
    width = state["cls_token"].shape[-1]
    depth = sum(name.endswith("norm1.weight") for name in state)
    patch = state["patch_embed.proj.weight"].shape[-1]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return normed * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        if tanh_gelu:
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

    def attention(x, name):
        B, T, _ = x.shape
        qkv = linear(x, f"{name}.qkv").reshape(B, T, 3, heads, width // heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return linear((weights @ v).swapaxes(1, 2).reshape(B, T, width), f"{name}.proj")

    B, _, H, W = images.shape
    tokens = np.zeros((B, H // patch, W // patch, width))
    for row in range(H // patch):
        for column in range(W // patch):
            window = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens[:, row, column] = np.einsum("bcyx,ocyx->bo", window, state["patch_embed.proj.weight"])
    tokens = tokens.reshape(B, -1, width) + state["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(state["cls_token"], (B, 1, width)), tokens], 1) + state["pos_embed"]
    for i in range(depth):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        hidden = gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


IMAGES = np.random.default_rng(1).normal(size=(4, 2, 12, 12)).astype(np.float32)


def logits(params, config=CONFIG):
    images = jnp.asarray(IMAGES.transpose(0, 2, 3, 1))
    return jax.jit(VisionTransformer(config).apply)({"params": params}, images)


def test_official_logits_of_both_families(tmp_path):
    state = timm_state()
    np.savez(tmp_path / "deit.npz", **state)
    np.savez(tmp_path / "google.npz", **google_state(state))
    timm = load_vit_weights(tmp_path / "deit.npz", CONFIG)
    actual = logits(timm)
    expected = numpy_forward(state, IMAGES, tanh_gelu=True)
    assert expected.std(axis=0).min() > 0.1  # the image matters
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(actual, numpy_forward(state, IMAGES), atol=1e-3)  # timm's exact GELU
    google = load_vit_weights(tmp_path / "google.npz", CONFIG)
    jax.tree.map(np.testing.assert_array_equal, google, timm)


def test_other_files(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    state = timm_state()
    expected = convert_vit_weights(state, CONFIG)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    torch.save({"model": tensors}, tmp_path / "deit.pth")
    jax.tree.map(np.testing.assert_array_equal, load_vit_weights(tmp_path / "deit.pth", CONFIG), expected)
    with pytest.raises(ValueError, match="from .pth, .pt, .safetensors or .npz files only"):
        (tmp_path / "weights.bin").write_bytes(b"")
        load_vit_weights(tmp_path / "weights.bin", CONFIG)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_vit_weights(tmp_path / "nothing.npz", CONFIG)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="reading .safetensors needs safetensors")
    safetensors.save_file(timm_state(), tmp_path / "vit.safetensors")
    loaded = load_vit_weights(tmp_path / "vit.safetensors", CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, convert_vit_weights(timm_state(), CONFIG))
    (tmp_path / "vit.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_vit_weights(tmp_path / "vit.safetensors", CONFIG)


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_prefix_of_every_name_is_no_part_of_them(prefix):
    prefixed = {prefix + name: array for name, array in timm_state().items()}
    expected = convert_vit_weights(timm_state(), CONFIG)
    for state in (prefixed, {"state_dict": prefixed}):
        jax.tree.map(np.testing.assert_array_equal, convert_vit_weights(state, CONFIG), expected)
    del prefixed[f"{prefix}norm.bias"]
    with pytest.raises(ValueError, match="missing: norm.bias"):
        convert_vit_weights(prefixed, CONFIG)


@pytest.mark.parametrize("side", [2, 5])
def test_position_embeddings_of_another_grid(side):
    state = timm_state()
    config = dataclasses.replace(CONFIG, image_size=side * PATCH)
    position = np.asarray(convert_vit_weights(state, config)["position_embedding"])
    assert position.shape == (1, side**2 + 1, D)
    np.testing.assert_array_equal(position[:, 0], state["pos_embed"][:, 0])
    torch = pytest.importorskip("torch", reason="timm's interpolation is PyTorch's")
    grid = torch.from_numpy(state["pos_embed"][:, 1:].reshape(1, 3, 3, D)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    expected = grid.permute(0, 2, 3, 1).reshape(1, -1, D).numpy()
    np.testing.assert_allclose(position[:, 1:], expected, atol=1e-5)


@pytest.mark.parametrize("layout", [timm_state, lambda: google_state(timm_state())], ids=["timm", "google"])
def test_a_classifier_of_other_classes_starts_at_zero(layout):
    config = dataclasses.replace(CONFIG, num_classes=7)
    expected = convert_vit_weights(layout(), CONFIG)
    del expected["head"]
    bare = {name: array for name, array in layout().items() if not name.startswith("head")}
    before_head = {"pre_logits/kernel": np.zeros((D, D)), "pre_logits/bias": np.zeros(D)}
    for state in (layout() | before_head, bare):
        params = convert_vit_weights(state, config)
        assert params["head"]["kernel"].shape == (D, 7) and params["head"]["bias"].shape == (7,)
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(params.pop("head")))
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(ValueError, match="not in the network: pre_logits/kernel; pre_logits/bias"):
        convert_vit_weights(layout() | before_head, CONFIG)


def test_names_and_shapes_that_do_not_fit():
    state = timm_state()
    del state["blocks.1.norm2.bias"]
    state["blocks.0.ls1.gamma"] = np.zeros(D)
    state["patch_embed.proj.weight"] = np.zeros((D, 2, 16, 16))
    with pytest.raises(ValueError) as raised:
        convert_vit_weights(state, CONFIG)
    for part in (
        "a ViT with patch_size=4",
        "missing: blocks.1.norm2.bias.",
        "not in the network: blocks.0.ls1.gamma.",
        "other shapes: patch_embed.proj.weight has (24, 2, 16, 16) and needs (24, 2, 4, 4).",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match=r"encoderblock_0/LayerNorm_0/scale has \(24,\) and needs \(16,\)"):
        convert_vit_weights(
            google_state(timm_state()), dataclasses.replace(CONFIG, embed_dim=16, num_heads=2)
        )
    with pytest.raises(ValueError, match=r"pos_embed has \(1, 9, 24\) and needs \(1, 10, 24\)"):
        convert_vit_weights(timm_state() | {"pos_embed": np.zeros((1, 9, D))}, CONFIG)
    with pytest.raises(ValueError, match="no ViT weights by timm's names .* Found: conv1.weight."):
        convert_vit_weights({"conv1.weight": np.zeros(1)}, CONFIG)


def test_weights_that_are_not_finite():
    state = dict(timm_state())
    state["blocks.0.norm1.weight"] = np.full_like(state["blocks.0.norm1.weight"], np.nan)
    with pytest.raises(ValueError, match=r"Weights are not finite in blocks\.0\.norm1\.weight: .* earlier"):
        convert_vit_weights(state, CONFIG)


def test_models_that_cannot_hold_them():
    with pytest.raises(ValueError, match="distilled DeiT.*this model has one only"):
        convert_vit_weights(timm_state() | {"dist_token": np.zeros((1, 1, D))}, CONFIG)
    with pytest.raises(ValueError, match="this one has linear='adder', .*adderflax.models.warm_start"):
        convert_vit_weights(timm_state(), VisionTransformerConfig.from_variant("Ti/4", "adder"))


def test_a_stem_or_mean_pooling_has_no_published_weights():
    for field in ({"stem": "conv"}, {"pooling": "mean"}):
        with pytest.raises(ValueError, match="Set stem='patch' and pooling='token'"):
            convert_vit_weights(timm_state(), dataclasses.replace(CONFIG, **field))
