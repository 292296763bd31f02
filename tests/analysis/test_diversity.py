"""Ranks of maps and features: known matrices, NumPy's SVD, the published index, the command."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from adderflax import VisionTransformer, VisionTransformerConfig, adder_attention
from adderflax import diversity as command
from adderflax.analysis import diversity, figures
from adderflax.data import DatasetInfo
from adderflax.training.config import default_config
from adderflax.training.trainer import train

INFO = DatasetInfo(
    name="noise",
    num_classes=3,
    class_names=("a", "b", "c"),
    image_size=8,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    eval_resize=None,
    train_examples=1,
    validation_examples=0,
    test_examples=1,
)


def test_index_at_mass():
    assert diversity.index_at_mass(np.ones(10), 0.8) == 8  # reached exactly
    assert diversity.index_at_mass(np.ones(5), 0.81) == 5
    assert diversity.index_at_mass(np.array([8.0, 1.0, 1.0])) == 1
    values = np.array([[7.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(diversity.index_at_mass(values), [2, 1])


def test_effective_rank():
    np.testing.assert_allclose(diversity.effective_rank(np.full(7, 3.0)), 7)
    np.testing.assert_allclose(diversity.effective_rank(np.array([5.0, 0.0, 0.0])), 1)
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits.
    np.testing.assert_allclose(diversity.effective_rank(np.array([2.0, 1.0, 1.0])), 2**1.5)


def test_rank_one_distance_is_to_the_nearest_matrix():
    matrix = np.random.default_rng(0).normal(size=(9, 5))
    u, s, v = np.linalg.svd(matrix)
    nearest = s[0] * np.outer(u[:, 0], v[0])
    expected = np.linalg.norm(matrix - nearest) / np.linalg.norm(matrix)
    found = diversity.rank_one_distance(diversity.singular_values(matrix))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(diversity.rank_one_distance(np.array([3.0, 0.0])), 0)


def test_token_figures():
    features = np.random.default_rng(1).normal(size=(6, 4))
    units = [x / np.linalg.norm(x) for x in features]
    cosines = [a @ b for a, b in itertools.combinations(units, 2)]
    np.testing.assert_allclose(diversity.token_cosine_similarity(features), np.mean(cosines))
    shifted = features + 7 * np.ones((2, 1, 1))
    assert diversity.token_cosine_similarity(shifted).shape == (2,)
    np.testing.assert_allclose(diversity.mean_residual(features - features.mean(axis=0)), 1)
    np.testing.assert_allclose(diversity.mean_residual(np.ones((3, 6, 4))), 0)
    # Two tokens m + e and m - e: ||X - 1 m|| / ||X|| = |e| / sqrt(|m|^2 + |e|^2).
    pair = np.array([[3.0, 4.0], [3.0, -4.0]])
    np.testing.assert_allclose(diversity.mean_residual(pair), 0.8)


@pytest.mark.parametrize(
    ("similarity", "identity", "expected"),
    [("dot", False, 86), ("l1", False, 81), ("dot", True, 155), ("l1", True, 155)],
)
def test_index_of_random_maps(similarity, identity, expected):
    """The published index on Gaussian queries and keys, N = 197, d = 64."""
    query, key = jax.random.normal(jax.random.key(0), (2, 197, 4, 64))
    _, maps = adder_attention(query, key, key, similarity=similarity, identity=identity, return_weights=True)
    found = diversity.index_at_mass(diversity.singular_values(maps))
    assert np.all(np.abs(found - expected) <= 3), found


def small_model(**fields):
    sizes = {"patch_size": 2, "embed_dim": 16, "num_heads": 2, "depth": 2, "mlp_dim": 16}
    config = VisionTransformerConfig.from_variant(
        "digits",
        **sizes | {"image_size": 8, "channels": 1, "num_classes": 3} | fields,
        implementation="reference",
    )
    model = VisionTransformer(config)
    variables = jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 8, 8, 1)))
    # Position embeddings as large as after training, so that tokens differ.
    variables["params"]["position_embedding"] *= 50
    return model, variables


IMAGES = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize("identity", [True, False])
def test_measure_agrees_with_numpy(identity):
    model, variables = small_model(identity=identity)
    found = diversity.measure(model, variables, IMAGES, INFO)
    normalized = (IMAGES.astype(np.float32) / 255 - 0.5) / 0.25
    _, captured = jax.jit(lambda x: model.apply(variables, x, mutable=["intermediates"]))(normalized)
    sown = captured["intermediates"]
    assert found.identity == identity and found.softmax.shape == (3, 2, 2, 17)
    for layer, features in enumerate(sown["block_outputs"]):
        (maps,) = sown[f"block_{layer}"]["attention"]["attention_weights"]
        softmax = np.asarray(maps, np.float64) - identity * np.eye(17)
        np.testing.assert_allclose(softmax.sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(found.class_attention[:, layer], softmax[:, :, 0], atol=1e-5)
        for values, matrices in (
            (found.softmax, softmax),
            (found.softmax_plus_identity, softmax + np.eye(17)),
        ):
            np.testing.assert_allclose(values[:, layer], np.linalg.svd(matrices, compute_uv=False), atol=1e-5)
        spectrum = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
        distance = np.sqrt(1 - spectrum[:, 0] ** 2 / np.sum(spectrum**2, axis=1))
        np.testing.assert_allclose(found.feature_distance[:, layer], distance, atol=1e-5)
        cosine = diversity.token_cosine_similarity(np.asarray(features))
        np.testing.assert_allclose(found.token_similarity[:, layer], cosine, atol=1e-5)


def test_without_a_class_token_it_is_all_tokens_that_attend(tmp_path):
    model, variables = small_model(pooling="mean")
    found = diversity.measure(model, variables, IMAGES, INFO)
    assert found.class_attention.shape == (3, 2, 2, 16)
    np.testing.assert_allclose(found.class_attention.sum(-1), 1, atol=1e-5)
    normalized = (IMAGES[:1].astype(np.float32) / 255 - 0.5) / 0.25
    _, captured = model.apply(variables, normalized, mutable=["intermediates"])
    (maps,) = captured["intermediates"]["block_1"]["attention"]["attention_weights"]
    expected = (np.asarray(maps[0], np.float64) - np.eye(16)).mean(axis=1)
    np.testing.assert_allclose(found.class_attention[0, 1], expected, atol=1e-5)
    figures.draw_attention(found, IMAGES, tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as picture:
        assert min(picture.size) > 300


def test_figures_are_means_over_images_and_heads():
    model, variables = small_model()
    found = diversity.measure(model, variables, IMAGES, INFO)
    figures = found.figures()
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["images"], figures["tokens"], figures["identity"]) == (3, 17, True)
    ranks = diversity.effective_rank(found.softmax)
    for layer, entry in enumerate(figures["layers"]):
        assert entry["layer"] == layer
        np.testing.assert_allclose(entry["softmax"]["effective_rank"], ranks[:, layer].mean())
        for head, of_head in enumerate(entry["heads"]):
            expected = ranks[:, layer, head].mean()
            np.testing.assert_allclose(of_head["softmax"]["effective_rank"], expected)
        residual = found.feature_residual[:, layer].mean()
        np.testing.assert_allclose(entry["features"]["mean_residual"], residual)
    assert "heads" not in found.figures(heads=False)["layers"][0]
    spectra = found.spectra()
    np.testing.assert_allclose(spectra["softmax"].sum(axis=-1), 1)
    expected = found.softmax[:, 1] / found.softmax[:, 1].sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(spectra["softmax"][1], expected.mean(axis=(0, 1)))


def test_layers_are_in_order_beyond_ten():
    sown = {
        f"block_{i}": {"attention": {"attention_weights": (np.full((1, 2, 3, 3), i),)}}
        for i in sorted(range(12), key=str)
    }
    sown["block_outputs"] = tuple(np.full((1, 3, 4), i) for i in range(12))
    maps, features = diversity._sown(sown)
    np.testing.assert_array_equal(maps[:, 0, 0, 0], range(12))
    np.testing.assert_array_equal(features[:, 0, 0], range(12))


def test_a_model_without_attention_has_no_figures():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(3)(images.reshape(len(images), -1))

    model = Flat()
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((64, 3)), "bias": jnp.ones(3)}}}
    assert diversity.measure(model, variables, IMAGES, INFO) is None


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on the digits."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 32,
            "total_steps": 2,
            "optimizer.name": "sgd",
            "model.patch_size": 4,
            "model.embed_dim": 16,
            "model.num_heads": 2,
            "model.depth": 1,
            "model.implementation": "reference",
        }
    )
    path = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        train(config, path, progress=False)
    return path


def test_the_command(workdir, tmp_path, capsys):
    command.main([str(workdir), "--images", "5", "--json", "--output", str(tmp_path / "new")])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "new" / "diversity.json").read_text())
    assert (report["part"], report["images"], len(report["layers"])) == ("test", 5, 1)
    saved = np.load(tmp_path / "new" / "singular_values.npz")
    index = diversity.index_at_mass(saved["softmax"][:, 0, 1]).mean()
    assert report["layers"][0]["heads"][1]["softmax"]["index_80"] == index
    for name in ("spectra", "attention", "depth"):
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            # Lines and letters on white, not a blank sheet.
            assert 0.01 < np.mean(np.asarray(picture.convert("L")) < 250) < 0.95

    command.main([str(workdir), "--images", "2", "--part", "validation"])
    text = capsys.readouterr().out
    assert "2 images of the validation part, 5 tokens; the model uses softmax + I" in text
    assert len(re.findall(r"^ +0 +(0|1|mean) ", text, flags=re.MULTILINE)) == 3


def test_the_data_may_lie_elsewhere(workdir, monkeypatch, capsys):
    asked = []
    load = diversity.load_dataset
    monkeypatch.setattr(diversity, "load_dataset", lambda config: asked.append(config) or load(config))
    command.main([str(workdir), "--images=1", "--data_dir=/elsewhere"])
    command.main([str(workdir), "--images=1"])
    assert [config.data_dir for config in asked] == ["/elsewhere", None]


def test_the_images_are_drawn_once_and_for_all(workdir):
    _, few = diversity.measure_workdir(workdir, images=2)
    _, more = diversity.measure_workdir(workdir, images=4)
    np.testing.assert_array_equal(few, more[:2])
    assert not np.array_equal(more[0], more[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "360"], "360 images cannot be drawn from the test part of digits.* 359"),
        (["--images", "0"], "choose a number from 1"),
    ],
)
def test_mistakes(workdir, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main([str(workdir), *arguments])


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(SystemExit, match="is not a run's workdir"):
        command.main([str(tmp_path)])
