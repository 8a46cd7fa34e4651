"""The one wrapper of all doors: a user's mistake is one line on stderr and exit code 2.

A mistake is a file that is not there or a `ValueError` that this package raised about its input.
A run whose numbers are no longer finite is one line too, with exit code 1. Everything else that goes
wrong keeps its traceback: it is ours to mend.
"""

import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from tokenformer_jax.config import Config

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_PACKAGE = pathlib.Path(__file__).parent.parent


def run(main) -> None:
  """Runs `main(argv)` as absl's `app.run` does, with `--help` and users' mistakes handled.

  Exits with 0 after success and after `--help`, with 2 after a bad flag, a missing required flag,
  an unknown configuration key or a `ValueError` that a library function raised about its input.
  """
  if any(re.fullmatch(r"--?(help|helpshort|helpfull)", argument) for argument in sys.argv[1:]):
    print(sys.modules[main.__module__].__doc__.strip(), end="\n\n")
    print(flags.FLAGS.module_help(sys.modules[main.__module__]))
    sys.exit(0)

  logging.set_verbosity(logging.WARNING)  # Orbax tells every save in some twenty lines; --verbosity=0 shows them.

  def parse(argv):
    try:
      argv = flags.FLAGS(argv)
    except flags.Error as error:
      fail(str(error))
    except Exception as error:  # Whatever a --config file, or a value for one of its fields, raises.
      fail(f"--config: {_described(error)}")
    if len(argv) > 1:
      fail(f"argument {argv[1]!r} is not a flag: flags look like --name=value.")
    return argv

  def guarded(argv):
    try:
      return main(argv)
    except _FILE_ERRORS as error:
      fail(str(error))
    except ValueError as error:
      raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
      if _PACKAGE not in raised_in.parents:
        raise
      fail(str(error))
    except FloatingPointError as error:
      fail(str(error), code=1)

  app.run(guarded, flags_parser=parse)


def read_config(flag: flags.FlagHolder) -> Config:
  """The validated configuration behind a `config_flags.DEFINE_config_file` flag.

  Raises:
    ValueError: no such file, a file that does not run, or a configuration that does not do.
  """
  try:
    fields = flag.value.to_dict()
  except OSError:  # Of a file that could not be read, the flag says so only here.
    filename = config_flags.get_config_filename(flags.FLAGS[flag.name])
    raise ValueError(f"--config={filename}: no such file, or none that can be read.") from None
  except Exception as error:
    raise ValueError(f"--config: {_described(error)}") from None
  return Config.from_dict(fields)


def fail(message: str, code: int = 2) -> None:
  """Prints one line on stderr and exits."""
  print("error:", *message.split(), file=sys.stderr)
  sys.exit(code)


def _described(error: Exception) -> str:
  # ml_collections makes AttributeErrors of KeyErrors, and as a text a KeyError is quoted.
  unknown = error if isinstance(error, KeyError) else error.__context__
  if isinstance(unknown, KeyError) and unknown.args:
    return str(unknown.args[0])
  return f"{type(error).__name__}: {error}"
