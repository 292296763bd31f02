"""Integer adder layers: a trained model's templates and the inputs that meet them, on one grid a layer.

An adder layer with inputs x and templates w gets one power of two s for both (differences need a common unit;
one shared scale is that of Wang et al. 2021, "AdderNet and its Minimalist Hardware Design"):

    q(v) = clip(round(v / s), -2^(bits - 1), 2^(bits - 1) - 1),      A_o = -sum_i |q(x_i) - q(w_io)|

and computes with s A_o in place of -sum_i |x_i - w_io|; a centered layer adds s sum_i |q(w_io)|. Halves are
rounded to even. The L1 similarity does so with its queries and keys. All of it, accumulators included, is
whole numbers; the rest stays in float32: what happens between layers (LayerNorm, GELU, softmax), layers that
multiply, and an aggregation that adds. Rounding moves the sums of a feature alike in every image, so scale
and bias of the LayerNorm that ends an adder layer are set anew, as in a warm start: on the calibration images
each feature keeps the mean and the deviation that it had. Few bits need that (results/integers.md).

Because s is a power of two and every sum stays below 2^24 s, float32 computes all this exactly: the model
with its values on their grids, run as any other, has the sums of the integers, and `IntegerModel.vectors`
gives them.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.analysis.grids import best_exponent, on_grid, rounded
from adderflax.attention import AdderCrossAttention, AdderSelfAttention
from adderflax.layers import AdderConv, AdderDense, distances_computed_by, geometry
from adderflax.operators import adder_conv, adder_matmul
from adderflax.operators._integer import EXACT

BITS = tuple(range(2, 9))
_TEMPLATES = "adder_kernel"
_MOST_GAIN = 4.0
_MOST_TERMS = EXACT // 255  # as `adderflax.adder_matmul` sums int8


@dataclasses.dataclass(frozen=True)
class IntegerOperation:
    """One sum of differences that a model computes with integers.

    Attributes:
      kind: "dense", "convolution" or "similarity".
      exponent: log2 of the unit s.
      terms: of one sum.
      centered: whether each output adds the constant sum_i |q(w_io)|.
      clipped: share of its operands that lay beyond the grid's ends when it was chosen, 0 to 1.
      geometry: of a convolution, the arguments of `adderflax.adder_conv`, padding in numbers.
    """

    kind: str
    exponent: int
    terms: int
    centered: bool = False
    clipped: float = 0.0
    geometry: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class IntegerModel:
    """A model whose adder layers compute with integers.

    Attributes:
      model: the Linen module, computing in float32.
      variables: its variables, templates already on their grids.
      bits: of inputs and templates, 2 to 8.
      operations: each adder layer, and each attention with an L1 similarity, by its name, such as
        "block_0/mlp/fc1" and "block_0/attention", in the order in which they run.
    """

    model: nn.Module
    variables: Mapping[str, Any]
    bits: int
    operations: Mapping[str, IntegerOperation]

    def apply(self, images_BxHxWxC: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """The logits of normalized images, float32 [B, num_classes]; may be traced.

        Args:
          images_BxHxWxC: normalized images.
          implementation: None sums in float32 what lies on the grids. The name of an implementation sums int8
            by it, "cpu" by instructions for bytes: the same bits, faster. Similarities stay in float32.

        Raises:
          ValueError: the implementation is not known, or cannot be built here.
          NotImplementedError: it is one for another platform than the program's.
        """

        def distances(layer, inputs, kernel):
            if implementation is None or not layer.path:
                return None
            name = _name(layer)
            sums = _sums(layer, self._integers(name, inputs), self._integers(name, kernel), implementation)
            return jnp.ldexp(sums.astype(jnp.float32), self.operations[name].exponent)

        with nn.intercept_methods(self._on_grids), distances_computed_by(distances):
            return self.model.apply(self.variables, images_BxHxWxC)

    def vectors(self, images_BxHxWxC: jax.Array) -> dict[str, np.ndarray]:
        """What goes into the integer sums and what comes out, to hold other implementations against.

        Args:
          images_BxHxWxC: normalized images.

        Returns:
          For every adder layer "NAME/inputs" int8 [B, ..., C] and "NAME/sums" int32 [B, ..., features], the
          sums of -|q(x) - q(w)| without a centered layer's constant; for every L1 similarity
          "NAME/queries" int8 [B, T, heads, d], "NAME/keys" int8 [B, S, heads, d] and "NAME/sums" int32
          [B, heads, T, S].
        """
        found: dict[str, np.ndarray] = {}

        def record(next_function, arguments, keywords, context):
            layer = context.module
            if _adds(context):
                name = _name(layer)
                inputs = self._integers(name, arguments[0])
                found[f"{name}/inputs"] = np.asarray(inputs)
                found[f"{name}/sums"] = np.asarray(_sums(layer, inputs, self._templates(name)))
            outputs = self._on_grids(next_function, arguments, keywords, context)
            if (attention := _similarity_of(context)) is not None:
                name, heads = _name(attention), attention.config.num_heads
                integers = self._integers(name, outputs).reshape(*outputs.shape[:2], heads, -1)
                part = {"query": "queries", "key": "keys"}[layer.name]
                found[f"{name}/{part}"] = np.asarray(integers)
                if part == "keys":  # queries come first
                    queries = jnp.asarray(found[f"{name}/queries"]).transpose(0, 2, 1, 3)
                    scores = adder_matmul(queries, integers.transpose(0, 2, 3, 1))
                    found[f"{name}/sums"] = np.asarray(scores)
            return outputs

        with nn.intercept_methods(record):
            self.model.apply(self.variables, images_BxHxWxC)
        return found

    def templates(self) -> dict[str, np.ndarray]:
        """The integer templates of every adder layer by its name, int8, in the shape of the layer's."""
        layers = (name for name, operation in self.operations.items() if operation.kind != "similarity")
        return {name: np.asarray(self._templates(name)) for name in layers}

    def constants(self) -> dict[str, np.ndarray]:
        """What each output of a centered layer adds to its sum, int32 [features], by the layer's name."""
        return {
            name: np.abs(templates.astype(np.int32))
            .reshape(-1, templates.shape[-1])
            .sum(axis=0, dtype=np.int32)
            for name, templates in self.templates().items()
            if self.operations[name].centered
        }

    def _templates(self, name: str) -> jax.Array:
        flat = traverse_util.flatten_dict(self.variables["params"], sep="/")
        return self._integers(name, flat[f"{name}/{_TEMPLATES}"])

    def _integers(self, name: str, values: jax.Array) -> jax.Array:
        return rounded(values, self.operations[name].exponent, self.bits).astype(jnp.int8)

    def _on_grids(self, next_function, arguments, keywords, context):
        if _adds(context):
            exponent = self.operations[_name(context.module)].exponent
            arguments = (on_grid(arguments[0], exponent, self.bits), *arguments[1:])
        outputs = next_function(*arguments, **keywords)
        if (attention := _similarity_of(context)) is not None:
            outputs = on_grid(outputs, self.operations[_name(attention)].exponent, self.bits)
        return outputs


def quantize(
    model: nn.Module, variables: Mapping[str, Any], images_BxHxWxC: jax.Array, *, bits: int = 8
) -> IntegerModel:
    """The model with integer adder layers, as many as it has; nothing is trained.

    Each layer's unit is the power of two with which its outputs on the calibration images, normalized where
    the layer normalizes, differ least from those without a grid, in the mean square; for an L1 similarity
    these are the logits of a row without their mean, which the softmax ignores. The normalization that a
    layer ends in is set anew for its sums of integers.

    Args:
      model: a `VisionTransformer`, an `AdderResNet`, or another Linen module made of `AdderDense`,
        `AdderConv`, `AdderSelfAttention` and `AdderCrossAttention`, with a dataclass `config` that has a
        `dtype`.
      variables: its trained variables.
      images_BxHxWxC: normalized calibration images; some hundred.
      bits: of inputs and templates, 2 to 8.

    Raises:
      TypeError: the model has no such `config`.
      ValueError: `bits` is not allowed; an adder layer or L1 similarity is not finite, called twice, not
        called, called at another p or inside a transformation of JAX, such as a scan, or has more terms than
        are summed exactly; or there is no image.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits={bits!r} is not known; choose one of {', '.join(map(str, BITS))}.")
    if len(images_BxHxWxC) == 0:
        raise ValueError("There are no calibration images; take some hundred of the training set.")
    model = in_float32(model)
    operations: dict[str, IntegerOperation] = {}
    norms: dict[str, Mapping[str, jax.Array]] = {}
    queries: dict[str, jax.Array] = {}

    def calibrate(next_function, arguments, keywords, context):
        outputs, layer = next_function(*arguments, **keywords), context.module
        if _adds(context):
            _require_plain_call(layer, arguments, keywords, outputs, operations)
            name = _name(layer)
            operations[name], norms[name] = _layer_operation(layer, arguments[0], outputs, bits)
        if (attention := _similarity_of(context)) is not None:
            name = _name(attention)
            _require_seen_once(name, outputs, operations)
            if layer.name == "query":  # it comes before the key
                queries[name] = outputs
            else:
                heads = attention.config.num_heads
                operations[name] = _similarity_operation(queries.pop(name), outputs, heads, bits)
        return outputs

    with nn.intercept_methods(calibrate):
        model.apply(variables, images_BxHxWxC)
    for name, operation in operations.items():
        if operation.terms > _MOST_TERMS:
            raise ValueError(
                f"{name} sums {operation.terms} terms, and {_MOST_TERMS} are the most whose sums of int8 are"
                " exact. Cut the layer in two."
            )
    flat = traverse_util.flatten_dict(variables)
    templates = {path: "/".join(path[1:-1]) for path in flat if path[-1] == _TEMPLATES}
    if unused := sorted(set(templates.values()) - operations.keys()):
        raise ValueError(
            f"The model has templates that it does not call: {', '.join(unused)}. Nothing says which inputs"
            " meet them: leave them out of the variables."
        )
    for path, name in templates.items():
        flat[path] = on_grid(jnp.asarray(flat[path]), operations[name].exponent, bits)
        flat |= {(*path[:-1], "norm", part): value for part, value in norms[name].items()}
    return IntegerModel(model, traverse_util.unflatten_dict(flat), bits, operations)


def in_float32(model: nn.Module) -> nn.Module:
    """The model that computes in float32, without rematerialization, which recording would not survive.

    Raises:
      TypeError: the model has no dataclass `config` with a `dtype`.
    """
    described = getattr(model, "config", None)
    if not dataclasses.is_dataclass(described) or not hasattr(described, "dtype"):
        raise TypeError(
            f"{type(model).__name__} has no field `config`, a dataclass with the dtype in which it computes;"
            " add one, as VisionTransformer has it."
        )
    wanted = {"dtype": "float32", "remat": False}
    fields = {field.name for field in dataclasses.fields(model.config)}
    return model.clone(
        config=dataclasses.replace(model.config, **{name: wanted[name] for name in wanted.keys() & fields})
    )


def _layer_operation(
    layer: AdderDense | AdderConv, inputs: jax.Array, outputs: jax.Array, bits: int
) -> tuple[IntegerOperation, Mapping[str, jax.Array]]:
    """The layer's operation, and the parameters of its normalization, none where it has none."""
    params = dict(layer.variables["params"])
    kernel, norm = params[_TEMPLATES], params.get("norm", {})
    # A power comes after the normalization.
    detached = layer.copy(parent=None, power_activation=False)
    wanted = detached.apply({"params": params}, inputs) if layer.power_activation else outputs

    moments: dict[int, tuple[jax.Array, jax.Array]] = {}

    def error(exponent: int) -> float:
        given = params | {_TEMPLATES: on_grid(kernel, exponent, bits)}
        found = detached.apply({"params": given}, on_grid(inputs, exponent, bits))
        gain, offset = moments[exponent] = _matching(found, wanted) if norm else (1.0, 0.0)
        return float(jnp.mean(jnp.square(gain * found + offset - wanted)))

    exponent, clipped = best_exponent(bits, error, inputs, kernel)
    if norm:
        gain, offset = map(jnp.ravel, moments[exponent])
        norm = {"scale": norm["scale"] * gain, "bias": norm["bias"] * gain + offset}
    terms, shared = math.prod(kernel.shape[:-1]), {"centered": layer.centered, "clipped": clipped}
    if isinstance(layer, AdderDense):
        return IntegerOperation("dense", exponent, terms, **shared), norm
    window = geometry(layer)
    if isinstance(layer.padding, str):
        reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, window["dilation"])]
        pads = jax.lax.padtype_to_pads(inputs.shape[1:3], reach, window["strides"], layer.padding)
        window["padding"] = tuple(pads)
    return IntegerOperation("convolution", exponent, terms, geometry=window, **shared), norm


def _matching(found: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gain and offset of each feature, the last axis, that give found the mean and deviation of wanted."""
    axes = tuple(range(found.ndim - 1))
    (mean, deviation), (wanted_mean, wanted_deviation) = (
        (jnp.mean(values, axes, keepdims=True), jnp.std(values, axes, keepdims=True))
        for values in (found, wanted)
    )
    # What hardly varies any more would be noise, made larger.
    gain = jnp.where(deviation > 0, jnp.minimum(wanted_deviation / deviation, _MOST_GAIN), 1.0)
    return gain, wanted_mean - gain * mean


def _similarity_operation(
    query_BxTxD: jax.Array, key_BxSxD: jax.Array, heads: int, bits: int
) -> IntegerOperation:

    def logits(query, key):
        query, key = (array.reshape(*array.shape[:2], heads, -1) for array in (query, key))
        scores = adder_matmul(query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1))
        return scores - jnp.mean(scores, axis=-1, keepdims=True)

    wanted = logits(query_BxTxD, key_BxSxD)

    def error(exponent: int) -> float:
        found = logits(*(on_grid(array, exponent, bits) for array in (query_BxTxD, key_BxSxD)))
        return float(jnp.mean(jnp.square(found - wanted)))

    exponent, clipped = best_exponent(bits, error, query_BxTxD, key_BxSxD)
    return IntegerOperation("similarity", exponent, query_BxTxD.shape[-1] // heads, clipped=clipped)


def _require_plain_call(
    layer: nn.Module, arguments: tuple, keywords: dict, outputs: jax.Array, seen: Mapping
) -> None:
    """Raises a ValueError unless this is the layer's only call, in view, of its inputs alone or at p = 1."""
    _require_seen_once(_name(layer), outputs, seen)
    powers = [*arguments[1:], *keywords.values()]
    if not arguments or not all(isinstance(p, numbers.Real) and p == 1 for p in powers):
        raise ValueError(
            f"{_name(layer)} is not called as layer(inputs) at p = 1, so its sums are not those of integers."
            " Call it so."
        )


def _require_seen_once(name: str, outputs: jax.Array, seen: Mapping) -> None:
    """Raises a ValueError if outputs have no values here, or are a second call's."""
    if isinstance(outputs, jax.core.Tracer):
        raise ValueError(
            f"{name} is called inside a transformation of JAX, such as jit, scan or remat, where its"
            " values cannot be seen. Call it outside of any."
        )
    if name in seen:
        raise ValueError(
            f"{name} is called twice: its integers would not be those of every call. Give each call a layer"
            " of its own."
        )


def _sums(
    layer: nn.Module, inputs: jax.Array, templates: jax.Array, implementation: str | None = None
) -> jax.Array:
    """The integer sums of an adder layer, int32."""
    if isinstance(layer, AdderConv):
        return adder_conv(inputs, templates, **geometry(layer), implementation=implementation)
    rows = inputs.reshape(-1, inputs.shape[-1])
    return adder_matmul(rows, templates, implementation=implementation).reshape(*inputs.shape[:-1], -1)


def _adds(context: nn.module.InterceptorContext) -> bool:
    """Whether this is the call of an adder layer of the model; one that is tried by itself has no path."""
    layer = context.module
    return context.method_name == "__call__" and isinstance(layer, (AdderDense, AdderConv)) and layer.path


def _similarity_of(
    context: nn.module.InterceptorContext,
) -> AdderSelfAttention | AdderCrossAttention | None:
    """The attention whose L1 similarity meets the outputs of this call, if there is one."""
    layer, attention = context.module, context.module.parent
    meets = context.method_name == "__call__" and layer.name in ("query", "key")
    attends = isinstance(attention, (AdderSelfAttention, AdderCrossAttention))
    return attention if meets and attends and attention.config.similarity == "l1" else None


def _name(module: nn.Module) -> str:
    return "/".join(module.path)
