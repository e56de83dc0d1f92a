"""The tokenizer files of a checkpoint folder, brought to the form of `tokenizer.json`."""

import json

# Qwen2.5's tokens beyond its BPE vocabulary, in id order. Its vocab.json does not name them.
_QWEN2_VOCAB_SIZE = 151643
_QWEN2_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> "
    "<|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
_QWEN2_ORDINARY = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|>"
).split()

# How Qwen2 cuts text before merging: contractions, words with at most one leading mark,
# single digits, runs of marks, line breaks, blanks. Part of the format of its vocabulary.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_spec(folder):
  """The folder's tokenizer as (content of a `tokenizer.json`, path to name in errors).

  See `irg_jax.text.load_tokenizer`.

  Raises:
    ValueError: a file is missing or broken; names it.
  """
  path = folder / "tokenizer.json"
  if path.is_file():
    return _read_json(path), path
  path = folder / "vocab.json"
  if not (path.is_file() and (folder / "merges.txt").is_file()):
    raise ValueError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and "
                     "merges.txt")
  vocab = _read_json(path)
  added = _read_added_tokens(folder)
  if not added and len(vocab) == _QWEN2_VOCAB_SIZE:
    names = _QWEN2_SPECIAL + _QWEN2_ORDINARY
    added = [added_token(n, len(vocab) + i, n in _QWEN2_SPECIAL) for i, n in enumerate(names)]
  return qwen2_spec(vocab, _read_merges(folder / "merges.txt"), added), path


def qwen2_spec(vocab, merges, added):
  """The content of Qwen2's `tokenizer.json` around a vocabulary."""
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
  split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated",
           "invert": False}
  return {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": added,
      "normalizer": {"type": "NFC"},
      "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
      "post_processor": byte_level,
      "decoder": byte_level,
      "model": {"type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                "byte_fallback": False, "vocab": vocab, "merges": merges},
  }


def added_token(name, i, special):
  """An entry of `added_tokens` without the flags that trim or split around it."""
  return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": special}


def _read_added_tokens(folder):
  """Added tokens of the two optional files; both may name one, with the same id."""
  tokens = {}
  path = folder / "added_tokens.json"
  if path.is_file():
    for name, i in _read_json(path).items():
      tokens[name] = added_token(name, i, name not in _QWEN2_ORDINARY)
  path = folder / "tokenizer_config.json"
  if path.is_file():
    for token in _listed_tokens(path):
      name, i = token["content"], token["id"]
      if name in tokens and tokens[name]["id"] != i:
        raise ValueError(f"{path}: token {name!r} has id {i}, but {tokens[name]['id']} in "
                         "added_tokens.json")
      tokens[name] = token
  return list(tokens.values())


def _listed_tokens(path):
  """Entries of `added_tokens_decoder`, a table from id (as a string) to token."""
  table = _read_json(path).get("added_tokens_decoder", {})
  try:
    return [added_token(t["content"], int(i), False) | t for i, t in table.items()]
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{path}: added_tokens_decoder is not a table from id to token") from e


def _read_merges(path):
  """Pairs of `merges.txt`, best first; the optional `#version` line is not one."""
  merges = []
  for number, line in enumerate(_read_text(path).split("\n"), 1):
    line = line.rstrip("\r")
    if not line or (number == 1 and line.startswith("#version")):
      continue
    pair = line.split(" ")
    if len(pair) != 2:
      raise ValueError(f"{path}: line {number} is not a pair of tokens: {line!r}")
    merges.append(pair)
  return merges


def _read_json(path):
  try:
    value = json.loads(_read_text(path))
  except json.JSONDecodeError as e:
    raise ValueError(f"{path}: not valid JSON: {e}") from e
  if not isinstance(value, dict):
    raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def _read_text(path):
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"{path}: cannot be read as UTF-8 text: {e}") from e
