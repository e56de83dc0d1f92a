"""Checkpoint folders: complete or absent, and what they hold beside the parameters."""

import pathlib
import shutil

# What belongs to a checkpoint beside its weights and sizes: tokenizer, and how to generate.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "special_tokens.json",
                   "generate.json")


def copy_tokenizer(source, folder: pathlib.Path) -> None:
  """Copies those of `TOKENIZER_FILES` that `source` has; does nothing where it is None."""
  for name in TOKENIZER_FILES:
    if source is not None and (pathlib.Path(source) / name).is_file():
      shutil.copyfile(pathlib.Path(source) / name, folder / name)
