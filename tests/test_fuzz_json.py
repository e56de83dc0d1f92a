"""Every reader of JSON under damage and hostile values: it reads, or says what is wrong.

`test_a_reader_...` gives each reader 200 documents, made of a good one by a few changes. Only
ValueError and OSError may come out, in one line that names the file, and soon. Where a document is
read, an oracle checks what came of it.
"""

import copy
import json
import math
import pathlib
import random
import shutil
import time

import jax
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_eval_prompts import genai_records, tiif_records, wise_records
from test_weights import CONFIG
from irg_jax import evaluate, runs, storage, weights
from irg_jax.config import ModelConfig
from irg_jax.evaluate import base, genai_bench, geneval, oneig, questions
from irg_jax.generate.prompts import PromptForm
from irg_jax.generate.settings import Defaults, read_defaults, write_defaults
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer
from irg_jax.weights import init, orbax, published
from irg_jax.weights import safetensors as tensor_files

EXAMPLES = 200
SECONDS = 5  # of one reading, on a busy machine


def nested(depth, value=0):
  for _ in range(depth):
    value = [value]
  return value


HOSTILE = (None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 0.5, -1e-6,
           1e-320, 1e39, 1e300, math.inf, -math.inf, math.nan, "", " ", "0", "1e999", "NaN", "a\x00b",
           "\ud800", "../x", "./x", "/", "gs://x/y", "x" * 5000, [], {}, [[]], [0], [None], {"": 0},
           {"a": {"a": {}}}, [1.0, 0.0], [1e999, 1], ["a", 1], "float8_e4m3fn", "bfloat16",
           nested(70), nested(900))
VALUES = st.sampled_from(range(len(HOSTILE))).map(lambda i: copy.deepcopy(HOSTILE[i]))
BYTES = (b"", b"\0", b"\xff", b"{", b"]", b'"', b"\\ud800", b"1e999", b"[" * 50, b"\xef\xbb\xbf",
         b"-", b"9" * 5000, b"Infinity", b",", b"\r")


def places(value, found=None):
  """(group, key) of every value in a document, and of a new one in every group."""
  found = [] if found is None else found
  if isinstance(value, dict | list):
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    found += [(value, key) for key in keys]
    for key in keys:
      places(value[key], found)
  return found


@st.composite
def damaged(draw, good):
  """A document as bytes: `good` with some values exchanged, left out or added, or broken bytes."""
  value = copy.deepcopy(good)
  for _ in range(draw(st.integers(1, 3))):
    spots = places(value)
    how = draw(st.sampled_from(("value", "value", "value", "delete", "new", "whole")))
    if how == "whole" and draw(st.integers(0, 9)) == 0 or not spots:
      value = draw(VALUES)
      continue
    group, key = spots[draw(st.integers(0, len(spots) - 1))]
    if how == "delete":
      del group[key]
    elif how == "new" and isinstance(group, dict):
      group[draw(st.sampled_from(("new", "", "a.b", "x=y", "\ud800", "faults")))] = draw(VALUES)
    else:
      group[key] = draw(VALUES)
  data = json.dumps(value).replace("Infinity", draw(st.sampled_from(("Infinity", "1e999")))).encode()
  if draw(st.integers(0, 4)) == 0:
    at = draw(st.integers(0, len(data)))
    cut = draw(st.sampled_from((0, 1, len(data))))
    data = data[:at] + draw(st.sampled_from(BYTES)) + data[at + cut:]
  return data


def check_reader(data, good, path, read, oracle=lambda result, data: None, wrap=lambda b: b):
  """Runs `read` on a damaged document at `path`; True if it was read."""
  content = data.draw(damaged(good))
  path.write_bytes(wrap(content))
  start = time.monotonic()
  try:
    result = read()
  except (ValueError, OSError) as e:
    assert type(e) is not UnicodeDecodeError and not isinstance(e, json.JSONDecodeError), e
    assert path.name in str(e) or path.parent.name in str(e), f"does not name the file: {e}"
    assert "\n" not in str(e)[:2000], f"not a line: {e}"
    return False
  finally:
    assert time.monotonic() - start < SECONDS
  oracle(result, content)
  return True


def fuzz(good, path, read, oracle=lambda result, data: None, wrap=lambda b: b):
  outcomes = []

  @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck))
  @given(st.data())
  def run(data):
    outcomes.append(check_reader(data, good, path, read, oracle, wrap))

  run()
  assert len(outcomes) >= EXAMPLES * 0.9 and True in outcomes and False in outcomes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A checkpoint in each layout."""
  folder = tmp_path_factory.mktemp("made")
  params = init.random_params(CONFIG, jax.random.key(0))
  published.save(folder / "one", params, CONFIG)
  published.save(folder / "shards", params, CONFIG, max_shard_bytes=60_000)
  return folder


@pytest.fixture
def folder(made, tmp_path):
  return shutil.copytree(made / "one", tmp_path / "in")


def check_config(config, _):
  """The configuration is a model of finite and possible sizes, whatever the file said."""
  llm = config.llm
  assert 1 <= llm.num_layers <= 1000 and llm.hidden_size % llm.num_heads == 0
  assert llm.num_heads % llm.num_kv_heads == 0 and 1 <= np.float32(llm.rope_theta) < np.inf
  for eps in (llm.norm_eps, config.vit.norm_eps):
    assert type(eps) is float and 0 < eps <= 1
  assert np.isfinite(np.float32([config.vae.scale_factor, config.vae.shift_factor])).all()
  assert config.vae.scale_factor > 0 and config.vae.downsample <= 1024
  assert all(type(x) is int for x in (llm.vocab_size, llm.mlp_size, config.vit.patch_size))


@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json", "ae_config.json"])
def test_a_reader_of_a_published_configuration(folder, name):
  good = json.loads((folder / name).read_text())

  def oracle(config, data):
    check_config(config, data)
    if name == "llm_config.json":
      given = json.loads(data.decode("utf-8-sig"))
      assert config.llm.num_layers == given["num_hidden_layers"]
      assert config.llm.rope_theta == given.get("rope_theta", 1e6)

  fuzz(good, folder / name, lambda: weights.read_config(folder), oracle)


def test_a_reader_of_our_own_configuration(tmp_path):
  (tmp_path / "in").mkdir()
  storage.write_json(tmp_path / orbax.CONFIG, init.names.dataclasses.asdict(ModelConfig()))
  fuzz(json.loads((tmp_path / orbax.CONFIG).read_text()), tmp_path / orbax.CONFIG,
       lambda: weights.read_config(tmp_path), check_config)


def test_a_reader_of_a_run_record(tmp_path):
  step = tmp_path / "stage1" / "checkpoints" / "5"
  step.mkdir(parents=True)
  (step / "_CHECKPOINT_METADATA").write_text("{}")
  good = {"settings": {"model": init.names.dataclasses.asdict(ModelConfig()), "seed": 1},
          "records": {"a": 1}, "base": None}
  path = tmp_path / "run.json"

  def read():
    runs.read(path, ["settings"])
    return weights.read_config(step)

  fuzz(good, path, read, check_config)


def test_a_reader_of_generation_settings(tmp_path):
  form = PromptForm(rules=("prompt = <a> fox | <a> <prompt> -> <2> <1> # 2 ! n", "a = a | big |"),
                    most=3, note="n", sizes=("64x64",), editing=False)
  write_defaults(tmp_path, Defaults(prompts=form, dtype="bfloat16"))
  path = tmp_path / "generate.json"

  def oracle(defaults, _):
    form = defaults.prompts
    assert type(defaults.system_prompt) is str and type(form.note) is str
    assert all(type(rule) is str for rule in form.rules + form.sizes)
    assert defaults.dtype in (None, "bfloat16", "float32", "float16")
    s = defaults.settings
    assert 1 <= s.rounds <= 1000 and 2 <= s.steps <= 10_000 and 0 < s.top_p <= 1
    numbers = (s.timestep_shift, s.temperature, s.first.text_scale, *s.later.interval)
    assert np.isfinite(np.float32(numbers)).all()
    for prompt in ("A fox!", "big a big fox " * 9):
      assert type(defaults.read(prompt, s, edits=True).text) is str

  fuzz(json.loads(path.read_text()), path, lambda: read_defaults(tmp_path), oracle)


def test_a_reader_of_an_index(made, tmp_path):
  folder = shutil.copytree(made / "shards", tmp_path / "in")
  path = folder / "ema.safetensors.index.json"
  want = tensor_files.find_tensors(folder, "ema").keys()
  fuzz(json.loads(path.read_text()), path, lambda: tensor_files.find_tensors(folder, "ema"),
       lambda tensors, _: tensors.keys() == want or pytest.fail("read other tensors"))


def test_a_reader_of_a_header_of_tensors(made, tmp_path):
  (tmp_path / "in").mkdir()
  data = (made / "one" / "ae.safetensors").read_bytes()
  length = int.from_bytes(data[:8], "little")
  path, body = tmp_path / "in" / "ae.safetensors", data[8 + length:]

  def oracle(tensors, _):  # the library itself finds the same
    with safetensors.safe_open(path, framework="numpy") as file:
      assert set(file.keys()) >= {t.key for t in tensors.values()}
      for tensor in list(tensors.values())[::8]:
        assert np.array_equal(file.get_tensor(tensor.key), tensor.map(), equal_nan=True)

  fuzz(json.loads(data[8:8 + length]), path, lambda: tensor_files.find_tensors(path.parent, "ae"),
       oracle, wrap=lambda text: len(text).to_bytes(8, "little") + text + body)


def test_lengths_of_headers_that_lie_are_refused_at_once(tmp_path):
  path, start = tmp_path / "ae.safetensors", time.monotonic()
  for length in (0, 1, 7, 2**20, 2**24 + 1, 2**32, 2**63, 2**64 - 1):
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 100)
    with pytest.raises(weights.CheckpointError, match="ae.safetensors: not a complete"):
      tensor_files.read_header(path)
  assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json",
                                  "tokenizer_config.json"])
def test_a_reader_of_a_tokenizer(tmp_path, name):
  write_byte_tokenizer(tmp_path)
  path, spec = tmp_path / name, json.loads((tmp_path / "tokenizer.json").read_text())
  spec["model"]["vocab"] |= {"re": 260, "red": 261}
  spec["model"]["merges"] = [["r", "e"], ["re", "d"]]
  added = {t["content"]: t["id"] for t in spec["added_tokens"]} | {
      f"<tool{i}>": i for i in range(265, 275)}
  table = {"added_tokens_decoder": {str(i): {"content": c, "special": True}
                                    for c, i in added.items()}}
  files = {"vocab.json": spec["model"]["vocab"], "added_tokens.json": added,
           "tokenizer_config.json": table}
  good = files.get(name, spec)
  if name != "tokenizer.json":
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("r e\nre d\n")
    for other in ("vocab.json", "added_tokens.json"):
      storage.write_json(tmp_path / other, files[other])

  def oracle(tokenizer, _):
    text = "a red fox <|im_end|>"
    assert all(0 <= i < 300 for i in tokenizer.encode(text))
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_names.values())
    tokenizer.decode(range(300))

  fuzz(good, path, lambda: load_tokenizer(tmp_path, 300), oracle)


def test_a_reader_of_the_steps_of_a_tokenizer(tmp_path):
  """The parts around the vocabulary alone, so that changes hit them."""
  write_byte_tokenizer(tmp_path)
  path = tmp_path / "tokenizer.json"
  spec = json.loads(path.read_text())
  good = {key: spec[key] for key in spec if key != "model"}

  def wrap(data):
    try:
      part = json.loads(data)
    except ValueError:
      return data
    model = spec["model"] | {"vocab": spec["model"]["vocab"]}
    return json.dumps(part | {"model": model} if isinstance(part, dict) else part).encode()

  def oracle(tokenizer, _):
    assert all(0 <= i < 300 for i in tokenizer.encode("a red fox <|im_end|> " + "a" * 300))

  fuzz(good, path, lambda: load_tokenizer(tmp_path, 300), oracle, wrap)


def test_a_reader_of_a_trace(tmp_path):
  item = base.Item("wise", "1", "p", 1, {})
  path = tmp_path / base.trace_path(item, 0)
  path.parent.mkdir(parents=True)
  good = {"benchmark": "wise", "id": "1", "picture": 0, "prompt": "p", "seed": 1, "rounds": [
      {"think": "t", "think_tokens": 1, "hit_limit": False, "tokens_cut": 0, "picture": "a.png",
       "seconds": {"draw": 1.0}}, {"think": None, "think_tokens": 0, "picture": None,
                                   "hit_limit": False, "tokens_cut": 0, "seconds": {}}]}

  def oracle(trace, _):
    for entry in trace["rounds"]:
      assert isinstance(entry["picture"], str | None) and isinstance(entry["think"], str | None)

  fuzz(good, path, lambda: base.read_trace(tmp_path, item, 0), oracle)


def prompts_of(name):
  if name == "wise":
    return wise_records(range(1, 4)), "cultural_common_sense.json", False
  if name == "tiif":
    return tiif_records(3), "style_prompts.jsonl", True
  if name == "geneval":
    lines = (geneval.FILES / "evaluation_metadata.jsonl").read_text().splitlines()[::180]
    return [json.loads(line) for line in lines], "evaluation_metadata.jsonl", True
  return genai_records(3), "genai_image.json", False


@pytest.mark.parametrize("name", ["wise", "tiif", "geneval", "genai_bench"])
def test_a_reader_of_prompts(tmp_path, name):
  good, file, lines = prompts_of(name)

  def wrap(data):
    try:
      value = json.loads(data) if lines else None
    except ValueError:
      return data
    return data if value is None or not isinstance(value, list) else b"\n".join(
        json.dumps(x).encode() for x in value)

  def oracle(items, _):
    for item in items:
      assert item.prompt.strip() and item.id and "/.." not in item.id
      item.prompt.encode()

  path = tmp_path / "in" / file
  path.parent.mkdir()
  given = path.parent if name == "tiif" else path
  fuzz(good, path, lambda: evaluate.get(name).read(given), oracle, wrap)


@pytest.mark.parametrize("read, good", [
    (genai_bench.read_skills, {"counting": [1, 2], "logic": ["00001"]}),
    (oneig.read_questions, {"000": {"question": {"1": "Is it?"}, "dependency": {"1": [0]}},
                            "001": {"question": '{"1": "q"}', "dependency": '{"1": [0]}'}}),
    (lambda path: questions.load_template(path, "x"), {"user": "a {prompt}", "system": "b"}),
], ids=["skills", "questions", "template"])
def test_a_reader_of_files_of_scores(tmp_path, read, good):
  path = tmp_path / "in.json"
  fuzz(good, path, lambda: read(path))


def test_json_is_read_as_the_library_does_but_for_depth():
  rng = random.Random(0)

  def value(depth):
    if depth and rng.random() < 0.6:
      items = [value(depth - 1) for _ in range(rng.randrange(4))]
      return items if rng.random() < 0.5 else {str(i): x for i, x in enumerate(items)}
    return rng.choice([x for x in HOSTILE if not isinstance(x, dict | list) and x == x])

  for _ in range(EXAMPLES):
    text = json.dumps(value(5))
    assert storage.parse_json(text) == json.loads(text)
  assert storage.parse_json(json.dumps(nested(60))) == nested(60)
  for depth in (65, 200, 1000, 100_000):
    for left, right in ("[]", ('{"a":', "}")):
      with pytest.raises(ValueError, match="nested"):
        storage.parse_json(left * depth + "0" + right * depth)


def test_a_file_too_large_or_no_file_is_not_read(tmp_path):
  with open(tmp_path / "a", "wb") as file:
    file.truncate(storage.JSON_BYTES + 1)
  with pytest.raises(ValueError, match="bytes, more than"):
    storage.read_json(tmp_path / "a")
  pathlib.os.mkfifo(tmp_path / "b")
  with pytest.raises(OSError, match="pipe or device"):
    storage.read_json(tmp_path / "b")
