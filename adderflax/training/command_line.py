"""``--config FILE[:argument] --config.a.b=value``, with mistakes told in one paragraph."""

import argparse
import difflib
import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from adderflax.training.config import ConfigError, default_config


def parse(values: flags.FlagValues, holder: flags.FlagHolder, command: Sequence[str]) -> list[str]:
    """Parses a command whose flags hold a configuration, and loads the configuration.

    Args:
      values: the flags.
      holder: the flag among them that `config_flags.DEFINE_config_file` defined.
      command: the program's name and its arguments.

    Returns:
      The program's name and the arguments that are no flags.

    Raises:
      ConfigError: a flag or a field is unknown, a value has the wrong type, or the file cannot be loaded.
    """
    _require_file(holder.name, command)
    unset, others = _without_value(holder.name, command)
    try:
        rest = values(others)
        # A file that cannot be loaded is only reported when something of it is read.
        getattr(holder.value, "model", None)
    except BrokenPipeError:
        raise  # of the output of --help, which is no mistake
    except Exception as error:
        message = (
            _inside_the_file(error, f"{holder.name}_config")
            or _below_a_value(values[holder.name], command)
            or _outside_of_it(error)
        )
        if not message:
            raise
        raise ConfigError(message) from error
    if not values[holder.name].using_default_value and not isinstance(holder.value, ConfigDict):
        raise ConfigError(_no_configuration(holder.value))
    for field in unset:
        _unset(holder.name, holder.value, field)
    return rest


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a configuration file.

    Args:
      file: its path, with an argument behind a colon where it takes one: ``configs/X.py:multiply``.
      overrides: ``--config.a.b=value`` for each field to change; ``None`` unsets one that may be unset.

    Raises:
      ConfigError: the file cannot be loaded, a field is unknown or a value has the wrong type.
    """
    values = flags.FlagValues()
    command = ["load_config", f"--config={file}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    parse(values, holder, command)
    return holder.value


def require_overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Ends a command with a usage error if arguments that its parser left over are no --config.a.b=value."""
    for argument in rest:
        if not re.match(r"--?(no)?config\.", argument):
            parser.error(f"unknown argument {argument}; fields are set by --config.a.b=value")


def _require_file(flag: str, command: Sequence[str]) -> None:
    """Raises a ConfigError if the file that `flag` names in `command` is not there."""
    given = [value.partition(":")[0] for value in _given(flag, command)]
    if len(given) > 1:
        raise ConfigError(f"--{flag} is given {len(given)} times: {', '.join(given)}. Give one.")
    fields = [word for word in command if re.match(rf"--?(no)?{flag}\.", word)]
    if fields and not given:
        raise ConfigError(
            f"--{flag} is missing: {fields[0]} sets a field of a configuration file. Name it first."
        )
    if given and (not given[0] or given[0].startswith("-")):
        raise ConfigError(f"--{flag} needs a file, as in --{flag} configs/digits_adder_vit.py.")
    for file in map(Path, given):
        if file.is_file() and file.suffix == ".json":
            raise ConfigError(
                f"{file} is no configuration file, which is Python with a get_config(). It may be what a run"
                " has written down: name the file of configs/ that the run was started with, and its fields."
            )
        if file.is_file():
            continue
        if file.is_dir():
            inside = ", ".join(map(str, sorted(file.glob("*.py")))) or "no Python file"
            raise ConfigError(f"{file} is a directory, and a configuration is a file. In it: {inside}.")
        there = {path.stem: str(path) for path in sorted(Path("configs").glob("*.py"))}
        near = difflib.get_close_matches(file.stem, there, n=1, cutoff=0.5)
        proposal = f" Did you mean {there[near[0]]}? There are {', '.join(there.values())}." if near else ""
        raise ConfigError(f"There is no configuration file {file}, seen from {Path.cwd()}.{proposal}")


def _given(flag: str, command: Sequence[str]) -> Iterator[str]:
    """The values that a command gives a flag, as --flag=value or --flag value."""
    for word, following in zip(command, (*command[1:], "")):
        name, given, value = word.partition("=")
        if name in (f"-{flag}", f"--{flag}"):
            yield value if given else following


def _without_value(flag: str, command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The fields that a command sets to None, which no type of a flag can spell, and its other words."""
    unset, others, words = [], [], list(command)
    while words:
        word = words.pop(0)
        name, given, value = word.partition("=")
        named = re.match(rf"--?(?:no)?{flag}\.(.+)", name)
        if named and named[1] in unset:
            unset.remove(named[1])  # what is given last counts
        if named and (value if given else (words or [""])[0]) == "None":
            unset.append(named[1])
            words = words if given else words[1:]
        else:
            others.append(word)
    return unset, others


def _unset(flag: str, config: ConfigDict, field: str) -> None:
    """Sets a field to None if the default configuration leaves it unset too."""
    *sections, name = field.split(".")
    default = default_config()
    for section in sections:
        config, default = config[section], default.get(section, {})
    if default.get(name, name) is not None:
        raise ConfigError(f"--{flag}.{field}=None: this field cannot be unset. Give it a value.")
    config[name] = None


def _inside_the_file(error: BaseException | None, module: str) -> str:
    """Which line of the configuration file, loaded as `module`, failed and why; empty where none did."""
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        places = [(f.f_code.co_filename, line) for f, line in frames if f.f_globals.get("__name__") == module]
        if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
            places, reason = [(error.filename, error.lineno)], error.msg
        elif places:
            # A ValueError is a refusal in words of its own.
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            # A bare assertion says no more than its line does.
            linecache.checkcache(places[-1][0])
            text = " ".join(str(error).split()) or linecache.getline(*places[-1]).strip()
            reason = _unknown_field(error) or f"{kind}{text}"
        if places:
            file, line = places[-1]
            return f"{file} line {line}: {reason}{'' if reason.endswith(('.', '?')) else '.'}"
        # What refuses a value of a flag hides what the file raised.
        error = error.__cause__ or error.__context__
    return ""


def _no_configuration(loaded: object) -> str:
    kind = "None" if loaded is None else f"a {type(loaded).__name__}"
    return (
        f"The configuration file's get_config() returned {kind}, not a ConfigDict: end it with return config."
    )


def _below_a_value(flag: flags.Flag, command: Sequence[str]) -> str:
    """Which field that `command` sets lies below what has no fields; empty where none does."""
    try:
        given = list(_given(flag.name, command))
        config = flag.parser.parse(given[0]) if given else ConfigDict()
        # What has no value yet, or is none, is told by the error itself.
        if not isinstance(config, ConfigDict):
            return _no_configuration(config)
    except Exception:
        return ""
    for word in command:
        node, above = config, []
        if not (named := re.match(rf"--?(?:no)?{flag.name}\.([\w.]+)", word)):
            continue
        for name in named[1].split("."):
            if not isinstance(node, ConfigDict):
                held = "unset" if node is None else f"a value, {node!r},"
                return f"{word}: {'.'.join(above)} is {held} and has no field {name!r}."
            if name not in node:
                break
            node, above = node[name], [*above, name]
    return ""


def _outside_of_it(error: Exception) -> str:
    """What is wrong with flags and fields; empty where it is something else."""
    message = _unknown_field(error)
    if isinstance(error, AttributeError) and error.name == "get_config":
        message = f"{error.obj.__file__} defines no get_config(), which returns the configuration."
    elif isinstance(error, config_dict.RequiredValueError):
        message = (
            "A field of the configuration is a required_placeholder. Give it a value in the file: the command"
            " line's values come later."
        )
    elif "FrozenConfigDict" in str(error):
        message = (
            "get_config() returned a FrozenConfigDict, whose fields nothing can set. Return a ConfigDict."
        )
    elif isinstance(error, (flags.Error, OSError, ValueError)):
        flag, failed, failure = str(error).partition(" Error whilst parsing config file:")
        # The reason is the last line of a traceback, behind the way through this library.
        text = f"{flag} {failure.rpartition('Error: ')[2]}" if failed else flag
        message = f"{' '.join(text.split()).rstrip('.')}."
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"{message} --help shows the flags."
    described = "--help shows the flags, and docs/training.md names where each field is described."
    return message and f"{message} {described}"


def _unknown_field(error: Exception) -> str:
    """Names the field that a ConfigDict does not have; empty where the error is another one."""
    raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
    if not isinstance(error, (AttributeError, KeyError)) or "ml_collections" not in raised_by:
        return ""
    if "does not support indexing" in str(error) or "FrozenConfigDict" in str(error):
        return ""  # what it names is no field
    # ml_collections quotes the unknown name first, then proposes the nearest one that exists.
    text = str(error.args[0]).replace("\\n", " ")
    proposal = re.search(r"you mean \W*(\w+)", text)
    name = re.search(r"(?:Key \W*)?(\w+)", text)[1]
    proposed = f" Did you mean {proposal[1]!r}?" if proposal else ""
    return f"The configuration has no field {name!r}.{proposed}"
