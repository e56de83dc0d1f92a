"""Tokenizer: Qwen2's byte-level BPE, read from a checkpoint folder.

Four control tokens frame text and images (docs/spec.md, section 2). Only the program inserts
them: a prompt that spells out the name of one is encoded as plain characters.
"""

import dataclasses
import json
import pathlib
import re
import unicodedata

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from irg_jax import config, storage

# Field of SpecialTokens -> name of the token.
CONTROL_NAMES = {
    "text_start": "<|im_start|>",
    "text_end": "<|im_end|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte

# Qwen2.5's tokenizer without its vocabulary: `tokenizer.json`, and the tokens beyond the BPE
# vocabulary in order of ids, which vocab.json lacks.
_QWEN2 = json.loads(pathlib.Path(__file__).with_name("files").joinpath(
    "qwen2_tokenizer.json").read_text(encoding="utf-8"))

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Steps of normalizers, splitters and decoders: none makes a text grow without bounds.
_STEPS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Sequence", "Split", "ByteLevel", "Digits"}
# An alternative of a pattern that takes no more than the square of the text's length.
_LINEAR = re.compile(r"(?!.*\\[gk])(?:(?:\(\?[i:=!]*)?[^()*+?{}]*\)?|"
                     r"[^()*+?{}]*\??[^()*+?{}]*(?:[*+]|\{\d,\d\})?[^()*+?{}]*)", re.DOTALL)
_QWEN2_PARTS = set(re.sub(r"\\[pP]\{\w+\}", "P", (
    _QWEN2["tokenizer"]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])).split("|"))
_HELD = 4  # characters of an unfinished text that later ones may still change
LONGEST_TEXT = 2**18  # characters; a row of 16384 tokens is shorter


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Byte-level BPE with control tokens; made by `load_tokenizer`."""

  special: config.SpecialTokens
  special_names: dict[str, int]  # ids of all special tokens, the control tokens included
  size: int  # largest id of a token, plus one
  _backend: tokenizers.Tokenizer = dataclasses.field(repr=False)

  def encode(self, text: str, *, control: bool = False) -> list[int]:
    """Encodes text to ids, without framing; ValueError for a lone surrogate, or a book.

    `control` turns the names of special tokens into these tokens: not for text that a user or a
    model wrote.
    """
    if not control:
      return self._encode_plain(text)
    longest_first = sorted(self.special_names, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [i for piece in pieces for i in (
        [self.special_names[piece]] if piece in self.special_names else self._encode_plain(piece))]

  def decode(self, ids, *, control: bool = False) -> str:
    """Decodes ids, integers [length], to text; bytes that are not UTF-8 become U+FFFD.

    Ids without a token are dropped, since an untrained model may emit spare rows of the
    embedding. Special tokens are dropped too, and the text is normalized as by the tokenizer, so
    that decode(encode(decode(ids))) == decode(ids). `control` keeps the names of special tokens,
    and does not normalize.
    """
    known = [i for i in np.asarray(ids).tolist() if 0 <= i < self.size]
    text = self._backend.decode(known, skip_special_tokens=not control)
    normalizer = self._backend.normalizer
    return text if control or normalizer is None else normalizer.normalize_str(text)

  def _encode_plain(self, text):
    if len(text) > LONGEST_TEXT:
      raise ValueError(f"the text has {len(text)} characters, more than the {LONGEST_TEXT} that "
                       "are read; shorten it")
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as e:
      raise ValueError(f"the text is not valid Unicode at character {e.start} (lone surrogate "
                       f"{text[e.start]!r}); check the encoding of its source") from e
    return self._backend.encode(text, add_special_tokens=False).ids


class Speller:
  """Cuts a growing text into pieces that together are the text, to show it as it is decoded."""

  def __init__(self):
    self._sent = ""

  def piece(self, text: str, whole: bool = False) -> str:
    """The new part of the text so far, or with `whole` of all of it.

    The last characters are held back while they may change: bytes may be missing, and normalization
    joins marks with the letter before them.
    """
    if not whole:
      end = max(0, len(text.rstrip("\ufffd")) - _HELD)
      while end and unicodedata.combining(text[end]):
        end -= 1
      text = text[:end]
    if len(text) <= len(self._sent) or not text.startswith(self._sent):
      return ""
    new, self._sent = text[len(self._sent):], text
    return new


def load_tokenizer(folder, vocab_size: int) -> Tokenizer:
  """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, from a checkpoint folder.

  With the second pair, added tokens come from `tokenizer_config.json` and `added_tokens.json`; if
  neither names any, a vocabulary of Qwen2.5's size gets the added tokens of Qwen2.5.

  Raises:
    ValueError: files missing or broken, a control token missing, an id that is not below
      `vocab_size`, the rows of the model's embedding, or a vocabulary that lacks a byte.
  """
  spec, path = _read_spec(storage.path(folder))
  model = spec.get("model")
  if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
    raise ValueError(f"{path}: not a byte-level BPE tokenizer (no model.vocab table)")
  _check_steps([spec.get(name) or {} for name in ("normalizer", "pre_tokenizer", "decoder")], path)
  added = _with_control_tokens(spec.get("added_tokens") or [], model["vocab"], path)
  # In the vocabulary too, added tokens keep their ids even if there are gaps.
  vocab = model["vocab"] | {t["content"]: t["id"] for t in added}
  _check_ids(vocab, model["vocab"], vocab_size, path)
  # Truncation and padding of the file are switched off, prompts must stay complete, and so are
  # dropout and what would be put around a text.
  spec = spec | {"model": model | {"vocab": vocab, "dropout": None}, "added_tokens": added,
                 "truncation": None, "padding": None, "post_processor": None}
  try:
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as e:  # the library has no error of its own
    raise ValueError(f"{path}: not a tokenizer that can be loaded: {e}") from e
  if missing := [c for c in _BYTES if backend.token_to_id(c) is None]:
    raise ValueError(f"{path}: the vocabulary lacks {len(missing)} of the 256 byte tokens "
                     f"(first {missing[0]!r}), so some text could not be encoded")
  backend.encode_special_tokens = True  # encode their names in text as plain text
  ids = {token["content"]: token["id"] for token in added if token["special"]}
  special = config.SpecialTokens(**{field: ids[name] for field, name in CONTROL_NAMES.items()})
  return Tokenizer(special, ids, max(backend.get_vocab().values()) + 1, backend)


def write_byte_tokenizer(folder) -> None:
  """Writes a `tokenizer.json` of one token a byte and the four control tokens (260 ids).

  For checkpoints of random weights: it encodes any text and needs no download.
  """
  vocab = {c: i for i, c in enumerate(_BYTES)}
  added = [added_token(name, i, True) for i, name in enumerate(CONTROL_NAMES.values(), len(vocab))]
  text = json.dumps(qwen2_spec(vocab, [], added), ensure_ascii=False, indent=1)
  (storage.path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")


def train_tokenizer(folder, texts, vocab_size: int) -> None:
  """Learns a byte-level BPE from texts and writes `folder`/tokenizer.json in Qwen2's form.

  `vocab_size` is the most tokens, with the 256 bytes and the four control tokens.
  """
  spec = qwen2_spec({}, [], [])
  learner = tokenizers.Tokenizer(models.BPE())
  split = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
  learner.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  learner.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size - len(CONTROL_NAMES), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  learned = json.loads(learner.to_str())["model"]
  names = enumerate(CONTROL_NAMES.values(), len(learned["vocab"]))
  spec = qwen2_spec(learned["vocab"], learned["merges"],
                    [added_token(name, i, True) for i, name in names])
  storage.write_json(storage.path(folder) / "tokenizer.json", spec, ensure_ascii=False, indent=1)


def _check_steps(steps, path):
  """Checks that no step of a `tokenizer.json` could make a text grow, or never end."""
  groups = [steps]
  while groups:
    group = groups.pop()
    groups += [x for x in (group.values() if isinstance(group, dict) else group)
               if isinstance(x, dict | list)]
    kind, pattern = (group.get(k) for k in ("type", "Regex")) if isinstance(group, dict) else (0, 0)
    if isinstance(kind, str) and kind not in _STEPS:
      raise ValueError(f"{path}: has a step {kind[:80]!r}; known: {', '.join(sorted(_STEPS))}")
    flat = re.sub(r"\\[pP]\{\w+\}", "P", pattern if isinstance(pattern, str) else "")
    if len(flat) > 4096 or any(not (part in _QWEN2_PARTS or _LINEAR.fullmatch(part))
                               for part in flat.split("|")):
      raise ValueError(f"{path}: the pattern {pattern[:80]!r} could take forever on some text; "
                       "write it as Qwen2.5's, or with one repeat in an alternative, of no group")


def _with_control_tokens(added, vocab, path):
  """The added tokens, with the four control tokens marked special."""
  try:
    by_name = {t["content"]: added_token(t["content"], t["id"], False) | t for t in added}
    for name, token in by_name.items():
      if [type(token[x]) for x in ("content", "id", *_FLAGS)] != [str, int] + [bool] * len(_FLAGS):
        raise TypeError(name)
  except (TypeError, KeyError) as e:
    raise ValueError(f"{path}: an entry of added_tokens lacks its content or id, or one of its "
                     "fields has another type") from e
  for name in CONTROL_NAMES.values():
    if name not in by_name and name not in vocab:
      raise ValueError(f"{path}: no token {name!r}; the checkpoint's tokenizer must have "
                       f"{', '.join(CONTROL_NAMES.values())}")
    token = by_name.get(name) or added_token(name, vocab[name], True)
    by_name[name] = token | {"special": True}
  return sorted(by_name.values(), key=lambda t: t["id"])


def _check_ids(vocab, base, vocab_size, path):
  """Checks that every id is a whole number below `vocab_size` and of one token only."""
  names = {}
  for name, i in vocab.items():
    if type(i) is not int or i < 0:
      raise ValueError(f"{path}: token {name!r} has id {repr(i)[:80]}, not a whole number")
    if i >= vocab_size:
      raise ValueError(f"{path}: token {name!r} has id {i}, but the embedding has only "
                       f"{vocab_size} rows; tokenizer and weights do not belong together")
    if i in names or base.get(name, i) != i:
      other = f"token {names[i]!r}" if i in names else f"its id {base[name]} in model.vocab"
      raise ValueError(f"{path}: token {name!r} has id {i}, in conflict with {other}")
    names[i] = name


def _read_spec(folder):
  """The folder's tokenizer as (content of a `tokenizer.json`, path for messages)."""
  path = folder / "tokenizer.json"
  if storage.is_there(path):
    return _read(path), path
  path = folder / "vocab.json"
  if not (path.is_file() and (folder / "merges.txt").is_file()):
    raise ValueError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and "
                     "merges.txt")
  vocab, added = _read(path), _read_added_tokens(folder)
  if not added and len(vocab) == _QWEN2["vocab_size"]:
    names = enumerate(_QWEN2["special"] + _QWEN2["ordinary"], len(vocab))
    added = [added_token(name, i, name in _QWEN2["special"]) for i, name in names]
  return qwen2_spec(vocab, _read_merges(folder / "merges.txt"), added), path


def qwen2_spec(vocab, merges, added):
  """Content of a `tokenizer.json` of Qwen2's kind with another vocabulary."""
  spec = _QWEN2["tokenizer"]
  return spec | {"added_tokens": added,
                 "model": spec["model"] | {"vocab": vocab, "merges": merges}}


def added_token(name, i, special):
  """Entry of `added_tokens`, all flags but `special` off."""
  return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": special}


def _read_added_tokens(folder):
  """Added tokens of the two optional files; both may name a token, with the same id."""
  plain, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
  ids = _read(plain) if storage.is_there(plain) else {}
  table = _read(config).get("added_tokens_decoder", {}) if storage.is_there(config) else {}
  tokens = {name: added_token(name, i, name not in _QWEN2["ordinary"]) for name, i in ids.items()}
  try:
    listed = {t["content"]: added_token(t["content"], int(i), False) | t for i, t in table.items()}
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{config}: added_tokens_decoder is not a table from id to token") from e
  for name, token in listed.items():
    if ids.get(name, token["id"]) != token["id"]:
      raise ValueError(f"{config}: token {name!r} has id {token['id']}, but {ids[name]} in "
                       "added_tokens.json")
  return list((tokens | listed).values())


def _read_merges(path):
  """Pairs of `merges.txt`, best first; the optional `#version` line is not one."""
  merges = []
  text = _read(path, lambda p: storage.read_file(p).decode())
  for number, line in enumerate(text.split("\n"), 1):
    line = line.rstrip("\r")
    if not line or (number == 1 and line.startswith("#version")):
      continue
    merges.append(line.split(" "))
    if len(merges[-1]) != 2:
      raise ValueError(f"{path}: line {number} is not a pair of tokens: {line!r}")
  return merges


def _read(path, read=storage.read_json):
  """Content of a file as `read` returns it."""
  try:
    return read(path)
  except (OSError, ValueError) as e:
    raise ValueError(f"{path}: cannot be read, or is damaged: {e}") from e
