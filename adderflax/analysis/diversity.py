"""How much of their rank attention maps and features keep.

The figures of one matrix are functions of its singular values s_1 >= s_2 >= ... >= 0, or of its
rows; `measure` takes them from a model, for each image, layer and head, of the attention map
before the identity is added, softmax(...), and after, softmax(...) + I.

Adding I raises the rank of any map, so the map after it says what the model multiplies its values
with, and only the map before it what was learned.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.data import DatasetInfo, load_dataset, normalize_batch
from adderflax.training.config import RunConfig
from adderflax.training.restore import data_from, load_model
from adderflax.training.workdir import read_config

# The share of the singular values' sum that a published measurement of these maps asks for.
MASS = 0.8
# Which images of a part are measured; the same ones for every model.
_CHOICE_SEED = 0


def singular_values(matrices: np.ndarray) -> np.ndarray:
    """Singular values of [..., M, N] in descending order, float64 [..., min(M, N)]."""
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


def index_at_mass(values: np.ndarray, mass: float = MASS) -> np.ndarray:
    """How many of the largest singular values hold a share of their sum.

    The smallest k with s_1 + ... + s_k >= mass * (s_1 + ... + s_n), from 1 to n.

    Args:
      values: singular values [..., n], descending, not all zero.
      mass: the share, in (0, 1].

    Returns:
      int [...].
    """
    cumulative = np.cumsum(values, axis=-1)
    # A share that is reached exactly must not be missed by a rounding.
    reached = cumulative >= (mass - 1e-12) * cumulative[..., -1:]
    return 1 + np.argmax(reached, axis=-1)


def effective_rank(values: np.ndarray) -> np.ndarray:
    """exp(-sum_i p_i ln p_i) with p_i = s_i / (s_1 + ... + s_n), from 1 to n.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
      values: singular values [..., n], not all zero.

    Returns:
      float64 [...], in dimensions.
    """
    share = values / np.sum(values, axis=-1, keepdims=True)
    # 0 ln 0 = 0.
    logarithm = np.log(np.where(share > 0, share, 1.0))
    return np.exp(-np.sum(share * logarithm, axis=-1))


def rank_one_distance(values: np.ndarray) -> np.ndarray:
    """Distance from the nearest rank-one matrix, relative to the matrix's own norm, 0 to 1.

    sqrt(s_2^2 + ... + s_n^2) / sqrt(s_1^2 + ... + s_n^2): Frobenius norms, by Eckart and Young.

    Args:
      values: singular values [..., n], descending, not all zero.

    Returns:
      float64 [...]; 0 for a matrix of rank one.
    """
    squares = np.square(values)
    return np.sqrt(np.sum(squares[..., 1:], axis=-1) / np.sum(squares, axis=-1))


def mean_residual(features: np.ndarray) -> np.ndarray:
    """What is left of the tokens without their mean: ||X - 1 m^T|| / ||X||, m the mean token.

    The residual of Dong et al., "Attention is not all you need: pure attention loses rank doubly
    exponentially with depth", ICML 2021, is X - 1 x^T with the nearest x. They take the norm
    sqrt(||.||_1 ||.||_inf); this is the Frobenius norm, for which the nearest x is the mean.

    Args:
      features: tokens [..., T, D].

    Returns:
      float64 [...], 0 to 1; 0 if all tokens are the same.
    """
    features = np.asarray(features, np.float64)
    centered = features - np.mean(features, axis=-2, keepdims=True)
    return np.linalg.norm(centered, axis=(-2, -1)) / np.linalg.norm(features, axis=(-2, -1))


def token_cosine_similarity(features: np.ndarray) -> np.ndarray:
    """Mean of cos(x_s, x_t) over all pairs of different tokens.

    Args:
      features: tokens [..., T, D], T at least 2, none of them zero.

    Returns:
      float64 [...], -1 / (T - 1) to 1; 1 if all tokens have the same direction.
    """
    features = np.asarray(features, np.float64)
    T = features.shape[-2]
    units = features / np.linalg.norm(features, axis=-1, keepdims=True)
    # |sum_t u_t|^2 sums the cosines of all pairs, each token with itself included.
    total = np.sum(np.square(np.sum(units, axis=-2)), axis=-1)
    return (total - T) / (T * (T - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diversity:
    """What `measure` found, on N images in L layers of H heads with T tokens.

    Attributes:
      identity: whether the model adds I to its maps; if not, `softmax_plus_identity` is of maps
        that it does not use.
      softmax: singular values of the maps before the identity, [N, L, H, T].
      softmax_plus_identity: the same after it.
      feature_distance: `rank_one_distance` of each layer's output, [N, L].
      feature_residual: `mean_residual` of each layer's output, [N, L].
      token_similarity: `token_cosine_similarity` of each layer's output, [N, L].
      class_attention: weights of the class token before the identity, or, in a model without one, their
        mean over all tokens, [N, L, H, T].
    """

    identity: bool
    softmax: np.ndarray
    softmax_plus_identity: np.ndarray
    feature_distance: np.ndarray
    feature_residual: np.ndarray
    token_similarity: np.ndarray
    class_attention: np.ndarray

    def maps(self) -> dict[str, np.ndarray]:
        """Singular values [N, L, H, T] by the name that the figures carry."""
        return {"softmax": self.softmax, "softmax_plus_identity": self.softmax_plus_identity}

    def figures(self, *, heads: bool = True) -> dict[str, Any]:
        """Means over the images, as plain values.

        Args:
          heads: list each head too, not only the mean over a layer's heads.

        Returns:
          {"images", "tokens", "identity", "layers": [{"layer", "softmax": {"index_80",
          "effective_rank", "rank_one_distance"}, "softmax_plus_identity": {...}, "heads": [...],
          "features": {"rank_one_distance", "mean_residual", "token_cosine_similarity"}}]}.
        """
        images, layers, head_count, tokens = self.softmax.shape
        by_head = {
            name: {
                "index_80": np.mean(index_at_mass(values), axis=0),
                "effective_rank": np.mean(effective_rank(values), axis=0),
                "rank_one_distance": np.mean(rank_one_distance(values), axis=0),
            }
            for name, values in self.maps().items()
        }

        def mean_at(*index: int) -> dict[str, dict[str, float]]:
            return {
                name: {figure: float(np.mean(values[index])) for figure, values in found.items()}
                for name, found in by_head.items()
            }

        listed = []
        for layer in range(layers):
            figures = {"layer": layer} | mean_at(layer)
            if heads:
                figures["heads"] = [{"head": head} | mean_at(layer, head) for head in range(head_count)]
            figures["features"] = {
                "rank_one_distance": float(np.mean(self.feature_distance[:, layer])),
                "mean_residual": float(np.mean(self.feature_residual[:, layer])),
                "token_cosine_similarity": float(np.mean(self.token_similarity[:, layer])),
            }
            listed.append(figures)
        return {"images": images, "tokens": tokens, "identity": self.identity, "layers": listed}

    def spectra(self) -> dict[str, np.ndarray]:
        """Normalized singular values s_i / sum s, mean over images and heads, [L, T] by map."""
        return {
            name: np.mean(values / np.sum(values, axis=-1, keepdims=True), axis=(0, 2))
            for name, values in self.maps().items()
        }


def measure(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, info: DatasetInfo
) -> Diversity | None:
    """Runs a model on images and measures its attention maps and block outputs.

    Args:
      model: sows ``attention_weights`` [B, H, T, T], the identity included where its config says
        so, and ``block_outputs`` [B, T, D], as `adderflax.VisionTransformer` does.
      variables: its variables.
      images: uint8 [N, H, W, C].
      info: description of the data set, for the normalization.

    Returns:
      The figures, or None for a model without attention.
    """

    @jax.jit
    def capture(variables, image):
        _, captured = model.apply(variables, normalize_batch(image[None], info), mutable=["intermediates"])
        return captured.get("intermediates", {})

    sown = traverse_util.flatten_dict(jax.eval_shape(capture, variables, images[0]))
    if not any(path[-1] == "attention_weights" for path in sown):
        return None
    identity = bool(getattr(model.config, "identity", False))
    pools_token = getattr(model.config, "pooling", "token") == "token"
    rows = []
    # One image at a time: the maps of many images of a large model would not fit into memory.
    for image in images:
        maps, features = _sown(jax.device_get(capture(variables, image)))
        # float32 keeps the identity's ones exactly and rounds what is beside them by 6e-8 at most.
        softmax = maps.astype(np.float64) - identity * np.eye(maps.shape[-1])
        rows.append(
            {
                "softmax": singular_values(softmax),
                "softmax_plus_identity": singular_values(softmax + np.eye(maps.shape[-1])),
                "feature_distance": rank_one_distance(singular_values(features)),
                "feature_residual": mean_residual(features),
                "token_similarity": token_cosine_similarity(features),
                "class_attention": softmax[..., 0, :] if pools_token else np.mean(softmax, axis=-2),
            }
        )
    return Diversity(identity=identity, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _sown(intermediates: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Maps [L, H, T, T] and features [L, T, D] of one image, in the order of the layers."""
    flat = traverse_util.flatten_dict(intermediates)

    def natural(path: tuple[str, ...]) -> list:
        # block_2 before block_10.
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", "/".join(path))]

    def collect(name: str) -> np.ndarray:
        paths = sorted((path for path in flat if path[-1] == name), key=natural)
        return np.stack([array[0] for path in paths for array in flat[path]])

    return collect("attention_weights"), collect("block_outputs")


def measure_workdir(
    workdir: str | Path,
    *,
    images: int = 30,
    part: str = "test",
    best: bool = False,
    data_dir: str | None = None,
) -> tuple[Diversity | None, np.ndarray]:
    """Measures a trained run on images of its own data set.

    Args:
      workdir: the run's directory.
      images: how many, drawn once and for all runs alike.
      part: "test", "validation" or "train", without augmentation.
      best: take the checkpoint with the best validation accuracy instead of the newest.
      data_dir: where prepared data sets are on this machine; None looks where the run's configuration says.

    Returns:
      What `measure` found, and the images, uint8 [N, H, W, C].

    Raises:
      ValueError: there is no such part, or it has fewer images.
      adderflax.training.workdir.WorkdirError: the directory holds no trained run.
      adderflax.data.DatasetNotReadyError: the data set is not there.
    """
    model, variables, info = load_model(workdir, best=best)
    run = RunConfig.parse(data_from(read_config(workdir), data_dir))
    source = load_dataset(run.data).part(part)
    if not 1 <= images <= len(source):
        raise ValueError(
            f"{images} images cannot be drawn from the {part} part of {info.name}, which has"
            f" {len(source)}: choose a number from 1 to that."
        )
    # RandomState, not Generator: NumPy keeps its streams the same for all versions to come.
    chosen = np.random.RandomState(_CHOICE_SEED).permutation(len(source))[:images]
    pixels = np.stack([source[int(index)]["image"] for index in chosen])
    return measure(model, variables, pixels, info), pixels
