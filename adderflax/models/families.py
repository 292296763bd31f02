"""From a variant's name to its configuration's class, and from a configuration to its module."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from flax import linen as nn

from adderflax.models import resnet, vit
from adderflax.models.resnet import AdderResNet, AdderResNetConfig
from adderflax.models.vit import VisionTransformer, VisionTransformerConfig


class ModelConfig(Protocol):
    """A model's description: a frozen dataclass with these fields, and more of its own."""

    image_size: int
    channels: int
    num_classes: int

    @classmethod
    def from_variant(cls, variant: str, arithmetic: str, **fields: Any) -> "ModelConfig":
        """A named size in a named arithmetic, with the fields that are given in place of theirs."""


# These follow from the data set.
DERIVED_FIELDS = ("image_size", "channels", "num_classes")
MODULES: dict[type[ModelConfig], type[nn.Module]] = {
    VisionTransformerConfig: VisionTransformer,
    AdderResNetConfig: AdderResNet,
}
CONFIG_CLASSES: dict[str, type[ModelConfig]] = dict.fromkeys(
    vit.VARIANTS, VisionTransformerConfig
) | dict.fromkeys(resnet.VARIANTS, AdderResNetConfig)
_PACKAGED = frozenset(CONFIG_CLASSES)


def register_model(config: type[ModelConfig], module: type[nn.Module], variants: Iterable[str]) -> None:
    """Makes a model of your own one that the trainer, its configurations and the analyses know.

    A configuration names it by `model.variant`, and by `model.module` the Python module that calls this when
    it is imported, so that whatever reads the run later can import it too (docs/training.md).

    Args:
      config: a frozen dataclass whose fields, all with defaults, describe the model; among them `image_size`,
        `channels` and `num_classes`, which the data set says. `config.from_variant(variant, arithmetic,
        **fields)` gives an instance. Each field becomes one of the configuration's section `model`.
      module: a Linen module with the one field `config`, called as ``module(images, train=False)`` with
        normalized images, float32 [B, image_size, image_size, channels], that returns logits
        [B, num_classes]. Where `anneal_fraction` is set it is also given the exponent, ``p=``. While it
        trains it has the rng streams "dropout" and "drop_path" and may update ``batch_stats``.
      variants: the names that `model.variant` has for it.

    Raises:
      ValueError: the description or the module is not as said above, the description is another module's, or
        another model has such a variant; the message says what to change.
    """
    is_class = isinstance(config, type) and dataclasses.is_dataclass(config)
    if not is_class or not config.__dataclass_params__.frozen:
        raise ValueError(f"config={config!r} must be a class with @dataclasses.dataclass(frozen=True).")
    known = {field.name for field in dataclasses.fields(config)}
    if missing := [name for name in DERIVED_FIELDS if name not in known]:
        raise ValueError(
            f"{config.__name__} lacks the fields {', '.join(missing)}, which are filled in from the data set."
        )
    if reserved := sorted(known & {"variant", "arithmetic", "module"}):
        raise ValueError(
            f"{config.__name__} has the fields {', '.join(reserved)}, which choose a configuration's model:"
            " give them other names."
        )
    if required := [field.name for field in dataclasses.fields(config) if _is_required(field)]:
        raise ValueError(f"Give the fields {', '.join(required)} of {config.__name__} defaults.")
    if not callable(getattr(config, "from_variant", None)):
        raise ValueError(
            f"{config.__name__} lacks the class method from_variant(cls, variant, arithmetic, **fields)."
        )
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise ValueError(f"module={module!r} must be a class derived from flax.linen.Module.")
    if "config" not in {field.name for field in dataclasses.fields(module)}:
        raise ValueError(f"{module.__name__} lacks the field `config: {config.__name__}`.")
    variants = (variants,) if isinstance(variants, str) else tuple(variants)
    if not variants or not all(isinstance(name, str) and name for name in variants):
        raise ValueError(f"variants={variants!r} must be one name or more.")
    before = [found for found in MODULES if _path(found) == _path(config)]
    if others := [MODULES[found] for found in before if _path(MODULES[found]) != _path(module)]:
        raise ValueError(
            f"{config.__name__} describes {others[0].__name__}, not {module.__name__}: derive a class from it"
            " for another model."
        )
    if taken := [name for name in variants if CONFIG_CLASSES.get(name, config) not in (config, *before)]:
        raise ValueError(f"Another model has the variants {', '.join(taken)}: choose other names.")
    # A module that is imported anew, as in a notebook, puts its new classes in the place of its old ones.
    replaced = [found for found in before if found is not config]
    for name in [name for name, found in CONFIG_CLASSES.items() if found in replaced]:
        del CONFIG_CLASSES[name]
    for found in replaced:
        del MODULES[found]
    MODULES[config] = module
    CONFIG_CLASSES.update(dict.fromkeys(variants, config))


def config_class(variant: str) -> type[ModelConfig]:
    """The class whose `from_variant` takes a variant.

    Raises:
      ValueError: no model has such a variant; the message lists all.
    """
    if variant not in CONFIG_CLASSES:
        raise ValueError(
            f"variant={variant!r} is not known; choose one of {', '.join(map(repr, CONFIG_CLASSES))}, or name"
            " the Python module that registers a model of your own (model.module)."
        )
    return CONFIG_CLASSES[variant]


def is_registered(variant: str) -> bool:
    """Whether a variant is that of a model that came by `register_model`."""
    return variant in CONFIG_CLASSES and variant not in _PACKAGED


def build_model(config: ModelConfig) -> nn.Module:
    """The Linen module that computes what `config` describes."""
    return MODULES[type(config)](config)


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is field.default_factory is dataclasses.MISSING


def _path(described: type) -> tuple[str, str]:
    return described.__module__, described.__qualname__
