"""Functions of the user's own, named on the command line as MODULE:FUNCTION."""

import importlib
import os
import sys


def load(spec: str, flag: str):
  """The function that `spec` names; modules of the working directory are found as well.

  Args:
    spec: for example "my_models.detector:detect".
    flag: the flag that it came with, for messages.

  Raises:
    ValueError: says which part of `spec` is at fault.
  """
  module_name, _, name = spec.partition(":")
  if not module_name or not name:
    raise ValueError(f"{flag} {spec!r}: write MODULE:FUNCTION")
  if os.getcwd() not in sys.path and "" not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise ValueError(f"{flag} {spec!r}: cannot import {module_name} ({e})") from e
  function = getattr(module, name, None)
  if not callable(function):
    raise ValueError(f"{flag} {spec!r}: {module_name} has no function {name}")
  return function
