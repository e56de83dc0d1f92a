"""The small published set: what is read of every good row, and that exactly the bad ones go."""

import functools
import json

import conftest
import numpy as np
import pytest

from irg_jax.data.batch import DataSettings, Dropout
from irg_jax.config import LlmConfig, ModelConfig, VitConfig
from irg_jax.data import samples, sources
from irg_jax.data.parquet import iterate_texts, mode_files
from irg_jax.data.records import MODES, Rejected, TextPart, parse_conversation
from irg_jax.data.samples import DroppedImage, TextSplit
from irg_jax.images import ImageTransform
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer

SAMPLE = conftest.reference_root() / "irgl_sample"
EXPECTED = SAMPLE / "expected_byte_tokenizer.json"
pytestmark = pytest.mark.skipif(
    not EXPECTED.is_file(), reason=f"no {EXPECTED} (set IRG_REFERENCE)")

VAE = ImageTransform(128, 32, 16)
VIT = ImageTransform(112, 28, 14)
MODEL = ModelConfig(llm=LlmConfig(vocab_size=260), vit=VitConfig(patch_size=14))
LIMIT = 0.6  # more than half of one mode is bad by intent

# The published parser is lax, so what it makes of a row does not say whether it is good.
BAD_MODE = "improving_full_learning"
BAD = {6: "bad_json", 7: "no_assistant", 8: "bad_picture", 9: "bad_base64", 10: "unknown_role",
       11: "unused_picture", 12: "unknown_part"}


def expected(mode):
  return json.loads(EXPECTED.read_text())[mode]


@functools.cache
def tokenizer(folder):
  write_byte_tokenizer(folder)
  return load_tokenizer(folder, 260)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  out = tmp_path_factory.mktemp("built")
  sources.build(SAMPLE, out, MODES, max_rejected=LIMIT)
  return out


def settings(vae=0.0, vit=0.0, words=0.0):
  return DataSettings(
      path="", streams=1, workers=0, rows=1, accumulate=1, bins=1, max_sample_tokens=10**6,
      vae_transform=VAE, vit_transform=VIT, dropout=Dropout(text=words, vit=vit, vae=vae),
      posterior="mean", noise_samples=1, ce_loss_reweighting=False, max_rejected=LIMIT)


def splits(record, tmp_path_factory, **dropout):
  folder = tmp_path_factory.getbasetemp()
  return samples.record_splits(record, tokenizer(folder), MODEL, settings(**dropout),
                                np.random.default_rng(0))


def described(record_splits):
  """A sample in the words of the expected file, which counts tokens without framing."""
  out = {"num_tokens": 0, "plan": [], "text_lengths": [], "image_shapes": []}
  for split in record_splits:
    if isinstance(split, TextSplit):
      kind, tokens = "text", len(split.ids)
      out["text_lengths"].append(tokens)
    elif split.need_vit:
      rows, columns, _ = split.vit_patches.shape
      kind, tokens = "vit_image", rows * columns
      out["image_shapes"].append([3, rows * VIT.stride, columns * VIT.stride])
    else:
      height, width, _ = split.pixels.shape
      kind, tokens = "vae_image", (height // VAE.stride) * (width // VAE.stride)
      out["image_shapes"].append([3, height, width])
    out["num_tokens"] += tokens
    out["plan"].append((kind, int(split.need_loss)))
  return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["published", "built"])
def test_every_good_row_agrees(mode, form, built, tmp_path_factory):
  want = expected(mode)
  source = sources.open_source(SAMPLE if form == "published" else built, mode, max_rejected=LIMIT)
  good = [i for i in range(len(want)) if mode != BAD_MODE or i not in BAD]
  assert [r.index for r in source] == good and good
  for record in source:
    row = want[record.index]
    plan = [(p["type"], p["loss"]) for p in row["plan"]]
    assert described(splits(record, tmp_path_factory)) == row | {"plan": plan}


@pytest.mark.parametrize("mode", MODES)
def test_dropout_may_take_exactly_the_splits_so_marked(mode, tmp_path_factory):
  """enable_cfg marks what can be dropped; where a text is a target, the loss rules it out."""
  for record in sources.open_source(SAMPLE, mode, max_rejected=LIMIT):
    plan = expected(mode)[record.index]["plan"]
    kept = splits(record, tmp_path_factory, vae=1.0, vit=1.0, words=1.0)
    kept = [s for s in kept if not isinstance(s, DroppedImage)]
    want = [p for p in plan if p["loss"] or not p["enable_cfg"]]
    assert [(p["type"] == "text", p["loss"]) for p in want] == [
        (isinstance(s, TextSplit), int(s.need_loss)) for s in kept]


def test_exactly_the_bad_rows_go_each_for_its_reason():
  found = {}
  for mode in MODES:
    texts = [t for file in mode_files(SAMPLE, mode) for t in iterate_texts(file)]
    assert len(texts) == len(expected(mode))
    for i, row in enumerate(texts):
      try:
        parse_conversation(row, mode, i)
      except Rejected as e:
        found[mode, i] = e.reason
  assert found == {(BAD_MODE, i): reason for i, reason in BAD.items()}


def test_texts_are_those_of_the_rows(built):
  for mode in MODES:
    for record in sources.open_source(built, mode):
      lengths = [len(p.text.encode()) for p in record.parts if isinstance(p, TextPart)]
      assert lengths == expected(mode)[record.index]["text_lengths"]
