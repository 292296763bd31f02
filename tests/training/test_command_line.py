"""Configuration files that cannot be loaded: one line says which line of which file, and why."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from adderflax.training.command_line import load_config, parse
from adderflax.training.config import ConfigError

BEGIN = """
from adderflax.training.config import default_config
def get_config():
    config = default_config()
"""


def refusal(file, *overrides):
    with pytest.raises(ConfigError) as refused:
        load_config(str(file), overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (\n", "line 1: '(' was never closed."),
        ("\nimport no_such_module", "line 2: ModuleNotFoundError: No module named 'no_such_module'."),
        (BEGIN + "    config.seed = three", "line 5: NameError: name 'three' is not defined."),
        (BEGIN + "    config.seed = 'x'", "line 5: TypeError: Could not override field 'seed'"),
        (BEGIN + "    open('/no/file')", "line 5: FileNotFoundError: [Errno 2] No such file"),
        (
            BEGIN + "    config.model.depht.x",
            "line 5: The configuration has no field 'depht'. Did you mean 'depth'?",
        ),
        (
            BEGIN + "    config.lock(); config.sed = 1",
            "line 5: The configuration has no field 'sed'. Did you mean",
        ),
        (BEGIN + "    raise ValueError('too late')", "line 5: too late."),
        (BEGIN + "    assert config.seed == 1", "line 5: AssertionError: assert config.seed == 1."),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, told):
    file = tmp_path / "mistaken.py"
    file.write_text(text)
    assert refusal(file, "--config.seed=1").startswith(f"{file} {told}")


def test_what_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    file = tmp_path / "empty.py"
    file.write_text("")
    assert f"{file} defines no get_config()" in refusal(file)
    file.write_text("def get_config(): pass")
    assert f"{file}:vit: get_config() takes 0 positional arguments but 1 was given." in refusal(f"{file}:vit")
    for overrides in ([], ["--config.seed=1"]):
        assert "returned None, not a ConfigDict: end it with return config." in refusal(file, *overrides)
    file.write_text(BEGIN + "    return config, 1")
    assert "returned a tuple, not a ConfigDict" in refusal(file)
    file.write_text(BEGIN + "    import ml_collections\n    return ml_collections.FrozenConfigDict(config)")
    assert "returned a FrozenConfigDict, whose fields nothing can set. Return a ConfigDict." in refusal(file)


def test_a_field_without_a_value(tmp_path):
    file = tmp_path / "required.py"
    line = "    config.seed = config_dict.required_placeholder(int)\n    return config"
    file.write_text("from ml_collections import config_dict" + BEGIN + line)
    for overrides in ([], ["--config.seed=1"]):
        assert "is a required_placeholder. Give it a value in the file" in refusal(file, *overrides)


def test_a_file_that_is_not_there(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    told = refusal("configs/digits_adder_vt.py:multiply", "--config.seed=1")
    assert told.startswith(
        f"There is no configuration file configs/digits_adder_vt.py, seen from {root}. Did"
    )
    assert "Did you mean configs/digits_adder_vit.py? There are configs/cifar100_adder_vit.py, " in told
    assert (
        refusal(tmp_path / "my.py") == f"There is no configuration file {tmp_path}/my.py, seen from {root}."
    )
    told = refusal("configs/", "--config.seed=1")
    assert told.startswith("configs is a directory, and a configuration is a file. In it: configs/cifar100_")
    assert refusal(tmp_path).endswith("In it: no Python file.")


def test_mistakes_on_the_command_line(root):
    file = root / "configs" / "digits_adder_vit.py"
    assert refusal(file, "--config.sed=1").startswith(
        "The configuration has no field 'sed'. Did you mean 'seed'?"
    )
    assert refusal(file, "--bogus") == "Unknown command line flag 'bogus'. --help shows the flags."
    assert refusal(file, "--config.seed=x").startswith("flag --config.seed=x: invalid literal for int()")
    for override, told in (
        ("--config.seed.x=1", "seed is a value, 0, and has no field 'x'."),
        ("--noconfig.seed.x", "seed is a value, 0, and has no field 'x'."),
        ("--config.optimizer.name.x=1", "optimizer.name is a value, 'adamw', and has no field 'x'."),
        ("--config.model.depth.x=1", "model.depth is unset and has no field 'x'."),
    ):
        assert refusal(file, override) == f"{override}: {told}"


def test_fields_are_unset(root):
    file = root / "configs" / "cifar10_adder_vit.py"
    warm = load_config(
        f"{file}:warm",
        [
            "--config.distillation.teacher=None",
            "--config.model.mlp_kernel_size",
            "None",
            "--config.data.train_examples=None",
            "--config.total_steps=3",
            "--config.total_steps=None",
            "--config.optimizer.adder_multiplier=None",
            "-config.optimizer.adder_multiplier=2",
            "--config.data.cache=None",
            "--noconfig.data.cache",
            "-config.model.depth=None",
            "--config.seed=4",
        ],
    )
    assert warm.distillation.teacher is warm.model.mlp_kernel_size is warm.data.train_examples is None
    assert warm.total_steps is None
    assert (warm.optimizer.adder_multiplier, warm.seed) == (2.0, 4)
    assert warm.data.cache is False and warm.model.depth is None
    assert warm.warm_start.source == load_config(f"{file}:warm").warm_start.source is not None
    for field in ("epochs", "data", "data.name", "model.arithmetic"):
        told = f"--config.{field}=None: this field cannot be unset. Give it a value."
        assert refusal(file, f"--config.{field}=None") == told
    assert refusal(file, "--config.sed=None").startswith("The configuration has no field 'sed'.")
    assert refusal(file, "--config.model.depth.x=None") == (
        "--config.model.depth.x=None: model.depth is unset and has no field 'x'."
    )


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--config=a.py", "--config", "b.py:vit"], "--config is given 2 times: a.py, b.py. Give one."),
        (["--config.seed=1"], "--config is missing: --config.seed=1 sets a field of a configuration file."),
        (["--noconfig.x"], "--config is missing: --noconfig.x sets a field of a configuration file."),
        (["--config="], "--config needs a file, as in --config configs/digits_adder_vit.py."),
        (["--config", "--workdir=x"], "--config needs a file, as in --config configs/digits_adder_vit.py."),
        (["--best"], "Unknown command line flag 'best'. --help shows the flags."),
    ],
)
def test_commands_without_one_file(command, told):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["train.py", *command])
    with pytest.raises(ConfigError) as refused:
        parse(values, holder, ["train.py", *command])
    assert str(refused.value).startswith(told)
