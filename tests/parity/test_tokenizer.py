"""Every recorded case of the real Qwen2.5 tokenizer."""

import gzip
import json
from irg_jax.tokenizer import load_tokenizer

import conftest
import numpy as np
import pytest


VOCAB_SIZE = 152064  # rows of the real model's embedding


def tokenizer_folders():
  root = conftest.reference_root()
  found = [p.parent for p in sorted(root.rglob("tokenizer.json.gz"))]
  reason = f"no tokenizer.json.gz under {root} (set IRG_REFERENCE)"
  return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


@pytest.fixture(scope="module", params=tokenizer_folders(), ids=lambda p: p and p.name)
def recorded(request, tmp_path_factory):
  """(tokenizer, its recorded cases, a folder with the unpacked tokenizer.json)."""
  folder = tmp_path_factory.mktemp("tokenizer")
  packed = (request.param / "tokenizer.json.gz").read_bytes()
  (folder / "tokenizer.json").write_bytes(gzip.decompress(packed))
  cases = json.loads((request.param / "cases.json").read_text(encoding="utf-8"))
  return load_tokenizer(folder, VOCAB_SIZE), cases, folder


def test_every_case_is_exact(recorded):
  tokenizer, cases, _ = recorded
  assert cases
  for case in cases:
    ids = tokenizer.encode(case["text"], control=True)
    assert ids == case["ids"], case
    assert tokenizer.decode(ids, control=True) == case["decoded"], case


def test_a_prompt_differs_from_a_case_only_by_special_tokens(recorded):
  tokenizer, cases, _ = recorded
  special = set(tokenizer.special_names.values())
  for case in cases:
    ids = tokenizer.encode(case["text"])
    assert not special & set(ids), case
    assert tokenizer.decode(ids) == case["decoded"], case
    if not special & set(case["ids"]):
      assert ids == case["ids"], case


def test_control_tokens_have_the_published_ids(recorded):
  tokenizer, _, _ = recorded
  assert tokenizer.special == type(tokenizer.special)()


def test_vocab_and_merges_give_the_same_ids(recorded, tmp_path):
  """With added tokens from tokenizer_config.json, and with none named at all."""
  tokenizer, cases, folder = recorded
  spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
  merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
  vocab, size = spec["model"]["vocab"], min(t["id"] for t in spec["added_tokens"])
  # An excerpt of a tokenizer lacks tokens: they get names that no text has.
  vocab |= {f"<{i}>": i for i in set(range(size)) - set(vocab.values())}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
  tokenizers = [load_tokenizer(tmp_path, VOCAB_SIZE)]
  added = {str(t.pop("id")): t for t in spec["added_tokens"]}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
  tokenizers.append(load_tokenizer(tmp_path, VOCAB_SIZE))
  for other in tokenizers:
    assert other.special_names == tokenizer.special_names and other.size == tokenizer.size
    for case in cases:
      assert other.encode(case["text"], control=True) == case["ids"], case
      assert other.decode(case["ids"], control=True) == case["decoded"], case
    mixed = "<tool_call>a<|im_end|><|fim_prefix|>"
    assert other.encode(mixed) == tokenizer.encode(mixed)


def test_thoughts_of_random_weights_decode_stably(recorded):
  """A thought is decoded and tokenised anew before the model reads it again."""
  tokenizer, _, _ = recorded
  rng = np.random.default_rng(0)
  for _ in range(100):
    once = tokenizer.decode(rng.integers(0, VOCAB_SIZE, 60))
    assert tokenizer.decode(tokenizer.encode(once)) == once
