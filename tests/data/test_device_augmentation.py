"""Augmentation on the device: each piece by the property that defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adderflax.data import AugmentConfig, augment_batch, normalize_batch

EVERYTHING = AugmentConfig(
    crop_padding=2,
    flip=True,
    mixup_alpha=1.0,
    cutmix_alpha=1.0,
    erasing_probability=0.5,
    label_smoothing=0.1,
)


@functools.cache
def everything(info):
    """Compiled once for all tests that use it."""
    return jax.jit(functools.partial(augment_batch, config=EVERYTHING, info=info))


def augment(images, labels, info, seed=0, **fields):
    run = jax.jit(functools.partial(augment_batch, config=AugmentConfig(**fields), info=info))
    outputs = run(jax.random.key(seed), jnp.asarray(images), jnp.asarray(labels))
    return tuple(np.asarray(output) for output in outputs)


def over_keys(images, labels, info, count, **fields):
    """Augments one batch with many keys."""
    config = AugmentConfig(**fields)

    def run(key):
        return augment_batch(key, images, labels, config=config, info=info)

    keys = jax.random.split(jax.random.key(1), count)
    return tuple(np.asarray(output) for output in jax.jit(jax.vmap(run))(keys))


def random_batch(batch, size, channels=3, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (batch, size, size, channels), np.uint8)
    return images, random.integers(0, 10, batch).astype(np.int32)


def constant_images(batch, size):
    """One brightness for each image, all different: tells which image a pixel came from."""
    values = (np.arange(batch) * 255 // (batch - 1)).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (batch, size, size, 3))
    return np.ascontiguousarray(images), values / 255.0


def test_off_is_the_identity(make_info):
    info = make_info(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images, labels = random_batch(16, 8)
    x, targets = augment(images, labels, info)
    normalize = jax.jit(functools.partial(normalize_batch, info=info))
    np.testing.assert_array_equal(x, np.asarray(normalize(images)))
    np.testing.assert_array_equal(targets, np.eye(10, dtype=np.float32)[labels])
    assert x.dtype == targets.dtype == np.float32


def test_normalization(make_info):
    info = make_info(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images, _ = random_batch(4, 8)
    expected = (images.astype(np.float64) / 255 - info.mean) / info.std
    np.testing.assert_allclose(normalize_batch(images, info), expected, atol=1e-6)


@pytest.mark.parametrize("wrong", ["float", "channels", "rank"])
def test_wrong_images_are_refused(make_info, wrong):
    images, labels = random_batch(2, 8)
    images = {"float": images / 255.0, "channels": images[..., :1], "rank": images[0]}[wrong]
    with pytest.raises(ValueError, match=r"uint8 of shape \[batch, height, width, 3\]"):
        augment_batch(jax.random.key(0), images, labels, config=AugmentConfig(), info=make_info())


def test_padded_crop_shifts_and_fills_with_zeros(make_info):
    padding, size, batch = 2, 8, 400
    image = 1 + np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)
    images = np.broadcast_to(image, (batch, size, size, 3))
    x, _ = augment(images, np.zeros(batch, np.int32), make_info(), crop_padding=padding)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    steps = range(2 * padding + 1)
    shifted = {
        (down, right): padded[down : down + size, right : right + size] for down in steps for right in steps
    }
    counts = dict.fromkeys(shifted, 0)
    for crop in np.rint(x * 255):
        matches = [shift for shift, other in shifted.items() if np.array_equal(crop, other)]
        assert len(matches) == 1
        counts[matches[0]] += 1
    # 16 of each are expected; none of 25 is below 3 with probability over 0.99.
    assert min(counts.values()) >= 3 and max(counts.values()) <= 40


def test_padding_is_black_not_the_mean(make_info):
    info = make_info(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    x, _ = augment(np.full((64, 8, 8, 3), 255, np.uint8), np.zeros(64, np.int32), info, crop_padding=2)
    assert set(np.unique(x.round(5))) == {-2.0, 2.0}


def test_flip_is_a_mirror_half_of_the_time(make_info):
    images, labels = random_batch(1000, 8)
    x, _ = augment(images, labels, make_info(), flip=True)
    x = np.rint(x * 255)
    same = (x == images).all((1, 2, 3))
    mirrored = (x == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.07


def test_erasing_geometry_and_noise(make_info):
    size, batch, probability = 32, 1500, 0.4
    info = make_info(size)
    x, _ = augment(
        np.zeros((batch, size, size, 3), np.uint8),
        np.zeros(batch, np.int32),
        info,
        erasing_probability=probability,
    )
    erased = (x != 0.0).all(-1)
    assert np.array_equal(erased, (x != 0.0).any(-1))
    hit = erased.any((1, 2))
    assert abs(hit.mean() - probability) < 0.05
    heights = erased.any(2).sum(1)[hit]
    widths = erased.any(1).sum(1)[hit]
    assert np.array_equal(erased[hit].sum((1, 2)), heights * widths)
    # Sides are rounded to whole pixels, hence by how much the bounds are widened.
    assert ((heights + 0.5) * (widths + 0.5)).min() >= 0.02 * size**2
    assert ((heights - 0.5) * (widths - 0.5)).max() <= size**2 / 3
    assert ((heights + 0.5) / (widths - 0.5)).min() >= 0.3
    assert ((heights - 0.5) / (widths + 0.5)).max() <= 1 / 0.3
    # Uniform between 0.02 and 1/3, but for the few that do not fit.
    assert abs((heights * widths / size**2).mean() - (0.02 + 1 / 3) / 2) < 0.02
    assert max(heights) < size and max(widths) < size
    noise = x[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1.0) < 0.02
    # The rectangle reaches every edge of the image.
    assert erased[:, 0].any() and erased[:, -1].any()
    assert erased[:, :, 0].any() and erased[:, :, -1].any()


def test_mixup_mixes_images_as_targets_say(make_info):
    alpha, batch, keys = 0.8, 6, 2000
    images, values = constant_images(batch, 4)
    labels = np.arange(batch, dtype=np.int32)
    x, targets = over_keys(images, labels, make_info(4), keys, mixup_alpha=alpha)
    lam = targets[:, labels, labels]
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(targets[:, labels, np.roll(labels, 1)], 1 - lam, atol=1e-6)
    expected = lam * values + (1 - lam) * np.roll(values, 1)
    np.testing.assert_allclose(x, np.broadcast_to(expected[..., None, None, None], x.shape), atol=1e-6)
    assert np.ptp(lam, axis=1).max() < 1e-6
    assert abs(lam[:, 0].mean() - 0.5) < 0.03
    assert abs(lam[:, 0].var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_cutmix_pastes_the_area_that_targets_say(make_info):
    size, batch, keys = 16, 5, 1500
    images, values = constant_images(batch, size)
    labels = np.arange(batch, dtype=np.int32)
    x, targets = over_keys(images, labels, make_info(size), keys, cutmix_alpha=1.0)
    own = np.isclose(x[..., 0], values[:, None, None])
    pasted = np.isclose(x[..., 0], np.roll(values, 1)[:, None, None])
    assert (own ^ pasted).all()
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(targets[:, labels, labels], own.mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(targets[:, labels, np.roll(labels, 1)], pasted.mean((2, 3)), atol=1e-6)
    rows, columns = pasted.any(3).sum(2), pasted.any(2).sum(2)
    assert np.array_equal(pasted.sum((2, 3)), rows * columns)
    # One rectangle serves the batch; its area is 1/2 on average before the edges cut it off.
    assert (pasted == pasted[:, :1]).all()
    assert 0.25 < pasted.mean() < 0.45
    assert pasted.any((0, 1)).all()


def test_one_of_mixup_and_cutmix_for_each_batch(make_info):
    size, keys = 16, 600
    images, values = constant_images(4, size)
    labels = np.arange(4, dtype=np.int32)
    x, targets = over_keys(images, labels, make_info(size), keys, mixup_alpha=0.8, cutmix_alpha=1.0)
    cut = np.isclose(x[..., None], values).any(-1).all((1, 2, 3, 4))
    assert abs(cut.mean() - 0.5) < 0.1
    np.testing.assert_allclose(x.mean((2, 3, 4)), (targets[..., :4] * values).sum(-1), atol=1e-5)


def test_label_smoothing(make_info):
    images, labels = random_batch(8, 8)
    _, targets = augment(images, labels, make_info(), label_smoothing=0.1)
    expected = np.full((8, 10), 0.01)
    expected[np.arange(8), labels] = 0.91
    np.testing.assert_allclose(targets, expected, atol=1e-7)


def test_keys_decide(make_info):
    images, labels = random_batch(16, 8)
    run = everything(make_info())
    first, again, other = (run(jax.random.key(seed), images, labels)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sharded_batch_gives_the_same_and_gathers_nothing(make_info):
    images, labels = random_batch(16, 8)
    run = everything(make_info())
    key = jax.random.key(3)
    expected = run(key, images, labels)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = (jax.device_put(images, sharding), jax.device_put(labels, sharding))
    compiled = run.lower(key, *sharded).compile()
    for output, reference in zip(compiled(key, *sharded), expected):
        assert output.sharding.is_equivalent_to(sharding, output.ndim)
        np.testing.assert_allclose(output, reference, atol=1e-6)
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" not in text
