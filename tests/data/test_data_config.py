"""The configuration: what is allowed, what is refused, and with which words."""

import dataclasses
import json
import subprocess
import sys

import pytest

from adderflax.data import AugmentConfig, DataConfig, DatasetInfo


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", ""),
        ("name", 3),
        ("image_size", 0),
        ("image_size", 22.4),
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("eval_resize", -1),
        ("workers", -1),
        ("cache", "yes"),
        ("train_examples", 0),
    ],
)
def test_data_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"data.{field} ") as error:
        DataConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_data_config_refuses_a_resize_below_the_crop():
    with pytest.raises(ValueError, match="smaller"):
        DataConfig(image_size=224, eval_resize=200)


@pytest.mark.parametrize(
    "field, value",
    [
        ("crop_padding", -1),
        ("random_resized_crop", 1),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.4)),
        ("crop_scale", (0.5,)),
        ("flip", "yes"),
        ("randaugment_layers", 1.5),
        ("randaugment_magnitude", 11),
        ("randaugment_std", float("inf")),
        ("mixup_alpha", -0.1),
        ("cutmix_alpha", float("nan")),
        ("erasing_probability", 1.1),
        ("label_smoothing", 1.0),
    ],
)
def test_augment_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"augment.{field} ") as error:
        AugmentConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_two_crops_are_refused():
    with pytest.raises(ValueError, match="two ways to crop"):
        AugmentConfig(crop_padding=4, random_resized_crop=True)


def test_everything_is_off_by_default():
    augment = AugmentConfig()
    assert not augment.per_image_on_host
    assert augment == AugmentConfig(crop_scale=[0.08, 1.0])
    hash(augment)


def test_info_survives_json(make_info):
    info = make_info()
    restored = DatasetInfo(**json.loads(json.dumps(dataclasses.asdict(info))))
    assert restored == info and hash(restored) == hash(info)


def test_importing_is_light(root):
    heavy = ("PIL", "grain", "sklearn", "tensorflow", "tensorflow_datasets")
    code = f"import sys, adderflax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", None),
        ("image_size", 0),
        ("channels", True),
        ("eval_resize", "256"),
        ("test_examples", -1),
        ("class_names", ["a"]),
        ("class_names", [1, 2, 3]),
        ("mean", "x"),
        ("std", []),
    ],
)
def test_info_refuses_what_describes_no_set(make_info, field, value):
    with pytest.raises(ValueError, match=f"^{field}=.* must "):
        dataclasses.replace(make_info(), **{field: value})
