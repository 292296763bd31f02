"""A Vision Transformer in whole numbers from its pixels to its logits, from its integer adder layers.

`adderflax.analysis.integers` leaves float32 between its sums. Here nothing is left in it, as in Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", and for
transformers Kim et al. 2021, "I-BERT: Integer-only BERT Quantization". Every value has a unit, a power of
two, so that a change of units is a shift; nothing is trained. integer_only.md defines each step, and
`IntegerOnly`, in NumPy alone, computes them.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.analysis.accumulators import integer_only_accumulators, told
from adderflax.analysis.grids import best_exponent, on_grid
from adderflax.analysis.integer_only_reference import (
    ONE,
    PLACES,
    ROOT,
    SOFTMAX,
    TABLE,
    WIDE,
    IntegerOnly,
)
from adderflax.analysis.integer_reference import distances
from adderflax.analysis.integers import IntegerModel
from adderflax.data import DatasetInfo, normalize_batch
from adderflax.layers import AdderConv, AdderDense, MultiplyConv, MultiplyDense, signed_power
from adderflax.models.vit import VisionTransformer
from adderflax.operators import adder_matmul

INTEGER_ONLY_FORMAT = 1
_MULTIPLYING = (MultiplyDense, MultiplyConv)
_LINEAR = (AdderDense, AdderConv, *_MULTIPLYING)
_GELU_IS_ZERO = 6.0  # below its negative
_FINEST_STREAM = -16
_MULTIPLIED = 8  # bits of what is multiplied
_MULTIPLIER = 15  # bits of a constant that what is computed is multiplied by, without its sign


def integer_only_model(integers: IntegerModel, images_BxHxWxC: np.ndarray, info: DatasetInfo) -> IntegerOnly:
    """The model without a float; its adder layers compute as in `integers`.

    Args:
      integers: a `VisionTransformer`, from `adderflax.analysis.integers.quantize`.
      images_BxHxWxC: uint8 calibration images; some hundred. Their values choose the units.
      info: the data set that they are from.

    Returns:
      The model, which multiplies and adds with whatever is fastest here; the integers are those of NumPy.

    Raises:
      ValueError: the model is another one, its attention_scale is below 0, a weight is not finite, or there
        is no image.
    """
    if not isinstance(integers.model, VisionTransformer):
        raise ValueError(
            f"A {type(integers.model).__name__} has no form in whole numbers alone; a VisionTransformer"
            " has. Export it without integer_only."
        )
    scale = integers.model.config.resolved().attention_scale
    if scale < 0:
        raise ValueError(
            f"attention_scale={scale} is below 0, and a softmax in whole numbers begins with the largest"
            " score: export the model without integer_only."
        )
    if len(images_BxHxWxC) == 0:
        raise ValueError("There are no calibration images; take some hundred of the training set.")
    seen = _look(integers, normalize_batch(images_BxHxWxC, info))
    described, arrays = _Writer(integers, info, seen).written()
    for name, accumulator in integer_only_accumulators(described, arrays).items():
        entries = described["layers" if name in described["layers"] else "attentions"]
        entries[name] |= told(accumulator)
    return computing_fast(described, arrays)


def computing_fast(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> IntegerOnly:
    """The model of these files with exact operators that are faster than NumPy's loops."""
    return IntegerOnly(described, arrays, _distances, _matmul)


def at_the_limits(whole: IntegerOnly) -> dict[str, np.ndarray]:
    """Inputs of `IntegerOnly.trace_limits` that clip and round as those of ordinary images do not.

    Streams int16 [6, T, D]: nothing but zeros; the largest value everywhere; the least; a feature of each
    token the largest and all others 0; both in turn over features and tokens; noise over the whole range.
    Falls int64 [n] and values entered int32 [n]: halves that are rounded, and both sides of each end.
    """
    T, D = whole.arrays["position_embedding"].shape[-2:]
    lowest, highest = -(2 ** (WIDE - 1)), 2 ** (WIDE - 1) - 1
    token, feature = np.ogrid[:T, :D]
    turns = np.where((token + feature) % 2, highest, lowest)
    noise = np.random.default_rng(0).integers(lowest, highest, (T, D), endpoint=True)
    streams = [0, highest, lowest, np.where(feature == token % D, highest, 0), turns, noise]
    step = np.int64(1) << max(whole.described["attentions"]["block_0/attention"]["shift"] - 1, 0)
    powers = (2 << SOFTMAX) * np.array([1, ONE, ONE + 1, ONE + 2, 31, 32, 33, 64, 1000])
    falls = np.concatenate([np.arange(9), powers - 1, powers]) * step
    end = 1 << TABLE - 1 + PLACES
    around = np.arange(-(2**PLACES), 2**PLACES + 1)
    return {
        "tokens": np.stack([np.broadcast_to(np.int16(stream), (T, D)) for stream in streams]),
        "falls": np.concatenate([falls, falls[1:] - 1]),
        "entered": np.int32(np.concatenate([around - end, around, around + end, [-4 * end, 4 * end]])),
    }


_sums = jax.jit(adder_matmul)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if max(np.max(x), np.max(y)) > 127 or min(np.min(x), np.min(y)) < -128:  # of an L1 aggregation
        return distances(x, y) if x.ndim == 2 else np.stack([_distances(*pair) for pair in zip(x, y)])
    return np.int64(_sums(np.int8(x), np.int8(y)))


def _matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.shape[-1] == 1:  # of a depthwise convolution
        return x * y
    # Sums here stay below 2^53, so that float64 is exact, and NumPy has no fast product of integers.
    return np.int64(np.matmul(np.float64(x), np.float64(y)))


@dataclasses.dataclass
class _Seen:
    """What the calibration images give, by names of modules.

    Attributes:
      layers: linear layers, embedding, classifier and normalizations, in the order in which they run.
      entered: the largest magnitude of their inputs.
      left: the largest magnitude of their outputs.
      grids: best exponent of the inputs of each layer that multiplies.
      parts: best exponent of each query, key and value.
    """

    layers: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    entered: dict[str, float] = dataclasses.field(default_factory=dict)
    left: dict[str, float] = dataclasses.field(default_factory=dict)
    grids: dict[str, int] = dataclasses.field(default_factory=dict)
    parts: dict[str, int] = dataclasses.field(default_factory=dict)


def _look(integers: IntegerModel, images_BxHxWxC: jax.Array) -> _Seen:
    seen = _Seen()

    def record(next_function, arguments, keywords, context):
        outputs, layer = next_function(*arguments, **keywords), context.module
        if context.method_name == "__call__" and isinstance(layer, (*_LINEAR, nn.LayerNorm)):
            name = "/".join(layer.path)
            seen.layers[name] = layer
            for largest, values in ((seen.entered, arguments[0]), (seen.left, outputs)):
                largest[name] = float(jnp.max(jnp.abs(values)))
            if isinstance(layer, _MULTIPLYING):
                seen.grids[name] = _grid(arguments[0])
            if layer.name in ("query", "key", "value"):
                seen.parts[name] = _grid(outputs)
        return outputs

    with nn.intercept_methods(record):
        integers.apply(images_BxHxWxC)
    return seen


def _grid(values: jax.Array) -> int:
    """The exponent of the unit in which these values, multiplied, are rounded with the least error."""

    def error(exponent: int) -> float:
        return float(jnp.mean(jnp.square(on_grid(values, exponent, _MULTIPLIED) - values)))

    return best_exponent(_MULTIPLIED, error, values)[0]


def _wide(largest: float) -> int:
    """The exponent of the finest unit in which `WIDE` bits hold twice as much."""
    return math.ceil(math.log2(2 * largest)) - (WIDE - 1) if largest > 0 else 0


def _multiplier(factors: np.ndarray) -> tuple[np.ndarray, int]:
    """Whole numbers m and places s with factors = m / 2^s, the largest m of `_MULTIPLIER` bits."""
    largest = float(np.max(np.abs(factors)))
    places = _MULTIPLIER - 1 - math.floor(math.log2(largest)) if largest > 0 else 0
    ends = 2**_MULTIPLIER - 1
    return np.clip(np.rint(factors * 2.0**places), -ends, ends).astype(np.int16), places


class _Writer:
    """Writes down a model: see integer_only.md for what."""

    def __init__(self, integers: IntegerModel, info: DatasetInfo, seen: _Seen):
        self._integers, self._info, self._seen = integers, info, seen
        self._config = integers.model.config.resolved()
        flat = traverse_util.flatten_dict(integers.variables["params"], sep="/")
        self._params = {name: np.asarray(array, np.float64) for name, array in flat.items()}
        if not all(np.all(np.isfinite(array)) for array in self._params.values()):
            raise ValueError(
                "Weights are not finite, so no integers stand for them: the run has diverged. Export an"
                " earlier checkpoint, with --best."
            )
        self._templates, self._constants = integers.templates(), integers.constants()
        self._arrays: dict[str, np.ndarray] = {}
        self._layers: dict[str, Any] = {}
        self._norms: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}

    def written(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        config, seen = self._config, self._seen
        names = [f"block_{index}" for index in range(config.depth)]
        before = [f"{name}/{part}_norm" for name in names for part in ("attention", "mlp")] + ["norm"]
        # A finer unit would leave no room for epsilon in 64 bits.
        stream = max(
            _FINEST_STREAM, _wide(max(seen.left["patch_embedding"], *(seen.entered[name] for name in before)))
        )
        for name in before:
            self._norm(name, stream)
        for name, layer in seen.layers.items():
            if isinstance(layer, _LINEAR):
                self._layer(name, layer)
        attentions = {f"{name}/attention": self._attention(f"{name}/attention") for name in names}
        for name in names:
            widest = seen.left[f"{name}/mlp/fc1"] + seen.left.get(f"{name}/mlp/conv", 0.0)
            self._gelu(f"{name}/mlp/gelu", widest, f"{name}/mlp/fc2")
        stems = [name for name in self._layers if name.startswith("stem_")]
        for name, follower in zip(stems, [*stems[1:], "patch_embedding"]):
            self._gelu(f"{name}/gelu", seen.left[name], follower)
        for name in ("position_embedding", "class_token"):
            if name in self._params:
                self._arrays[name] = _whole(self._params[name], stream, WIDE)
        places = np.arange(2**SOFTMAX)
        self._arrays["exponentials"] = np.int32(np.rint(2.0 ** (ONE - places / 2**SOFTMAX)))
        described = {
            "format": INTEGER_ONLY_FORMAT,
            "model": dataclasses.asdict(config),
            "pixels": self._pixels(next(iter(self._layers))),
            "stream": {"exponent": stream},
            "layers": self._layers,
            "norms": self._norms,
            "attentions": attentions,
            "tables": self._tables,
        }
        return json.loads(json.dumps(described)), self._arrays  # tuples become lists, as the file has them

    def _pixels(self, first: str) -> dict[str, Any]:
        entry, values = self._layers[first], np.arange(256, dtype=np.uint8)
        images = np.broadcast_to(values[:, None, None, None], (256, 1, 1, self._config.channels))
        table_Cx256 = np.asarray(normalize_batch(images, self._info), np.float64)[:, 0, 0].T
        self._arrays["pixels"] = _whole(table_Cx256, entry["input"], entry["bits"])
        return {"exponent": entry["input"]}

    def _layer(self, name: str, layer: nn.Module) -> None:
        operation, window = self._integers.operations.get(name), None
        if operation is not None:
            unit, kernel, bits = operation.exponent, self._templates[name], self._integers.bits
            sums, constant, window = unit, self._constants.get(name), operation.geometry
        else:
            unit, bits = self._seen.grids[name], _MULTIPLIED
            kernel = self._params[f"{name}/kernel"]
            finest = _grid(jnp.asarray(kernel, jnp.float32))
            sums, kernel = unit + finest, _whole(kernel, finest, bits)
            bias = self._params.get(f"{name}/bias")
            constant = None if bias is None else _whole(bias, sums, 32)
            if isinstance(layer, MultiplyConv):
                window = {"dilation": (1, 1)} | {
                    part: getattr(layer, part) for part in ("strides", "padding", "feature_group_count")
                }
        self._arrays[f"{name}/kernel"] = kernel
        if constant is not None:
            self._arrays[f"{name}/constant"] = constant
        if f"{name}/norm/scale" in self._params:
            output = self._norm(f"{name}/norm", sums)
        else:
            # Logits stay as they are: nothing comes after them.
            output = None if name == "head" else _wide(self._seen.left[name])
        adds = operation is not None
        shared = {"adds": adds, "bits": bits, "input": unit, "sums": sums, "geometry": window}
        if f"{name}/power" in self._params:
            power = jnp.float32(self._params[f"{name}/power"])
            most, unit = self._seen.left[f"{name}/norm"], _wide(self._seen.left[name])
            self._table(f"{name}/power", lambda x: signed_power(jnp.float32(x), power), most, unit, WIDE)
            output = unit
        self._layers[name] = shared | {"output": output}

    def _norm(self, name: str, unit: int) -> int:
        scale, bias = (self._params[f"{name}/{part}"] for part in ("scale", "bias"))
        output, n = _wide(self._seen.left[name]), len(scale)
        gain, shift = _multiplier(scale * math.sqrt(n) * 2.0 ** -(ROOT + output))
        epsilon = round(min(n**3 * self._config.layer_norm_epsilon * 4.0**-unit, 2.0**62))
        self._arrays[f"{name}/gain"], self._arrays[f"{name}/offset"] = gain, _whole(bias, output, WIDE)
        self._norms[name] = {"output": output, "shift": shift, "epsilon": epsilon}
        return output

    def _attention(self, name: str) -> dict[str, Any]:
        config, seen = self._config, self._seen
        if config.similarity == "l1":
            query = key = scores = self._integers.operations[name].exponent
            bits = self._integers.bits
        else:
            query, key = (seen.parts[f"{name}/{part}"] for part in ("query", "key"))
            scores, bits = query + key, _MULTIPLIED
        multiplier, shift = _multiplier(
            np.float64(config.attention_scale * 2.0 ** (scores + SOFTMAX) * math.log2(math.e))
        )
        if config.aggregation == "dot":
            value, value_bits = seen.parts[f"{name}/value"], _MULTIPLIED
        else:  # values share their unit with the weights, which are below 2
            value, value_bits = min(self._layers[f"{name}/value"]["output"], 2 - WIDE), WIDE
        units = {"query": query, "key": key, "value": value}
        widths = {"query_bits": bits, "key_bits": bits, "value_bits": value_bits}
        return units | widths | {"multiplier": int(multiplier), "shift": shift}

    def _gelu(self, name: str, most: float, follower: str) -> None:
        """A table of what the layer that follows takes."""
        unit, bits = (self._layers[follower][part] for part in ("input", "bits"))
        # Beyond what that layer can take, and where the GELU is 0, all entries are the same.
        most = min(most, max(2.0 ** (unit + bits - 1), _GELU_IS_ZERO))
        self._table(name, nn.gelu, most, unit, bits)

    def _table(self, name: str, function: Callable, most: float, output: int, bits: int) -> None:
        unit = math.ceil(math.log2(most)) - (TABLE - 1) if most > 0 else 0
        places = np.arange(-(2 ** (TABLE - 1)), 2 ** (TABLE - 1))
        values = function(jnp.asarray(places * 2.0**unit, jnp.float32))
        self._arrays[name] = _whole(np.asarray(values, np.float64), output, bits)
        self._tables[name] = {"input": unit, "output": output}


def _whole(values: np.ndarray, exponent: int, bits: int) -> np.ndarray:
    """Values in units of 2^exponent, in the least dtype of so many bits, clipped."""
    rounded = np.clip(np.rint(values * 2.0**-exponent), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return rounded.astype(np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)
