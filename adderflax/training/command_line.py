"""``--config FILE[:argument] --config.a.b=value``, with mistakes told in one paragraph."""

import re
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from adderflax.training.config import ConfigError


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
    try:
        rest = values(command)
        # A file that cannot be loaded is only reported when something of it is read.
        getattr(holder.value, "model", None)
        return rest
    except (AttributeError, KeyError) as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise  # a mistake inside the configuration file: its author needs the traceback
        # ml_collections quotes the unknown name first, then proposes the nearest one that exists.
        words = re.findall(r"\w+", str(error.args[0]).replace("\\n", " "))
        proposal = f" Did you mean {words[4]!r}?" if "mean" in words else ""
        message = f"The configuration has no field {words[0]!r}.{proposal}"
    except (flags.Error, OSError, ValueError) as error:
        flag, _, failure = str(error).partition(" Error whilst parsing config file:")
        # What the file itself refused is told in the last line, behind the way through this library.
        _, refused, reason = failure.rstrip().rpartition("\nValueError: ")
        text = f"{flag} {reason}" if refused else str(error)
        message = f"{' '.join(text.split()).rstrip('.')}."
    raise ConfigError(
        f"{message} The fields are described in adderflax/training/config.py; --help shows the flags."
    )


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a configuration file.

    Args:
      file: its path, with an argument behind a colon where it takes one: ``configs/X.py:multiply``.
      overrides: ``--config.a.b=value`` for each field to change.

    Raises:
      ConfigError: the file cannot be loaded, a field is unknown or a value has the wrong type.
    """
    values = flags.FlagValues()
    command = ["load_config", f"--config={file}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    parse(values, holder, command)
    return holder.value
