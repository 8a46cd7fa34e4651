"""The wrapper of all CLI commands: a user's mistake is one line on stderr and exit code 2.

A mistake is a missing file, an unknown flag or field, or a `ValueError` that this package raised about its input. A
full device or another error of the operating system is one line too, with exit code 1, and a run whose numbers are no longer finite, with exit code 3; a reader
that closed the pipe ends the command in silence, as it does with other tools. Every other error keeps its traceback,
because it is a fault of this package.
"""

import dataclasses
import errno
import io
import os
import pathlib
import re
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator, Mapping

from absl import app, flags, logging
from ml_collections import config_flags

from tokenformer_jax.config import Config
from tokenformer_jax.config.validation import nearest, warn_renamed

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A run whose numbers are bad: the same command again would give the same numbers.
DIVERGED_EXIT_CODE = 3
_PACKAGE = pathlib.Path(__file__).parent.parent
_RENAMED = {"config.growth.how": "config.growth.method"}


def run(main, renamed: Mapping[str, str] | None = None) -> None:
  """Runs `main(argv)` as absl's `app.run` does, with `--help` and users' mistakes handled.

  Args:
    main: what the command does once its flags are read.
    renamed: earlier names of flags, and the flags that they name today.

  Raises:
    SystemExit: with 0 after `--help`; with 1, 2 or 3 after an error that the module's docstring names; with 141 where
      the reader of stdout closed the pipe.
  """
  format_warning = warnings.formatwarning
  warnings.formatwarning = lambda message, category, *rest: (
    f"warning: {message}\n" if category is FutureWarning else format_warning(message, category, *rest)
  )
  if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
    # A terminal in latin-1 cannot show every character of a text: the rest is shown by its number.
    sys.stdout.reconfigure(errors="backslashreplace")
  logging.set_verbosity(logging.WARNING)  # Orbax writes some twenty lines for each save; --verbosity=0 shows them.
  logging.get_absl_logger().addFilter(_is_news)
  sys.unraisablehook = _report_unraisable
  # ml_collections looks for a configuration's fields in sys.argv itself.
  sys.argv[1:] = [_current_name(argument, {**_RENAMED, **(renamed or {})}) for argument in sys.argv[1:]]

  def parse(argv):
    if error := next(_unknown_fields(argv[1:]), None):
      fail(error)
    try:
      argv = flags.FLAGS(argv)
    except flags.Error as error:
      # A --config file of this package may have refused what it was given; the flag's own message has a traceback then.
      refused = [_mistake(cause) for cause in _causes(error.__context__)]
      fail(next(filter(None, refused), str(error)))
    except Exception as error:  # A --config file may raise anything, and so may a value for one of its fields.
      fail(f"--config: {_described(error)}")
    if len(argv) > 1:
      fail(f"argument {argv[1]!r} is not a flag: flags look like --name=value.")
    return argv

  def guarded(argv):
    with _Reporting():
      result = main(argv)
      sys.stdout.flush()  # A closed pipe or a full device may show only here.
      return result

  if any(re.fullmatch(r"--?(help|helpshort|helpfull)", argument) for argument in sys.argv[1:]):
    with _Reporting():
      print((sys.modules[main.__module__].__doc__ or "").strip(), end="\n\n")
      print(flags.FLAGS.module_help(sys.modules[main.__module__]), flush=True)
    sys.exit(0)
  app.run(guarded, flags_parser=parse)


def read_config(flag: flags.FlagHolder) -> Config:
  """Returns the validated configuration of a `config_flags.DEFINE_config_file` flag.

  Raises:
    ValueError: there is no such file, it does not run, or its configuration is refused.
  """
  try:
    fields = flag.value.to_dict()
  except OSError:  # The flag reads the file here, and not before.
    filename = config_flags.get_config_filename(flags.FLAGS[flag.name])
    raise ValueError(f"--config={filename}: no such file, or one that cannot be read.") from None
  except Exception as error:
    raise ValueError(f"--config: {_described(error)}") from None
  return Config.from_dict(fields)


def fail(message: str, code: int = 2) -> typing.NoReturn:
  """Prints one line on stderr and exits; with several processes, all of them exit with this code."""
  print("error:", *message.split(), file=sys.stderr, flush=True)
  if failures := _several():
    failures.end_all(code, message)
  sys.exit(code)


def _is_news(record) -> bool:
  """Whether a line of the log is to be shown: Orbax shows pages for a failed save, of which the run says one line."""
  return logging.level_info() or record.levelname != "ERROR" or "/orbax/checkpoint/" not in record.pathname


def _report_unraisable(unraisable) -> None:
  """Python's report, except where tensorstore ends a write that nobody waits for after another write failed."""
  if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _several():
  """The module that tells other processes of a failure, None where there are none; imports no jax."""
  failures = sys.modules.get("tokenformer_jax.distributed.failures")
  return failures if failures and failures.several() else None


class _Reporting:
  """Turns users' mistakes and full devices into one line, and a closed pipe into silence; a context manager."""

  def __enter__(self) -> None:
    return None

  def __exit__(self, kind, error, trace) -> None:
    if error is None:
      return
    if isinstance(error, BrokenPipeError):
      _discard_stdout()
      sys.exit(128 + signal.SIGPIPE)
    if full := [cause for cause in _causes(error) if _is_full(cause)]:
      _discard_stdout()
      # What names the newest checkpoint says more than the error of a log that is closed after it.
      told = next((cause for cause in full if isinstance(cause, OSError) and cause.errno is None), full[0])
      fail(f"the device is full, and what was being written is not complete: {told}", code=1)
    if isinstance(error, OSError) and not isinstance(error, _FILE_ERRORS):  # A checkpoint that could not be saved, too.
      failures = _several()
      if failures and error.__cause__ and (lost := failures.reason(error.__cause__)):
        fail(lost[1], lost[0])
      fail(str(error), code=1)
    if isinstance(error, FloatingPointError):
      fail(str(error), code=DIVERGED_EXIT_CODE)
    message = str(error) if isinstance(error, _FILE_ERRORS) else _mistake(error)
    if message is not None:
      fail(message)
    if failures := _several():
      if lost := failures.reason(error):
        fail(lost[1], lost[0])
      if isinstance(error, Exception):
        traceback.print_exception(error)
        failures.end_all(1, f"{type(error).__name__}: {error}")


def _mistake(error: BaseException) -> str | None:
  """Returns the message for an error that the user can mend, None for any other."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  if isinstance(error, (RuntimeError, AssertionError)) and pathlib.Path(frame.filename).name == "xla_bridge.py":
    # JAX has no text at all where JAX_PLATFORMS=cuda finds no GPU.
    return (
      f"JAX_PLATFORMS={sys.modules['jax'].config.jax_platforms!r}: this machine has no such device, or the JAX plugin for "
      f"it is not installed; unset JAX_PLATFORMS, or choose cpu. {error}"
    )
  if type(error).__name__ == "TypePromotionError":
    return (
      "JAX_NUMPY_DTYPE_PROMOTION=strict: this package relies on JAX's standard promotion of dtypes; unset it, or set "
      f"it to standard. {error}"
    )
  # Text that stdout's encoding cannot express is no fault of the input.
  if not isinstance(error, ValueError) or isinstance(error, UnicodeEncodeError):
    return None
  return str(error) if _PACKAGE in pathlib.Path(frame.filename).parents else None


def _is_full(error: BaseException) -> bool:
  # tensorstore reports a full device as a ValueError with the system's text.
  return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _discard_stdout() -> None:
  """Sends what stdout still holds nowhere, so that Python does not fail once more when it exits."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _current_name(argument: str, renamed: Mapping[str, str]) -> str:
  """Returns a command-line argument with the present name of the flag that it sets."""
  match = re.fullmatch(r"(?s)(--?)([^=]+)(=.*)?", argument)
  if not match or match[2] not in renamed:
    return argument
  warn_renamed(f"--{match[2]}", f"--{renamed[match[2]]}")
  return f"{match[1]}{renamed[match[2]]}{match[3] or ''}"


def _unknown_fields(arguments: list[str]) -> Iterator[str]:
  """Yields a message for each `--config.…` that names no field of `Config`."""
  for argument in arguments:
    match = re.match(r"--?config\.([^=]+)", argument)
    kind, path = Config, "config"
    for part in match[1].split(".") if match else ():
      name, bracket, _ = part.partition("[")
      known = typing.get_type_hints(kind)
      if name not in {field.name for field in dataclasses.fields(kind)}:
        fields = [field.name for field in dataclasses.fields(kind)]
        yield f"--{path}.{name} is unknown.{nearest(name, fields)} Known: {', '.join(fields)}."
        break
      kind, path = known[name], f"{path}.{name}"
      if bracket or not dataclasses.is_dataclass(kind):
        break  # ml_collections itself checks what comes after an index or a value.


def _described(error: Exception) -> str:
  # ml_collections raises an AttributeError in the place of a KeyError, whose text is quoted.
  unknown = error if isinstance(error, KeyError) else error.__context__
  if isinstance(unknown, KeyError) and unknown.args:
    return str(unknown.args[0])
  return f"{type(error).__name__}: {error}"
