"""Configuration files (`configs/*.py`) and their overrides from the command line.

A configuration file is Python with a function `get_config()` that returns an
`ml_collections.ConfigDict`; `get_config(preset)` where it offers several. An override is
`"field.path=value"`, on the command line `--config.field.path=value`. Every failure is a
ValueError that names the file or the field.
"""

import copy
import inspect
import pathlib
import runpy

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags


def load(path, overrides=()) -> config_dict.ConfigDict:
  """Runs a configuration file and applies overrides.

  Args:
    path: a Python file with `get_config()`.
    overrides: strings "field.path=value"; the last one of a field wins. "preset=NAME" is
      what `get_config(preset)` is called with, before all others, wherever it stands.

  Returns:
    The locked configuration.

  Raises:
    ValueError: the file is missing, does not run or returns something else; an override
      names no field or does not parse as the field's type.
  """
  presets = [text.removeprefix("preset=") for text in overrides if text.startswith("preset=")]
  return override(_run(pathlib.Path(path), *presets[-1:]), overrides)


def merge(default, path) -> config_dict.ConfigDict:
  """A copy of `default` with the fields that the file at `path` sets.

  Raises:
    ValueError: as `load`; the file sets a field that `default` lacks, or with another type.
  """
  merged = copy.deepcopy(default)
  _update(merged, _run(pathlib.Path(path)), f"config file {path}: ")
  _check_tuples(default, merged, f"config file {path}: ")
  return merged


def override(config, overrides) -> config_dict.ConfigDict:
  """A locked copy of `config` with `overrides` ("field.path=value") applied in order.

  Raises:
    ValueError: names the override and says what is wrong with it.
  """
  result = copy.deepcopy(config)
  for text in overrides:
    field, equals, value = text.partition("=")
    if not equals:
      raise ValueError(f"--config.{text}: write it as --config.{text}=VALUE")
    _check_field(result, field)
    result = _parse(result, f"--config.{field}={value}")
    _check_tuples(config, result, f"--config.{text}: ")
  result.lock()
  return result


def _run(path: pathlib.Path, *preset) -> config_dict.ConfigDict:
  if not path.is_file():
    raise ValueError(f"config file {path}: no such file")
  try:
    get_config = runpy.run_path(str(path))["get_config"]
    if preset and not inspect.signature(get_config).parameters:
      raise ValueError("has no presets")
    config = get_config(*preset)
  except KeyError as e:
    raise ValueError(f"config file {path}: has no function get_config() ({_text(e)})") from e
  except Exception as e:  # whatever the file's own code raises is a fault of the file
    raise ValueError(f"config file {path}: {type(e).__name__}: {_text(e)}") from e
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(f"config file {path}: get_config() returned a {type(config).__name__}, "
                     "not an ml_collections.ConfigDict")
  return config


def _update(target, source, where, path=""):
  for name, value in source.items():
    field = path + name
    if name not in target:
      raise ValueError(f"{where}no field {field!r}; known: {', '.join(target)}")
    is_group = isinstance(target[name], config_dict.ConfigDict)
    if is_group != isinstance(value, config_dict.ConfigDict):
      raise ValueError(f"{where}field {field!r} must {'' if is_group else 'not '}be a ConfigDict")
    if is_group:
      _update(target[name], value, where, field + ".")
    else:
      _assign(target, name, value, f"{where}field {field!r}: ")


def _assign(target, name, value, where):
  if value is None and target[name] is not None:
    raise ValueError(f"{where}must have a value, like {target[name]}")
  try:
    target[name] = value
  except TypeError as e:
    raise ValueError(where + _text(e)) from e


def _parse(config, argument):
  # A FlagValues of its own, so that neither absl's global flags nor sys.argv take part.
  values = flags.FlagValues()
  argv = ["irg", argument]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, KeyError, AttributeError, TypeError, ValueError, SyntaxError) as e:
    raise ValueError(f"{argument}: {_text(e)}") from e
  return values.config


def _check_field(config, field):
  """Says which name of the path is wrong; config_flags would not."""
  node, path = config, field.split(".")
  for i, name in enumerate(path):
    if not isinstance(node, config_dict.ConfigDict) or name not in node:
      where = ".".join(path[:i]) or "the configuration"
      known = ", ".join(node) if isinstance(node, config_dict.ConfigDict) else "none"
      raise ValueError(f"--config.{field}: no field {name!r} in {where}; its fields: {known}")
    node = node[name]
  if isinstance(node, config_dict.ConfigDict):
    fields = ", ".join(f"--config.{field}.{name}" for name in node)
    raise ValueError(f"--config.{field} is a group of fields; set one of them: {fields}")


def _check_tuples(default, config, prefix):
  """ConfigDict fixes a field's type but not that of a tuple's elements."""
  for name, value in default.items():
    new = config[name]
    if isinstance(value, config_dict.ConfigDict):
      _check_tuples(value, new, prefix)
    elif isinstance(value, tuple) and value:
      kind = type(value[0])
      accepted = (int, float) if kind is float else (kind,)
      if not all(type(v) in accepted for v in new):
        raise ValueError(f"{prefix}field {name!r} must hold {kind.__name__} values like "
                         f"{value}, got {new}")


def _text(e: Exception) -> str:
  return " ".join(str(a) for a in e.args) or type(e).__name__
