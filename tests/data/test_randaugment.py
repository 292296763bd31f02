"""RandAugment: each operation keeps the image's form, and strength 0 leaves it (nearly) alone."""

import numpy as np
import pytest
from PIL import Image

from adderflax.data import AugmentConfig
from adderflax.data import randaugment as randaugment_lib
from adderflax.data.randaugment import OPERATIONS, RandAugment

FIXED = ("auto_contrast", "equalize", "invert")  # They have no strength.


def picture(mode="RGB", size=(24, 20)):
    coarse = np.random.default_rng(0).integers(30, 220, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def call(strength, sign=1, mode="RGB"):
    fill = (9, 90, 200) if mode == "RGB" else 77
    return randaugment_lib._Call(strength, sign, fill)


def difference(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


def test_there_are_the_fifteen_operations():
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_form_at_every_strength(name, mode):
    image = picture(mode)
    for strength in (0.0, 0.5, 1.0):
        for sign in (-1, 1):
            result = OPERATIONS[name](image, call(strength, sign, mode))
            assert (result.size, result.mode) == (image.size, image.mode)
            assert np.asarray(result).dtype == np.uint8


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - set(FIXED)))
def test_strength_zero_is_near_the_identity_and_more_does_more(name):
    image = picture()
    none, half, full = (
        difference(OPERATIONS[name](image, call(strength)), image) for strength in (0.0, 0.5, 1.0)
    )
    # Posterize keeps 4 of 8 bits at the least strength, which moves a pixel by up to 15.
    assert none.max() <= (15 if name == "posterize" else 0)
    assert full.mean() > half.mean() > none.mean()
    assert full.mean() > 1


@pytest.mark.parametrize("name", FIXED)
def test_operations_without_strength_change_the_image(name):
    image = picture()
    assert difference(OPERATIONS[name](image, call(0.0)), image).mean() > 3


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_moved_edges_show_the_fill(name):
    result = np.asarray(OPERATIONS[name](Image.new("RGB", (40, 40), (255, 255, 255)), call(1.0)))
    assert (result == (9, 90, 200)).all(-1).any()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("invert", [155, 55]),
        ("posterize", [0, 128]),  # 1 bit
        ("solarize", [155, 55]),  # all of the scale
        ("solarize_add", [210, 200]),  # 110 is added below 128
        ("brightness", [190, 255]),
    ],
)
def test_operations_at_full_strength_by_hand(name, expected):
    image = Image.fromarray(np.array([[100, 200]], np.uint8))
    result = np.asarray(OPERATIONS[name](image, call(1.0, mode="L")))
    np.testing.assert_array_equal(result[0], expected)


def test_translation_goes_as_far_as_it_says():
    image = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (100, 1)))
    moved = np.asarray(OPERATIONS["translate_x"](image, call(1.0, mode="L")))
    np.testing.assert_array_equal(moved[:, :55], np.asarray(image)[:, 45:])
    assert (moved[:, 55:] == 77).all()


def test_half_of_the_drawn_operations_are_applied(monkeypatch):
    monkeypatch.setattr(randaugment_lib, "OPERATIONS", {"add": lambda image, _: image.point(lambda x: x + 1)})
    augment = RandAugment(layers=4, magnitude=9, std=0.5, fill=0)
    random = np.random.default_rng(0)
    black = Image.new("L", (1, 1))
    applied = np.array([np.asarray(augment(black, random))[0, 0] for _ in range(1000)])
    assert abs(applied.mean() - 2.0) < 0.12 and applied.min() == 0 and applied.max() == 4


def test_magnitudes_and_signs():
    augment = RandAugment(layers=2, magnitude=9, std=0.5, fill=0)
    random = np.random.default_rng(0)
    calls = [augment.draw(random) for _ in range(2000)]
    strengths = np.array([drawn.strength for drawn in calls])
    assert strengths.max() == 1.0 and abs(np.median(strengths) - 0.9) < 0.005
    assert abs(strengths.std() - 0.05) < 0.005
    assert abs(np.mean([drawn.sign for drawn in calls])) < 0.08
    steady = RandAugment(layers=2, magnitude=3, std=0.0, fill=0)
    assert steady.draw(random).strength == pytest.approx(0.3)


def test_generator_decides(make_info):
    augment = RandAugment.from_config(AugmentConfig(randaugment_layers=3), make_info())
    image = picture()
    first, again, other = (np.asarray(augment(image, np.random.default_rng(seed))) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fill_is_the_mean_color(make_info):
    config = AugmentConfig(randaugment_layers=1)
    color = RandAugment.from_config(config, make_info(mean=(0.485, 0.456, 0.406)))
    assert color.fill == (124, 116, 104)
    assert RandAugment.from_config(config, make_info(channels=1, mean=(0.5,))).fill == 128
