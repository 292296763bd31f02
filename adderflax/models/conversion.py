"""Warm start: the weights of a trained multiplying ViT, turned into those of an adder or mixed one.

What multiplies in both models and what is no linear layer is copied. A layer that is to add gets templates
that follow the dense kernel k, given its inputs x_i with mean mu_i and deviation sigma_i on calibration
images::

    w_io = mu_i + sigma_i k_io / r_o,      r_o^2 = sum_i sigma_i^2 k_io^2 / sum_i sigma_i^2

Why: around its mean, the regression of -|x - w| on a normal x has the slope erf(t / sqrt 2) with
t = (w - mu) / sigma, odd and nearly proportional to t; so t_io proportional to k_io weighs the inputs as the
dense layer does, whatever their means and deviations. Small t leave the inputs' signs only, large t the
templates' signs only: both ends correlate with the dense output by sqrt(2/pi) = 0.80. The LayerNorm takes out
the -sum_i |x_i - mu_i| that all outputs share, and the rest is symmetric in x and t; that is why the best
deviation of t is 1, that of the normalized inputs. Correlation of an output after the LayerNorm with the
dense output, over 1,500 random inputs and 192 outputs, as `python -m benchmarks.templates` prints it:

    inputs, fan-in                      rule          t: 0.1   0.3   0.7   1.0   1.4   2.0   4.0
    N(0, 1), 192; 64, 768: +-0.003      mu + sigma t    0.819 0.852 0.883 0.887 0.883 0.871 0.844
    N(mu_i, sigma_i), 192               mu + sigma t    0.817 0.850 0.881 0.886 0.883 0.872 0.845
    the same                            t alone         0.631 0.665 0.719 0.749 0.778 0.806 0.843
    GELU of N(mu_i, sigma_i), 192       mu + sigma t    0.822 0.837 0.849 0.854 0.858 0.859 0.848
    the same                            t alone         0.589 0.651 0.728 0.762 0.789 0.810 0.828

(sigma_i log-normal, 0.7 and 0.5; mu_i normal, 1 and 0.5 with -0.5 before the GELU.) Replacing t by the exact
inverse of the slope gains 0.001 for normal inputs and 0.005 for GELU's, medians and quantiles in place of
moments lose.

Then each output's mean and deviation are matched to the source's, by the scale and bias of the normalization.
For a twin of 4 blocks, trained on the digits to 78 % and converted with 256 training images, the logits of
the 359 test images correlate with the source's by 0.59 for the adder preset (32 % correct), 0.75 with a dot
similarity (47 %); by 0.18 without matched normalizations (10 %), 0.04 with random templates under matched
ones (10 %).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.layers import AdderConv, AdderDense, geometry
from adderflax.models.classifier import abstract_variables
from adderflax.models.vit import VisionTransformer, VisionTransformerConfig
from adderflax.operators import adder_attention

Path = tuple[str, ...]
_SIZES = ("image_size", "patch_size", "channels", "num_classes", "embed_dim", "num_heads", "mlp_dim", "depth")
_SIZES += ("mlp_kernel_size", "stem", "pooling")
_ATTENTION = ("similarity", "aggregation", "identity", "attention_scale")
_KERNEL, _TEMPLATES = ("kernel",), ("adder_kernel",)
_SCALE, _BIAS, _POWER = ("norm", "scale"), ("norm", "bias"), ("power",)
# Of an output of the fresh LayerNorm over tokens and images. Below it there is rounding only.
_MIN_DEVIATION = 1e-4


def warm_start(
    params: Mapping[str, Any],
    config_from: VisionTransformerConfig,
    config_to: VisionTransformerConfig,
    images_BxHxWxC: jax.Array,
) -> dict[str, Any]:
    """Parameters for `config_to` that compute nearly what `params` compute under `config_from`.

    Both models see the images once. Layers are converted in the order in which they run, each on the outputs
    of the converted layers before it: templates are set as this module's documentation says, then scale and
    bias of the layer's normalization such that every output has the mean and the deviation, over all images
    and tokens, of the source's same layer (of its normalized output where the source normalizes). Only where
    the similarity changes, queries and keys get a factor for each head besides, with which the attention
    logits of a row deviate as the source's. Layers without a normalization are copied, and so is everything
    if no arithmetic differs between the two configs. A power activation that the source does not have starts
    at the power 1; a layer that has it in both is copied.

    An identity, similarity or aggregation that differs has no weights to convert: it costs agreement that
    only training returns.

    Args:
      params: float32 parameters of ``VisionTransformer(config_from)``.
      config_from: the trained model; layers that are to add multiply here.
      config_to: the model to start. A linear layer that differs from the source's must have a
        normalization.
      images_BxHxWxC: normalized calibration images as training has them; some hundred give stable moments,
        even of the classifier, which sees one token an image. Their order does not matter.

    Raises:
      ValueError: the sizes differ, `params` do not fit `config_from`, or a layer cannot be converted; the
        message names them.
    """
    # The weights do not depend on these, and recording would not survive rematerialization.
    plain = {"dtype": "float32", "remat": False, "drop_path_rate": 0.0}
    config_from = dataclasses.replace(config_from, **plain)
    config_to = dataclasses.replace(config_to, **plain)
    _require_equal_sizes(config_from, config_to)
    source, target = traverse_util.flatten_dict(params), _shapes(config_to)
    _require_fit(source, config_from)
    layers = sorted({path[:-1] for path in target if path[-1:] in (_KERNEL, _TEMPLATES)})
    parts = {layer: (_part(source, layer), _part(target, layer)) for layer in layers}
    differing = [layer for layer in layers if _differs(*parts[layer])]
    for layer in differing:
        _require_convertible(layer, *parts[layer])
    # Where nothing differs all is copied; otherwise even a layer that multiplies in both sees other inputs.
    differs = differing or any(getattr(config_from, name) != getattr(config_to, name) for name in _ATTENTION)
    # The same templates under another offset are another function, which scale and bias take back in part.
    adds = any(path[-1:] == _TEMPLATES for path in source)
    differs = differs or (adds and config_from.centered != config_to.centered)
    layers = [layer for layer in layers if differs and _can_be_matched(*parts[layer])]
    sharpen = config_from.similarity != config_to.similarity

    # What multiplies in both models and what is no linear layer has the same path in both.
    result = {path: source.get(path, _neutral(path, shape)) for path, shape in target.items()}
    queries, moments = {}, {}

    def record(next_function, arguments, keywords, context):
        outputs, layer = next_function(*arguments, **keywords), context.module.path
        if layer not in layers:
            return outputs
        moments[layer] = _moments(outputs)
        if sharpen and layer[-1] == "query":
            queries[layer[:-1]] = outputs
        if sharpen and layer[-1] == "key":
            attention = layer[:-1]
            factor = _sharpness_factor(config_from, config_to, queries.pop(attention), outputs)
            for path in (attention + ("query",), layer):
                moments[path] = tuple(moment * factor for moment in moments[path])
        return outputs

    def convert(next_function, arguments, keywords, context):
        layer = context.module.path
        if layer not in layers:
            return next_function(*arguments, **keywords)
        inputs = arguments[0]
        part = _part(result, layer)
        part |= {path: _neutral(path, part[path].shape) for path in (_SCALE, _BIAS)}
        if _TEMPLATES in part and layer + _TEMPLATES not in source:
            part[_TEMPLATES] = dense_templates(source[layer + _KERNEL], inputs)
        detached = context.module.copy(parent=None)
        part |= _matching(detached, part, inputs, moments[layer])
        result.update({layer + path: leaf for path, leaf in part.items()})
        return detached.apply({"params": traverse_util.unflatten_dict(part)}, inputs)

    with nn.intercept_methods(record):
        VisionTransformer(config_from).apply({"params": params}, images_BxHxWxC)
    with nn.intercept_methods(convert):
        VisionTransformer(config_to).apply({"params": traverse_util.unflatten_dict(result)}, images_BxHxWxC)
    return traverse_util.unflatten_dict(result)


def warm_start_layer(
    layer: AdderDense | AdderConv, params: Mapping[str, Any], inputs: jax.Array
) -> dict[str, Any]:
    """Parameters of one adder layer that computes nearly what a trained layer that multiplies does.

    Templates follow the kernel as this module's documentation says, and scale and bias of the layer's
    normalization give each output the mean and the deviation, over all inputs, that it had.

    Args:
      layer: the layer to start, an `AdderDense` or `AdderConv` with ``normalization="layer"``.
      params: of an `nn.Dense`, "kernel" [in, features], or of an `nn.Conv` with the same window, "kernel"
        [height, width, in / feature_group_count, features]; and "bias" [features] where it has one.
      inputs: what the layer meets, [..., in] or [N, H, W, in], two vectors or more, of which some hundred
        give stable moments.

    Returns:
      What ``layer.apply({"params": ...}, inputs)`` takes, float32.

    Raises:
      ValueError: the layer is none that adds, or has no normalization, features are in groups but not
        depthwise, or the shapes do not fit; the message says which.
    """
    if not isinstance(layer, (AdderDense, AdderConv)):
        raise ValueError(f"The layer to start must be an AdderDense or AdderConv, got {layer!r}.")
    if "kernel" not in params:
        raise ValueError(
            f"params has {', '.join(map(repr, params))}, but needs 'kernel', and 'bias' where there is one:"
            " the parameters of the trained layer alone."
        )
    kernel = jnp.asarray(params["kernel"], jnp.float32)
    inputs = jnp.asarray(inputs, jnp.float32)
    if layer.normalization != "layer":
        raise ValueError(
            f"normalization={layer.normalization!r} leaves the layer nothing to match the outputs with. Set"
            " normalization='layer'."
        )
    layer = layer.copy(parent=None, dtype=jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"]
    if kernel.shape != (wanted := shapes["adder_kernel"].shape):
        raise ValueError(
            f"The kernel has shape {kernel.shape}, but with inputs {inputs.shape} the layer's templates have"
            f" {wanted}. Give the parameters of a layer with as many inputs and features and the same window."
        )
    if math.prod(inputs.shape[:-1]) < 2:
        raise ValueError(
            f"The inputs have shape {inputs.shape}: of fewer than two vectors there is no deviation to match."
            " Give what the layer meets, some hundred."
        )
    bias = (
        jnp.zeros(layer.features) if params.get("bias") is None else jnp.asarray(params["bias"], jnp.float32)
    )
    if bias.shape != (layer.features,):
        raise ValueError(
            f"The bias has shape {bias.shape}, but a layer of {layer.features} features has one of"
            f" ({layer.features},)."
        )
    if isinstance(layer, AdderConv):
        if 1 < (groups := layer.feature_group_count) != inputs.shape[-1]:
            raise ValueError(
                f"feature_group_count={groups} is neither 1 nor that of a depthwise convolution,"
                f" {inputs.shape[-1]}; only these are converted."
            )
        window = geometry(layer)
        outputs = jax.lax.conv_general_dilated(
            inputs,
            kernel,
            window["strides"],
            window["padding"],
            rhs_dilation=window["dilation"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    else:
        outputs = inputs @ kernel
    outputs = outputs + jnp.broadcast_to(bias, outputs.shape)
    part = {path: _neutral(path, leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes).items()}
    part[_TEMPLATES] = dense_templates(kernel, inputs)
    part |= _matching(layer, part, inputs, _moments(outputs))
    return traverse_util.unflatten_dict(part)


def _matching(
    layer: nn.Module,
    part: Mapping[Path, Any],
    inputs: jax.Array,
    wanted: tuple[jax.Array, jax.Array],
) -> dict[Path, jax.Array]:
    """Scale and bias with which the layer's outputs have the wanted mean and deviation; neutral in `part`."""
    mean, deviation = _moments(layer.apply({"params": traverse_util.unflatten_dict(dict(part))}, inputs))
    scale = wanted[1] / jnp.maximum(deviation, _MIN_DEVIATION)
    return {_SCALE: scale, _BIAS: wanted[0] - scale * mean}


def dense_templates(kernel_IxO: jax.Array, inputs: jax.Array) -> jax.Array:
    """Templates [I, O] that follow a dense kernel, for a layer that sees `inputs` [..., I].

    A convolution's kernel, [height, width, I, O], gives its templates likewise: every position sees the same
    features. A depthwise one is [height, width, 1, O], and each output sees one feature.
    """
    shape, features = kernel_IxO.shape, inputs.shape[-1]
    kernel_IxO = kernel_IxO.reshape(-1, shape[-1])
    if len(shape) == 4 and shape[2] == 1 < features:
        mean_IxO, deviation_IxO = (jnp.repeat(m, shape[-1] // features)[None] for m in _moments(inputs))
    else:
        positions = math.prod(shape[:-2])
        mean_IxO, deviation_IxO = (jnp.tile(m, positions)[:, None] for m in _moments(inputs))
    variance_IxO = jnp.broadcast_to(jnp.square(deviation_IxO), kernel_IxO.shape)
    total_O = jnp.maximum(jnp.sum(variance_IxO, axis=0), 1e-12)
    rms_O = jnp.sqrt(jnp.sum(variance_IxO * jnp.square(kernel_IxO), axis=0) / total_O)
    # An output that ignores its inputs, as those of a new classifier do, keeps doing so by a scale of 0; its
    # templates are drawn, so that equal ones do not stay equal in training.
    drawn_IxO = jax.random.normal(jax.random.key(0), kernel_IxO.shape)
    relative_IxO = jnp.where((rms_O > 0)[None], kernel_IxO / rms_O[None], drawn_IxO)
    return (mean_IxO + deviation_IxO * relative_IxO).reshape(shape)


def _sharpness_factor(
    config_from: VisionTransformerConfig,
    config_to: VisionTransformerConfig,
    query_BxTxD: jax.Array,
    key_BxTxD: jax.Array,
) -> jax.Array:
    """Factor [D] on queries and keys that gives the attention logits of each head the source's deviation."""

    def deviation(config):
        shape = (*query_BxTxD.shape[:2], config.num_heads, -1)
        query, key = query_BxTxD.reshape(shape), key_BxTxD.reshape(shape)
        _, weights_BxHxTxT = adder_attention(
            query,
            key,
            key,
            identity=False,
            similarity=config.similarity,
            scale=config.attention_scale,
            return_weights=True,
            implementation=config.implementation,
        )
        # Within a row these are the logits; what is common to a row, the softmax ignores.
        logits_BxHxTxT = jnp.log(jnp.maximum(weights_BxHxTxT, jnp.finfo(jnp.float32).tiny))
        return jnp.sqrt(jnp.mean(jnp.var(logits_BxHxTxT, axis=-1), axis=(0, 2)))

    wanted_H, found_H = deviation(config_from), deviation(config_to)
    factor_H = wanted_H / jnp.maximum(found_H, _MIN_DEVIATION)
    if config_to.similarity == "dot":  # a product of both, where the distance is proportional to them
        factor_H = jnp.sqrt(factor_H)
    return jnp.repeat(factor_H, config_to.embed_dim // config_to.num_heads)


def _neutral(path: Path, shape: tuple[int, ...]) -> jax.Array:
    """What a parameter without a source starts from: a normalization's scale at 1, the rest at 0."""
    return jnp.ones(shape) if path[-1] == "scale" else jnp.zeros(shape)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each feature over all other axes."""
    axes = tuple(range(x.ndim - 1))
    return jnp.mean(x, axes), jnp.std(x, axes)


def _part(flat: Mapping[Path, Any], layer: Path) -> dict[Path, Any]:
    """The parameters under a layer, by their paths inside of it."""
    return {path[len(layer) :]: leaf for path, leaf in flat.items() if path[: len(layer)] == layer}


def _shapes(config: VisionTransformerConfig) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    params = abstract_variables(VisionTransformer(config))["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def _require_equal_sizes(config_from: VisionTransformerConfig, config_to: VisionTransformerConfig) -> None:
    def sizes(config):
        found = {name: getattr(config, name) for name in _SIZES}
        return found | {"mlp_dim": config.resolved().mlp_dim}

    ours, theirs = sizes(config_to), sizes(config_from)
    if ours["patch_size"] != theirs["patch_size"]:
        theirs["image_size"] = ours["image_size"]  # which would be transferred, were the patches alike
    if different := [name for name in _SIZES if ours[name] != theirs[name]]:
        raise ValueError(
            "A warm start needs a source of the same sizes, but "
            + ", ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in different)
            + ". Set them alike, or start from another model."
        )


def _require_fit(source: Mapping[Path, Any], config: VisionTransformerConfig) -> None:
    wanted, found = _shapes(config), {path: np.shape(leaf) for path, leaf in source.items()}
    wrong = [path for path in wanted.keys() | found.keys() if found.get(path) != wanted.get(path)]
    if wrong:
        names = sorted("/".join(path) for path in wrong)
        raise ValueError(
            "The source's parameters are not those of the model that is said to have them. Missing, extra or"
            f" of another shape: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Give the"
            " configuration they were trained with."
        )


def _differs(source: Mapping[Path, Any], target: Mapping[Path, Any]) -> bool:
    """Whether a layer loses parameters or gains a normalization; a bias or power that it gains is neutral."""
    return bool(source.keys() - target.keys()) or _SCALE in target.keys() - source.keys()


def _can_be_matched(source: Mapping[Path, Any], target: Mapping[Path, Any]) -> bool:
    """Whether scale and bias are the last to act on the outputs; a trained power would act after them."""
    return _SCALE in target and not (_POWER in source and _POWER in target)


def _require_convertible(layer: Path, source: Mapping[Path, Any], target: Mapping[Path, Any]) -> None:
    name = "/".join(layer)
    if _TEMPLATES in source and _TEMPLATES not in target:
        raise ValueError(
            f"{name} adds in the source and multiplies in the model to start; only dense kernels can be"
            " converted. Let it add here too, or start from a model in which it multiplies."
        )
    if _SCALE not in target:
        raise ValueError(
            f"{name} differs between the source ({_listed(source)}) and the model to start"
            f" ({_listed(target)}), which has no normalization there to match the outputs with. Set"
            " normalization='layer', or make the layer the same in both."
        )


def _listed(paths: Mapping[Path, Any]) -> str:
    return ", ".join(sorted("/".join(path) for path in paths))
