"""Published Vision Transformer weights, read into `VisionTransformer` with the "vit" preset.

Two families of names are known, both checked against the code that writes them:

* timm and DeiT (huggingface/pytorch-image-models ``timm/models/vision_transformer.py``,
  facebookresearch/deit ``models.py``): ``blocks.0.attn.qkv.weight`` [3 D, D], rows in the order query, key,
  value and inside each of them head by head.
* google-research/vision_transformer (``vit_jax/models_vit.py``, in the numbering of its published ``.npz``
  files): ``Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel`` [D, heads, D / heads].

Both normalize with an epsilon of 1e-6, as we do. Ours and Google's GELU is the tanh approximation, timm's
the exact one: with a timm file our logits deviate from timm's, by 1.3e-4 of their standard deviation on
average and 5.5e-4 at most (8 images, 1,000 classes, 12 blocks of width 192 with random weights; every
prediction the same). Images must be normalized as the file's authors did: for DeiT by ImageNet's mean and
deviation, for Google's files by 0.5 and 0.5.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from adderflax.models.transfer import resize_position_embedding
from adderflax.models.vit import PRESETS, VisionTransformerConfig
from adderflax.models.weight_files import read_weight_file, require_finite

_PREFIXES = ("module.", "model.")  # of every name, as PyTorch's DataParallel and Lightning save them
_WRAPPERS = ("model", "state_dict")  # DeiT's files and timm's training checkpoints
_LISTED = 8  # names of one kind that an error prints


class _Leaf(NamedTuple):
    """One of our parameters: its path, and the name, shape and conversion of its array in the file."""

    path: str
    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


def load_vit_weights(file: str | Path, config: VisionTransformerConfig) -> dict[str, Any]:
    """Reads weights of timm, DeiT or google-research's ViT.

    Position embeddings of another image size are resized to the model's grid, the class token's apart. A
    classifier of another number of classes, or none, leaves ours at zero, to be trained; what else differs is
    an error.

    Args:
      file: a state dict as ``.pth``, ``.pt`` (PyTorch must be installed) or ``.safetensors`` (safetensors
        must be), or an ``.npz`` with the names of either family.
      config: a model of the "vit" preset with the file's patch size, width, depth and heads; the number of
        heads cannot be told from a timm file and is taken on trust.

    Returns:
      The float32 parameters, ready for ``VisionTransformer(config).apply({"params": params}, images)``.

    Raises:
      ValueError: the file is of another kind, the model is not a plain ViT, names or shapes do not fit, or
        numbers are not finite; the message lists them.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package that reads such files is not installed.
    """
    return convert_vit_weights(read_weight_file(file), config)


def convert_vit_weights(state: Mapping[str, Any], config: VisionTransformerConfig) -> dict[str, Any]:
    """The same for a state dict of arrays or CPU tensors, by official name.

    Args:
      state: name -> array, bare or under the key "model" or "state_dict".
      config: as in `load_vit_weights`.

    Raises:
      ValueError: as in `load_vit_weights`.
    """
    other = {name: value for name, value in PRESETS["vit"].items() if getattr(config, name) != value}
    if other:
        raise ValueError(
            "Published ViT weights are those of a multiplying network, but this one has "
            f"{', '.join(f'{name}={getattr(config, name)!r}' for name in other)}. Read them into the 'vit'"
            " preset, VisionTransformerConfig.from_variant(variant, 'vit'), and turn that model into this"
            " one with adderflax.models.warm_start."
        )
    if (config.stem, config.pooling) != ("patch", "token"):
        raise ValueError(
            "Published ViTs embed the patches themselves and classify by a class token, but this model has"
            f" stem={config.stem!r} and pooling={config.pooling!r}. Set stem='patch' and pooling='token'."
        )
    state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), state)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items()}
    if "dist_token" in state:
        raise ValueError(
            "These are weights of a distilled DeiT: a second class token (dist_token) takes part in every"
            " attention, and this model has one only. Use the file of the same size without 'distilled' in"
            " its name."
        )
    if "patch_embed.proj.weight" in state:
        family, head, position = _timm_leaves, ("head.weight", "head.bias"), "pos_embed"
    elif "embedding/kernel" in state:
        family, head = _google_leaves, ("head/kernel", "head/bias")
        position = "Transformer/posembed_input/pos_embedding"
    else:
        raise ValueError(
            "These are no ViT weights by timm's names (patch_embed.proj.weight, blocks.0.norm1.weight, ...)"
            f" or google-research's (embedding/kernel, Transformer/...). Found: {_listed(sorted(state))}."
        )

    classes = math.prod(np.shape(state[head[1]])) if head[1] in state else 0
    leaves = list(family(config, _tokens(state.get(position), config), classes))
    if not any(name in state for name in head):
        leaves = [leaf for leaf in leaves if leaf.name not in head]
    if classes != config.num_classes:  # whatever stands between the encoder and a classifier goes with it
        state = {name: array for name, array in state.items() if not name.startswith("pre_logits")}
    _require_fit(state, {leaf.name: leaf.shape for leaf in leaves}, config)

    arrays = {leaf.name: _float32(state[leaf.name]) for leaf in leaves}
    require_finite(arrays)
    flat = {leaf.path: leaf.convert(arrays[leaf.name]) for leaf in leaves}
    if classes != config.num_classes:
        flat["head/kernel"] = np.zeros((config.embed_dim, config.num_classes), np.float32)
        flat["head/bias"] = np.zeros(config.num_classes, np.float32)
    params = {path: jnp.asarray(array) for path, array in flat.items()}
    params["position_embedding"] = resize_position_embedding(params["position_embedding"], config)
    return traverse_util.unflatten_dict(params, sep="/")


def _timm_leaves(config: VisionTransformerConfig, tokens: int, classes: int) -> Iterator[_Leaf]:
    D, P, hidden = config.embed_dim, config.patch_size, config.resolved().mlp_dim

    def linear(path, name, inputs, outputs):
        yield _Leaf(f"{path}/kernel", f"{name}.weight", (outputs, inputs), np.transpose)
        yield _Leaf(f"{path}/bias", f"{name}.bias", (outputs,), np.asarray)

    def norm(path, name):
        yield _Leaf(f"{path}/scale", f"{name}.weight", (D,), np.asarray)
        yield _Leaf(f"{path}/bias", f"{name}.bias", (D,), np.asarray)

    def patches(kernel):  # [D, C, P, P] to rows in the order of our flattened patches
        return kernel.transpose(2, 3, 1, 0).reshape(-1, D)

    yield _Leaf("class_token", "cls_token", (1, 1, D), np.asarray)
    yield _Leaf("position_embedding", "pos_embed", (1, tokens, D), np.asarray)
    yield _Leaf("patch_embedding/kernel", "patch_embed.proj.weight", (D, config.channels, P, P), patches)
    yield _Leaf("patch_embedding/bias", "patch_embed.proj.bias", (D,), np.asarray)
    for index in range(config.depth):
        path, name = f"block_{index}", f"blocks.{index}"
        yield from norm(f"{path}/attention_norm", f"{name}.norm1")
        for part, ours in enumerate(("query", "key", "value")):
            rows = slice(part * D, (part + 1) * D)
            for leaf in linear(f"{path}/attention/{ours}", f"{name}.attn.qkv", D, 3 * D):
                yield leaf._replace(convert=lambda array, rows=rows: array[rows].T)
        yield from linear(f"{path}/attention/out", f"{name}.attn.proj", D, D)
        yield from norm(f"{path}/mlp_norm", f"{name}.norm2")
        yield from linear(f"{path}/mlp/fc1", f"{name}.mlp.fc1", D, hidden)
        yield from linear(f"{path}/mlp/fc2", f"{name}.mlp.fc2", hidden, D)
    yield from norm("norm", "norm")
    yield from linear("head", "head", D, classes)


def _google_leaves(config: VisionTransformerConfig, tokens: int, classes: int) -> Iterator[_Leaf]:
    D, P, hidden = config.embed_dim, config.patch_size, config.resolved().mlp_dim
    heads = (config.num_heads, D // config.num_heads)

    def linear(path, name, inputs, outputs):  # any axes of inputs, any of outputs: both are one for us
        kernel = (math.prod(inputs), math.prod(outputs))
        yield _Leaf(
            f"{path}/kernel", f"{name}/kernel", (*inputs, *outputs), lambda array: array.reshape(kernel)
        )
        yield _Leaf(f"{path}/bias", f"{name}/bias", outputs, np.ravel)

    def norm(path, name):
        yield _Leaf(f"{path}/scale", f"{name}/scale", (D,), np.asarray)
        yield _Leaf(f"{path}/bias", f"{name}/bias", (D,), np.asarray)

    yield _Leaf("class_token", "cls", (1, 1, D), np.asarray)
    position = "Transformer/posembed_input/pos_embedding"
    yield _Leaf("position_embedding", position, (1, tokens, D), np.asarray)
    yield from linear("patch_embedding", "embedding", (P, P, config.channels), (D,))
    for index in range(config.depth):
        path, name = f"block_{index}", f"Transformer/encoderblock_{index}"
        yield from norm(f"{path}/attention_norm", f"{name}/LayerNorm_0")
        attention = f"{name}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            yield from linear(f"{path}/attention/{part}", f"{attention}/{part}", (D,), heads)
        yield from linear(f"{path}/attention/out", f"{attention}/out", heads, (D,))
        yield from norm(f"{path}/mlp_norm", f"{name}/LayerNorm_2")
        yield from linear(f"{path}/mlp/fc1", f"{name}/MlpBlock_3/Dense_0", (D,), (hidden,))
        yield from linear(f"{path}/mlp/fc2", f"{name}/MlpBlock_3/Dense_1", (hidden,), (D,))
    yield from norm("norm", "Transformer/encoder_norm")
    yield from linear("head", "head", (D,), (classes,))


def _tokens(position: Any, config: VisionTransformerConfig) -> int:
    """The file's number of tokens if it is that of a square grid and a class token, else the model's."""
    shape = np.shape(position)
    square = len(shape) == 3 and shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1
    return shape[1] if square else config.num_tokens


def _require_fit(state: Mapping[str, Any], wanted: Mapping[str, tuple], config: VisionTransformerConfig):
    misshapen = [
        f"{name} has {np.shape(state[name])} and needs {shape}"
        for name, shape in wanted.items()
        if name in state and np.shape(state[name]) != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in state],
        "not in the network": [name for name in state if name not in wanted],
        "other shapes": misshapen,
    }
    if any(kinds.values()):
        raise ValueError(
            f"These weights do not fit a ViT with patch_size={config.patch_size}, channels={config.channels},"
            f" embed_dim={config.embed_dim}, num_heads={config.num_heads} and depth={config.depth}. "
            + " ".join(f"{kind}: {_listed(names)}." for kind, names in kinds.items() if names)
        )


def _listed(names: list[str]) -> str:
    more = f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "; ".join(names[:_LISTED]) + more


def _float32(array: Any) -> np.ndarray:
    # NumPy knows no bfloat16, in which some tensors come.
    return np.asarray(array.float() if hasattr(array, "float") else array, np.float32)
