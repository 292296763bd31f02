"""Models that are registered from outside, beside those of the package."""

import dataclasses
import re
from typing import Optional

import pytest
from flax import linen as nn

from adderflax.models import VisionTransformerConfig, families, register_model
from adderflax.training.config import ConfigError, RunConfig, default_config


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for name in ("MODULES", "CONFIG_CLASSES"):
        monkeypatch.setattr(families, name, dict(getattr(families, name)))
    monkeypatch.setattr("adderflax.training.config.MODULES", families.MODULES)


def described(name="OwnConfig", frozen=True, without=(), **more):
    """A description's class with the fields that every model has, and others."""
    fields = {"image_size": 8, "channels": 1, "num_classes": 10} | more
    specified = [
        (
            field,
            type(default) if default is not dataclasses.MISSING else int,
            dataclasses.field(default=default),
        )
        for field, default in fields.items()
        if field not in without
    ]
    made = dataclasses.make_dataclass(name, specified, frozen=frozen, kw_only=True)
    made.__module__ = __name__
    made.from_variant = classmethod(lambda cls, variant, arithmetic, **given: cls(**given))
    return made


class Own(nn.Module):
    config: object

    def __call__(self, images, train=False):
        return nn.Dense(self.config.num_classes)(images.reshape(len(images), -1))


class Bare(nn.Module):
    def __call__(self, images, train=False):
        return images


NO_VARIANTS = dataclasses.make_dataclass(
    "NoVariants", [(name, int, 1) for name in families.DERIVED_FIELDS], frozen=True
)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            (int, Own, ["Own"]),
            "config=<class 'int'> must be a class with @dataclasses.dataclass(frozen=True)",
        ),
        ((described()(), Own, ["Own"]), "must be a class with @dataclasses.dataclass(frozen=True)"),
        ((described(frozen=False), Own, ["Own"]), "must be a class with @dataclasses.dataclass(frozen=True)"),
        (
            (described(without=("channels", "num_classes")), Own, ["Own"]),
            "OwnConfig lacks the fields channels, num_classes, which are filled in",
        ),
        (
            (described(variant="a", module="b"), Own, ["Own"]),
            "OwnConfig has the fields module, variant, which choose a configuration's model",
        ),
        (
            (described(width=dataclasses.MISSING), Own, ["Own"]),
            "Give the fields width of OwnConfig defaults.",
        ),
        ((NO_VARIANTS, Own, ["Own"]), "NoVariants lacks the class method from_variant("),
        ((described(), Own(config=None), ["Own"]), "must be a class derived from flax.linen.Module"),
        ((described(), dict, ["Own"]), "must be a class derived from flax.linen.Module"),
        ((described(), Bare, ["Own"]), "Bare lacks the field `config: OwnConfig`."),
        ((described(), Own, []), "variants=() must be one name or more."),
        ((described(), Own, ["Own", 3]), "variants=('Own', 3) must be one name or more."),
        (
            (VisionTransformerConfig, Own, ["Own"]),
            "VisionTransformerConfig describes VisionTransformer, not Own: derive a class from it",
        ),
        ((described(), Own, ["Own", "Ti/4"]), "Another model has the variants Ti/4: choose other names."),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_refused(arguments, told):
    before = dict(families.MODULES), dict(families.CONFIG_CLASSES)
    with pytest.raises(ValueError, match=re.escape(told)):
        register_model(*arguments)
    assert (families.MODULES, families.CONFIG_CLASSES) == before


def test_a_registered_model_is_built_from_its_variant():
    own = described()
    register_model(own, Own, "Own")
    config = families.config_class("Own").from_variant("Own", "adder", num_classes=3)
    assert isinstance(families.build_model(config), Own) and families.is_registered("Own")
    assert not families.is_registered("Ti/4") and not families.is_registered("none")
    assert families.config_class("Ti/4") is VisionTransformerConfig


def test_a_module_that_is_imported_anew_replaces_its_models():
    register_model(described(), Own, ["Own", "old name"])
    renewed = described()
    register_model(renewed, Own, ["Own"])
    assert families.config_class("Own") is renewed and len(families.MODULES) == 3
    with pytest.raises(
        ValueError, match="variant='old name' is not known; choose one of 'Ti/16'.*model.module"
    ):
        families.config_class("old name")
    with pytest.raises(ValueError, match="Another model has the variants Own"):
        register_model(described("OtherConfig"), Own, ["Own"])


def test_a_description_may_get_more_variants():
    own = described()
    register_model(own, Own, ["Own"])
    register_model(own, Own, ["larger"])
    assert families.config_class("Own") is families.config_class("larger") is own


def test_its_fields_are_those_of_the_configuration():
    own = described(width=3)
    own.__annotations__["rate"] = Optional[float]  # noqa: UP045 - as users of older Python write it
    register_model(own, Own, ["Own"])
    model = default_config().model
    assert model.get_type("width") is int and model.get_type("rate") is float and model.width is None
    assert {"depth", "blocks", "module"} <= set(model) and not set(families.DERIVED_FIELDS) & set(model)
    register_model(described("OtherConfig", width="wide"), Own, ["other"])
    with pytest.raises(
        ConfigError, match=r"OtherConfig.width is of type str, and OwnConfig.width of type int"
    ):
        default_config()


def test_a_run_has_to_name_the_module():
    register_model(described(), Own, ["Own"])
    config = default_config()
    config.model.variant = "Own"
    with pytest.raises(ConfigError, match=f"'Own' is a model of your own: set model.module='{__name__}'"):
        RunConfig.parse(config)
    config.model.module = "no_such_package.models"
    with pytest.raises(
        ConfigError, match="model.module='no_such_package.models' cannot be imported: No module"
    ):
        RunConfig.parse(config)
    config.model.module = "json"
    assert RunConfig.parse(config).model == {"variant": "Own", "arithmetic": "adder"}
