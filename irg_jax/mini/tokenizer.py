"""A small byte-level BPE tokenizer in Qwen2's file form, learned from the mini world's texts."""

import json
import pathlib
from irg_jax.tokenizer import CONTROL_NAMES, added_token, qwen2_spec

import tokenizers
from tokenizers import models, pre_tokenizers, trainers



def write_tokenizer(folder, texts, vocab_size: int) -> None:
  """Learns merges from `texts` and writes `folder`/tokenizer.json.

  Args:
    texts: an iterable of texts.
    vocab_size: tokens at most, the 256 bytes and the four control tokens among them.
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
  added = [added_token(name, i, True) for i, name in names]
  content = qwen2_spec(learned["vocab"], learned["merges"], added)
  path = pathlib.Path(folder) / "tokenizer.json"
  path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
