"""Checks jaxtyping's annotations in the tests: `conftest.py` gives `check` to jaxtyping's import hook.

An annotation states a shape and a kind of dtype. Inputs may be NumPy arrays wherever JAX takes them, so the type of the
array is not checked. Dataclasses that are pytrees are not checked either, because JAX rebuilds them with other leaves
(stacked layers, shardings, `None`); what a function takes out of them is checked where it is passed on.
"""

import functools
import inspect
import typing
from typing import Any

from jaxtyping import AbstractArray


def check(function):
  """Wraps `function`: arrays among its arguments and its result must have the annotated shapes and dtypes."""
  if function.__name__ == "__init__":
    return function
  signature = inspect.signature(function)
  annotated = {
    name: found for name, p in signature.parameters.items() if (found := _array_annotation(p.annotation)) is not None
  }
  result = _array_annotation(signature.return_annotation)

  @functools.wraps(function)
  def checked(*args, **kwargs):
    arguments = signature.bind(*args, **kwargs).arguments
    for name, annotation in annotated.items():
      _require(arguments.get(name), annotation, name)
    value = function(*args, **kwargs)
    if result is not None:
      _require(value, result, "the result")
    return value

  return checked


def _array_annotation(annotation) -> Any:
  """The annotation of an array, for arrays of any type; None if it is no single array's."""
  found = [a for a in (annotation, *typing.get_args(annotation)) if inspect.isclass(a) and issubclass(a, AbstractArray)]
  return found[0].dtype[Any, found[0].dim_str] if len(found) == 1 else None


def _require(value, annotation, name: str):
  if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, annotation):
    raise TypeError(f"{name} is {value.dtype}{list(value.shape)}, annotated as {annotation.__name__}.")
