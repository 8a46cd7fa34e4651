"""Frozen dataclasses that check what they are given, and their way back from nested dicts. Imports nothing of ours."""

import dataclasses
import difflib
import math
import typing
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar


def require(condition: bool, field: str, value: Any, way_out: str) -> None:
  """Raises ValueError "field=value: way_out" unless `condition`."""
  if not condition:
    raise ValueError(f"{field}={value!r}: {way_out}")


def require_choice(field: str, value: str, choices: Iterable[str]) -> None:
  """Raises ValueError, with the choices and the nearest of them, unless `value` is one."""
  require(value in choices, field, value, f"choose one of {', '.join(choices)}.{nearest(value, choices)}")


def nearest(word: str, known: Iterable[str]) -> str:
  """' Did you mean 'x'?' for the closest of `known`, or an empty string."""
  close = difflib.get_close_matches(str(word), list(known), n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def warn_renamed(old: str, new: str) -> None:
  """Says that a field or flag is read under its earlier name."""
  warnings.warn(f"{old} is now called {new}; the earlier name is still read.", FutureWarning, stacklevel=2)


class Checked:
  """Checks the type of every field, so that a float for an int is found where it is written.

  Attributes:
    renamed: earlier names of fields, and the fields that they name today. `build` reads both.
    may_be_infinite: fields for which infinity has a meaning; all others must be finite.
  """

  renamed: ClassVar[dict[str, str]] = {}
  may_be_infinite: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    for field, kind in _field_types(type(self)).items():
      value = getattr(self, field)
      if kind is float and type(value) is int:
        object.__setattr__(self, field, float(value))
      elif kind == tuple[float, ...]:
        object.__setattr__(self, field, _floats(field, value))
      elif kind in (int, float, str, bool) and type(value) is not kind:
        raise ValueError(f"{field}={value!r}: expected {kind.__name__}, got {type(value).__name__}.")
      if kind is float and not math.isfinite(value) and not (value == math.inf and field in self.may_be_infinite):
        raise ValueError(f"{field}={value!r}: must be a finite number.")
    self.validate()

  def validate(self) -> None:
    """Raises ValueError naming the field, its value and the way out."""


def build(cls: Any, fields: Any, path: str) -> Any:
  """Builds dataclass `cls` from nested dicts.

  A key that `cls.renamed` has is read as the field that it names today, with a FutureWarning.

  Args:
    cls: a `Checked` dataclass.
    fields: its fields.
    path: what names `fields` in messages, such as "config".

  Raises:
    ValueError: names the path of an unknown key, a missing one, or a value that `cls` refuses.
  """
  if not isinstance(fields, typing.Mapping):
    raise ValueError(f"{path}={fields!r}: expected the fields of {cls.__name__}.")
  hints = _field_types(cls)
  values = {}
  for key, value in fields.items():
    if key in cls.renamed:
      new = cls.renamed[key]
      if new in fields:
        raise ValueError(f"{path}.{key}={value!r}: this is the earlier name of {path}.{new}, which is given too.")
      warn_renamed(f"{path}.{key}", f"{path}.{new}")
      key = new
    if key not in hints:
      raise ValueError(f"{path}.{key} is unknown.{nearest(key, hints)} Known: {', '.join(hints)}.")
    kind = hints[key]
    if dataclasses.is_dataclass(kind):
      value = build(kind, value, f"{path}.{key}")
    elif typing.get_origin(kind) is tuple:
      element = typing.get_args(kind)[0]
      if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}.{key}={value!r}: expected a sequence of {element.__name__}.")
      if dataclasses.is_dataclass(element):
        value = [build(element, v, f"{path}.{key}[{i}]") for i, v in enumerate(value)]
      value = tuple(value)
    values[key] = value
  missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and f.default is dataclasses.MISSING]
  if missing:
    raise ValueError(f"{path}.{missing[0]} is missing: give {cls.__name__} its {', '.join(missing)}.")
  try:
    return cls(**values)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def flattened(config: Any) -> dict[str, Any]:
  """The fields of a dataclass by their paths, e.g. `num_layers` and `attention.projection`, without its parts."""
  fields: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      fields |= {f"{field.name}.{name}": inner for name, inner in flattened(value).items()}
    else:
      fields[field.name] = value
  return fields


def _floats(field: str, value: Any) -> tuple[float, ...]:
  """A tuple of finite numbers as floats; ValueError for anything else."""
  if type(value) is not tuple or any(type(number) not in (int, float) or not math.isfinite(number) for number in value):
    raise ValueError(f"{field}={value!r}: expected a tuple of finite numbers, as in (0.5,).")
  return tuple(map(float, value))


def _field_types(cls: type) -> dict[str, Any]:
  """Returns the fields of a dataclass and their types."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
