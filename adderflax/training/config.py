"""The run's ConfigDict: one section per dataclass, so that every field has one home and one docstring.

``default_config`` is what the files in ``configs/`` start from; ``RunConfig.parse`` turns the final
ConfigDict, command line included, into typed and checked parts.
"""

import contextlib
import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from adderflax import extras

# Modules that are imported by a command take ConfigDict from here, where its absence is told.
try:
    from ml_collections import ConfigDict, config_dict
except ModuleNotFoundError as error:
    raise extras.missing(error) from None

from adderflax.data import AugmentConfig, DataConfig, DatasetInfo
from adderflax.models.families import DERIVED_FIELDS, MODULES, ModelConfig, config_class, is_registered
from adderflax.training.distillation import DistillationConfig
from adderflax.training.optimizer import OptimizerConfig, has_templates, idle_fields
from adderflax.training.sharding import MeshConfig


class ConfigError(ValueError):
    """A configuration that cannot be run, with what to change."""


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Raises a ValueError, by which a part refuses what the configuration says, as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Which trained model the first parameters come from (`adderflax.models.warm_start`).

    Attributes:
      source: a trained run's workdir, or a file of weights of timm, DeiT or google-research's ViT
        (`adderflax.models.load_vit_weights`), of any image size and, where its classifier multiplies, for
        any number of classes; None starts from random parameters.
      images: training images, without augmentation, on which converted layers are calibrated.

    Raises:
      ValueError: `images` is not positive.
    """

    source: str | None = None
    images: int = 256

    def __post_init__(self):
        if self.images < 1:
            raise ValueError(f"warm_start.images={self.images} must be at least 1.")


_SECTIONS = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "warm_start": WarmStartConfig,
    "distillation": DistillationConfig,
}


def default_config(arithmetic: str = "adder") -> ConfigDict:
    """A complete configuration for the embedded digits; config files change what they need.

    Args:
      arithmetic: value of `model.arithmetic`: "adder", "multiply", "vit" or "custom".

    Returns:
      A ConfigDict with the sections `data` (`adderflax.data.DataConfig`), `augment`
      (`adderflax.data.AugmentConfig`), `optimizer` (`adderflax.training.optimizer.OptimizerConfig`), `mesh`
      (`adderflax.training.sharding.MeshConfig`), `warm_start` (`WarmStartConfig`), `distillation`
      (`adderflax.training.distillation.DistillationConfig`), `model` (`variant`, `arithmetic`, `module`, and
      every field of `adderflax.VisionTransformerConfig`, of `adderflax.AdderResNetConfig` and of registered
      models that does not follow from the data; unset means: as the variant and the preset say) and the
      fields of `RunConfig`.

    Raises:
      ConfigError: registered models have fields of one name and different types.
    """
    config = ConfigDict(_section(RunConfig, skip=(*_SECTIONS, "model")))
    for name, section in _SECTIONS.items():
        config[name] = ConfigDict(_section(section))
    config.model = ConfigDict({"variant": "digits", "arithmetic": arithmetic})
    found = {"module": (str, None)}
    for model in MODULES:
        for name, type_ in _field_types(model).items():
            if name in DERIVED_FIELDS:
                continue
            if (first := found.setdefault(name, (type_, model)))[0] is not type_:
                raise ConfigError(
                    f"{model.__name__}.{name} is of type {type_.__name__}, and {first[1].__name__}.{name} of"
                    f" type {first[0].__name__}: a configuration has one field model.{name}. Rename yours."
                )
    for name, (type_, _) in found.items():
        config.model[name] = config_dict.placeholder(type_)
    return config


def older_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the fields had, in effect, in a run with this plain configuration that is older than they are."""
    return default_config(config["model"]["arithmetic"]).to_dict()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run, typed and checked.

    Attributes:
      seed: seed of initialization, batch order and augmentation, below 2^32.
      batch_size: examples of one update, over all devices and accumulated parts.
      epochs: passes over the training part; used where `total_steps` is unset.
      total_steps: number of updates; overrides `epochs`.
      eval_every: validate every so many steps, where the data set has a validation part; the last step
        always does.
      checkpoint_every: save every so many steps; the last step and every validated one are always saved.
      log_every: write the training figures every so many steps.
      accumulation_steps: cut each batch into so many parts and average their gradients.
      ema_decay: decay of the average of the parameters that is evaluated; 0 evaluates the parameters.
      anneal_fraction: share of all steps over which the exponent p of the adder layers' ``-sum |x - w|^p``
        falls linearly from 2 to 1 (Universal Adder Neural Networks, Chen et al. 2021); 0 is L1 throughout.
        Evaluation is always at p = 1, so before the exponent has arrived there its figures say little.
      skip_nonfinite_steps: how many updates of the whole run may be left out because their loss or gradient
        is not finite; one more stops it.
      keep_checkpoints: how many of the newest checkpoints are kept besides the best.
      data: which images.
      augment: training augmentation.
      optimizer: optimizer and schedule.
      mesh: how the devices share the work.
      warm_start: which trained model the first parameters come from.
      distillation: which trained model teaches.
      model: variant, arithmetic and changed fields, as `from_variant` of the variant's class takes them.
    """

    seed: int = 0
    batch_size: int = 128
    epochs: float = 100.0
    total_steps: int | None = None
    eval_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 50
    accumulation_steps: int = 1
    ema_decay: float = 0.0
    anneal_fraction: float = 0.0
    skip_nonfinite_steps: int = 0
    keep_checkpoints: int = 2
    data: DataConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    warm_start: WarmStartConfig
    distillation: DistillationConfig
    model: dict[str, Any]

    def __post_init__(self):
        minima = {
            "seed": 0,
            "batch_size": 1,
            "eval_every": 1,
            "checkpoint_every": 1,
            "log_every": 1,
            "accumulation_steps": 1,
            "skip_nonfinite_steps": 0,
            "keep_checkpoints": 1,
        }
        if self.total_steps is not None:
            minima["total_steps"] = 1
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {minimum}.")
        if self.seed >= 2**32:
            raise ConfigError(f"seed={self.seed} must be below 2^32.")
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs={self.epochs} must be finite and greater than 0.")
        if not 0.0 <= self.anneal_fraction <= 1.0:
            raise ConfigError(f"anneal_fraction={self.anneal_fraction} must lie in [0, 1].")
        implementation = self.model.get("implementation")
        if self.anneal_fraction and implementation not in (None, "xla"):
            raise ConfigError(
                f"model.implementation={implementation!r} computes the L1 distance only, but with"
                f" anneal_fraction={self.anneal_fraction} the exponent begins at 2. Unset"
                " model.implementation, or set anneal_fraction=0."
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1).")

    @classmethod
    def parse(cls, config: ConfigDict) -> "RunConfig":
        """Checks a ConfigDict, or the plain dictionary it was saved as, and gives it types.

        Raises:
          ConfigError: a field is unknown or its value not allowed; the message names it.
        """
        values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        values = {name: _plain(value) for name, value in values.items()}
        try:
            for name, section in _SECTIONS.items():
                values[name] = section(**_known(section, values.get(name, {}), f"{name}."))
            values["model"] = _model_fields(values.get("model", {}))
            # Checks every field before any data is read; a variant's own patches divide its own images.
            patch_size = values["model"].get("patch_size")
            trial_size = {"image_size": patch_size} if patch_size else {}
            config_class(values["model"]["variant"]).from_variant(**(values["model"] | trial_size))
            return cls(**_known(cls, values, ""))
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The configuration cannot be run: {error}") from error

    def model_config(self, info: DatasetInfo) -> ModelConfig:
        """The model's description for a data set.

        Raises:
          ConfigError: the variant does not take images of the data set's size.
        """
        derived = {
            "image_size": info.image_size,
            "channels": info.channels,
            "num_classes": info.num_classes,
        }
        try:
            return config_class(self.model["variant"]).from_variant(**(self.model | derived))
        except ValueError as error:
            raise ConfigError(
                f"model.variant={self.model['variant']!r} does not fit the data set {info.name!r}: {error}"
            ) from error

    def idle_fields(self, model: ModelConfig, params: Any) -> list[str]:
        """Names of fields that are set, and have no effect on this model, whose parameters these are."""
        idle = idle_fields(self.optimizer, params)
        silent = []
        if not has_templates(params):
            silent = ["grad_inputs", "grad_kernel", "centered", "power_activation"]
            idle += ["anneal_fraction"] * bool(self.anneal_fraction)
        if getattr(model, "similarity", None) != "l1":
            silent += ["grad_query", "grad_key"]
        if {getattr(model, name, None) for name in ("linear", "output_projection")} == {"adder"}:
            silent.append("use_bias")
        idle += [f"model.{name}" for name in silent if self.model.get(name)]
        # What a field belongs to may be off, or not be there.
        for section, names, belongs_to in (
            ("augment", ["crop_scale"], self.augment.random_resized_crop),
            ("augment", ["randaugment_magnitude", "randaugment_std"], self.augment.randaugment_layers),
            ("warm_start", ["images"], self.warm_start.source),
            ("distillation", ["temperature"], self.distillation.soft_labels),
        ):
            given, unset = getattr(self, section), _SECTIONS[section]()
            changed = [name for name in names if getattr(given, name) != getattr(unset, name)]
            idle += [f"{section}.{name}" for name in changed if not belongs_to]
        if not self.data.validation_fraction and self.eval_every != RunConfig.eval_every:
            idle.append("eval_every")
        return idle

    def num_steps(self, info: DatasetInfo) -> int:
        """Number of updates of the run."""
        if self.total_steps is not None:
            return self.total_steps
        return max(round(self.epochs * info.train_examples / self.batch_size), 1)


def _section(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        # An optional field needs a typed placeholder: flags on the command line are parsed by type.
        optional = field.default is None
        type_ = _field_types(cls)[field.name]
        values[field.name] = config_dict.placeholder(type_) if optional else field.default
    return values


def _field_types(cls: type) -> dict[str, type]:
    """The type in which each field is written in a ConfigDict: the first one of a union."""
    types_ = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        types_[name] = typing.get_origin(hint) or hint
    return types_


def _model_fields(section: dict[str, Any]) -> dict[str, Any]:
    section = {name: value for name, value in section.items() if value is not None}
    for name in ("variant", "arithmetic"):
        if name not in section:
            raise ConfigError(f"model.{name} is not set; see `adderflax.VisionTransformerConfig`.")
    if derived := [f"model.{name}" for name in DERIVED_FIELDS if name in section]:
        raise ConfigError(
            f"{', '.join(derived)} cannot be set: the data set says it. Leave it out; data.image_size is the"
            " side that images are brought to."
        )
    if (module := section.pop("module", None)) is not None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"model.module={module!r} cannot be imported: {error}. It is the Python module that registers"
                " the run's model (adderflax.models.register_model); put its directory on PYTHONPATH."
            ) from error
    elif is_registered(section["variant"]):
        raise ConfigError(
            f"model.variant={section['variant']!r} is a model of your own: set"
            f" model.module={config_class(section['variant']).__module__!r}, the Python module that registers"
            " it, so that what reads the run later can import it."
        )
    return section


def _known(cls: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"Unknown configuration field {', '.join(prefix + name for name in unknown)}; the fields there"
            f" are {', '.join(fields)}."
        )
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    # JSON and ConfigDict turn tuples into lists.
    return tuple(value) if isinstance(value, list) else value
