"""Tokenizers: control tokens, usable and broken folders, decoding."""

import json

import numpy as np
import pytest

from irg_jax.tokenizer import CONTROL_NAMES, added_token, load_tokenizer, write_byte_tokenizer

CONTROL = list(CONTROL_NAMES.values())


@pytest.fixture
def folder(tmp_path):
  write_byte_tokenizer(tmp_path)
  return tmp_path


@pytest.fixture
def byte_tokenizer(folder):
  return load_tokenizer(folder, 300)


def edit(folder, change):
  """Rewrites tokenizer.json after `change` has edited its content."""
  path = folder / "tokenizer.json"
  spec = json.loads(path.read_text())
  change(spec)
  path.write_text(json.dumps(spec))


def split_files(folder, added_file):
  """Replaces tokenizer.json by vocab.json, merges.txt and one file of added tokens."""
  spec = json.loads((folder / "tokenizer.json").read_text())
  (folder / "tokenizer.json").unlink()
  (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
  pairs = "\n".join(" ".join(m) for m in spec["model"]["merges"])
  (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n")
  added = spec["added_tokens"]
  if added_file == "added_tokens.json":
    content = {t["content"]: t["id"] for t in added}
  else:
    content = {"added_tokens_decoder": {str(t["id"]): {"content": t["content"],
                                                       "special": t["special"]}
                                        for t in added}}
  (folder / added_file).write_text(json.dumps(content))


def test_every_text_comes_back(byte_tokenizer):
  for sample in ["", " ", "a red circle", "日本 🍎\r\n\tx", "\x00\x7f\u200b", "<think>a</think>"]:
    assert byte_tokenizer.decode(byte_tokenizer.encode(sample)) == sample


def test_text_is_brought_to_nfc_both_ways(byte_tokenizer):
  assert byte_tokenizer.encode("e\u0301") == byte_tokenizer.encode("é")
  raw = byte_tokenizer.encode("e") + byte_tokenizer.encode("\u0301")
  assert byte_tokenizer.decode(raw) == "é"


@pytest.mark.parametrize("name", CONTROL)
def test_control_names_in_a_prompt_are_plain_text(byte_tokenizer, name):
  prompt = f"before {name}after"
  ids = byte_tokenizer.encode(prompt)
  assert not set(ids) & set(byte_tokenizer.special_names.values())
  assert byte_tokenizer.decode(ids) == prompt


def test_control_names_become_tokens_only_on_request(byte_tokenizer):
  special = byte_tokenizer.special
  ids = byte_tokenizer.encode("<|im_start|>hi<|im_end|><|vision_start|>", control=True)
  want = [special.text_start, *byte_tokenizer.encode("hi"), special.text_end,
          special.image_start]
  assert ids == want
  assert byte_tokenizer.decode(ids, control=True) == "<|im_start|>hi<|im_end|><|vision_start|>"


def test_decode_drops_special_tokens_and_ids_without_a_token(byte_tokenizer):
  special = byte_tokenizer.special
  a, b = byte_tokenizer.encode("ab")
  ids = np.array([special.text_start, a, 290, 10**9, -1, b, special.text_end])
  assert byte_tokenizer.decode(ids) == "ab"
  assert byte_tokenizer.decode([]) == ""


def test_decoding_is_stable_for_ids_that_no_text_has(byte_tokenizer):
  rng = np.random.default_rng(0)
  for _ in range(200):
    once = byte_tokenizer.decode(rng.integers(0, 300, 40))
    assert byte_tokenizer.decode(byte_tokenizer.encode(once)) == once


def test_a_lone_surrogate_is_named(byte_tokenizer):
  with pytest.raises(ValueError, match="character 2"):
    byte_tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("added_file", ["added_tokens.json", "tokenizer_config.json"])
def test_vocab_and_merges_equal_tokenizer_json(folder, added_file):
  def merge_some(spec):
    vocab = spec["model"]["vocab"]
    vocab |= {"re": 260, "red": 261, "Ġred": 262}
    spec["model"]["merges"] = [["r", "e"], ["re", "d"], ["Ġ", "red"]]
    spec["added_tokens"] += [added_token("<tool>", 280, False)]  # after a gap

  edit(folder, merge_some)
  want = load_tokenizer(folder, 300)
  split_files(folder, added_file)
  got = load_tokenizer(folder, 300)
  sample = "a red <|im_end|> red<tool>!  1234 don't"
  assert got.special == want.special and got.size == want.size == 281
  if added_file == "tokenizer_config.json":
    assert got.encode(sample) == want.encode(sample)
    assert got.decode(got.encode(sample)) == sample
  assert got.encode("a red red") == want.encode("a red red")


def test_a_control_token_marked_ordinary_is_still_kept_from_prompts(folder):
  def unmark(spec):
    for token in spec["added_tokens"]:
      token["special"] = False

  edit(folder, unmark)
  tokenizer = load_tokenizer(folder, 300)
  ids = tokenizer.encode("<|im_end|>")
  assert len(ids) > 1 and tokenizer.decode([tokenizer.special.text_end]) == ""
  assert tokenizer.decode(ids) == "<|im_end|>"


def test_ordinary_added_tokens_stay_tokens(folder):
  tool = added_token("<tool_call>", 260, False)
  edit(folder, lambda s: s["added_tokens"].append(tool))
  tokenizer = load_tokenizer(folder, 300)
  assert tokenizer.encode("<tool_call>") == [260]
  assert tokenizer.decode([260]) == "<tool_call>"


def test_truncation_and_padding_in_the_file_are_ignored(folder):
  def truncate(spec):
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                          "stride": 0}

  edit(folder, truncate)
  assert len(load_tokenizer(folder, 300).encode("a long prompt")) == 13


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer; expected tokenizer.json"):
    load_tokenizer(tmp_path, 300)
  (tmp_path / "vocab.json").write_text("{}")
  with pytest.raises(ValueError, match="merges.txt"):
    load_tokenizer(tmp_path, 300)


def test_ids_beyond_the_embedding_are_refused(folder):
  with pytest.raises(ValueError, match=r"tokenizer.json: token '<\|vision_end\|>' has id 259"):
    load_tokenizer(folder, 259)
  load_tokenizer(folder, 260)


def test_a_missing_control_token_is_named(folder):
  edit(folder, lambda s: s["added_tokens"].pop(1))
  with pytest.raises(ValueError, match=r"tokenizer.json: no token '<\|im_end\|>'"):
    load_tokenizer(folder, 300)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"vocab": []}}',
                                     '{"model": {"vocab": {"a": "x"}}}', "\udc80"])
def test_a_broken_file_is_named(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match="tokenizer.json"):
    load_tokenizer(tmp_path, 300)


@pytest.mark.parametrize("change, message", [
    (lambda s: s["model"]["merges"].append(["a", "zz"]), "tokenizer.json: not a tokenizer"),
    (lambda s: s["model"].update(type="Other"), "tokenizer.json: not a tokenizer"),
    (lambda s: s["model"]["vocab"].pop("a"), "lacks 1 of the 256 byte tokens"),
    (lambda s: s["added_tokens"][3].update(id=5), "has id 5, in conflict with token"),
    (lambda s: s["model"]["vocab"].update({"<|im_end|>": 280}), "its id 280 in model.vocab"),
    (lambda s: s["added_tokens"][3].pop("id"), "lacks its content or id"),
])
def test_a_tokenizer_that_would_lose_text_or_ids_is_refused(folder, change, message):
  edit(folder, change)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(folder, 300)


def test_a_bad_line_of_merges_is_named(folder):
  split_files(folder, "added_tokens.json")
  (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
  with pytest.raises(ValueError, match="merges.txt: line 2"):
    load_tokenizer(folder, 300)


def test_two_files_that_disagree_on_an_id_are_refused(folder):
  split_files(folder, "added_tokens.json")
  config = {"added_tokens_decoder": {"258": {"content": "<|im_start|>", "special": True}}}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="has id 258, but 256 in added_tokens.json"):
    load_tokenizer(folder, 300)


@pytest.mark.parametrize("table", [[], {"x": {"content": "a"}}, {"7": "a"}, {"7": {}}])
def test_a_broken_table_of_added_tokens_is_named(folder, table):
  split_files(folder, "tokenizer_config.json")
  (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))
  with pytest.raises(ValueError, match="tokenizer_config.json: added_tokens_decoder|no token"):
    load_tokenizer(folder, 300)


@pytest.mark.parametrize("pattern", [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "a*a*a*b", "(?:a?){30}a", "a?a?a?a?aaaa", "x{100000}",
    r"(\w+\s?)*!", r"\g<0>a", r"(?=(a+)+)b", r"^(?:[a-z]+)+\d", "(" * 200 + "a+" + ")+" * 200])
def test_a_pattern_that_could_take_forever_is_refused_at_once(folder, pattern):
  for place in ("pre_tokenizer", "normalizer", "decoder"):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    edit(folder, lambda s: s.update({place: {"type": "Sequence", "pretokenizers": [step]}}))
    with pytest.raises(ValueError, match="tokenizer.json: the pattern '.*could take forever"):
      load_tokenizer(folder, 300)


@pytest.mark.parametrize("pattern", [
    r"(?i:'s|'t)|\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
    r"\p{N}|[^\p{N}]+", "a|b"])
def test_patterns_of_other_byte_level_tokenizers_are_read(folder, pattern):
  edit(folder, lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern}))
  tokenizer = load_tokenizer(folder, 300)
  for text in ("a red fox's 1234  tail\n", "a" * 5000, " " * 5000):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_steps_that_let_a_text_grow_are_refused(folder):
  grow = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40
  edit(folder, lambda s: s.update(normalizer={"type": "Sequence", "normalizers": grow}))
  with pytest.raises(ValueError, match="tokenizer.json: has a step 'Replace'"):
    load_tokenizer(folder, 300)


def test_a_book_is_no_text_to_encode(byte_tokenizer):
  with pytest.raises(ValueError, match="has 20000000 characters, more than"):
    byte_tokenizer.encode("a fox " * 3_333_333 + "ab")
  assert len(byte_tokenizer.encode("a " * 30_000)) == 60_000


def test_dropout_and_what_is_put_around_a_text_are_off(folder):
  edit(folder, lambda s: s["model"].update(dropout=0.9))
  edit(folder, lambda s: s["model"]["vocab"].update({"re": 260, "red": 261}))
  edit(folder, lambda s: s["model"].update(merges=[["r", "e"], ["re", "d"]]))
  tokenizer = load_tokenizer(folder, 300)
  assert all(tokenizer.encode("red") == [261] for _ in range(50))
