"""Checkpoint folders: complete or absent, and what they hold beside the parameters."""

import contextlib
import json
import os
import pathlib
import shutil

from irg_jax.weights.errors import CheckpointError

# What belongs to a checkpoint beside its weights and sizes: tokenizer, and how to generate.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "special_tokens.json",
                   "generate.json")


def check_absent(folder) -> None:
  """Refuses a folder that exists, unless it is empty.

  Raises:
    CheckpointError: what is in the way.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise CheckpointError(f"{folder}: exists and is not an empty folder; choose another or "
                          "remove it")


@contextlib.contextmanager
def new_folder(folder):
  """Yields a folder beside `folder` to write to; it is renamed on success, else removed.

  Raises:
    CheckpointError: `folder` exists and is not an empty folder.
  """
  check_absent(folder)
  folder = pathlib.Path(folder).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
  partial.mkdir()
  try:
    yield partial
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def copy_tokenizer(source, folder: pathlib.Path) -> None:
  """Copies those of `TOKENIZER_FILES` that `source` has; does nothing where it is None."""
  for name in TOKENIZER_FILES:
    if source is not None and (pathlib.Path(source) / name).is_file():
      shutil.copyfile(pathlib.Path(source) / name, folder / name)


def write_json(path: pathlib.Path, content) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
