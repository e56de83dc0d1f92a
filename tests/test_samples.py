"""Records to splits: order and noise of images, and what dropout may drop."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from irg_jax.data.batch import DataSettings, Dropout
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from irg_jax.data.samples import record_features, record_splits
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.data.samples import DroppedImage, ImageSplit, TextSplit
from irg_jax.images import ImageTransform
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer

MODEL = ModelConfig(  # places and sizes of the model; nothing is computed with it
    llm=LlmConfig(vocab_size=260), vit=VitConfig(grid_size=8), vae=VaeConfig(), max_latent_size=8)
DATA = DataSettings(
    path="", streams=1, workers=0, rows=1, accumulate=1, bins=1, max_sample_tokens=10**6,
    vae_transform=ImageTransform(128, 32, 16), vit_transform=ImageTransform(112, 28, 14),
    dropout=Dropout(text=0.0, vit=0.0, vae=0.0), posterior="sample", noise_samples=1,
    ce_loss_reweighting=False, max_rejected=0.0)
ALL = Dropout(text=1.0, vit=1.0, vae=1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  write_byte_tokenizer(folder)
  return load_tokenizer(folder, MODEL.llm.vocab_size)


def png(width=64, height=48):
  levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(levels).save(file, "png")
  return file.getvalue()


def image(moments=None, **roles):
  flags = dict.fromkeys(("need_loss", "need_vae", "need_vit"), False) | roles
  return ImagePart(png(), **flags, moments=moments)


def splits(tokenizer, *parts, seed=0, **changes):
  return record_splits(Record(MODES[5], 3, parts), tokenizer, MODEL,
                       dataclasses.replace(DATA, **changes), np.random.default_rng(seed))


def test_image_comes_as_target_then_clean_then_for_the_vit(tokenizer):
  target, clean, vit = splits(tokenizer, image(need_loss=True, need_vae=True, need_vit=True))
  assert target.need_loss and clean.need_vae and vit.need_vit
  np.testing.assert_array_equal(target.pixels, clean.pixels)
  assert np.abs(target.latents - clean.latents).max() > 0.1  # noise of its own for each role
  assert vit.vit_patches.dtype == np.uint8


def test_a_target_is_noised_several_times_at_one_position_and_conditions_are_there_once(tokenizer):
  parts = TextPart("a", True), image(need_loss=True, need_vae=True, need_vit=True)
  once, thrice = (record_features(Record(MODES[5], 3, parts), tokenizer, MODEL,
                                  dataclasses.replace(DATA, noise_samples=n),
                                  np.random.default_rng(0)) for n in (1, 3))
  tokens = 4 * 3
  assert thrice["gen_weight"].tolist() == [1.0] * 3 * tokens + [0.0] * tokens
  assert len(set(thrice["gen_position"][:3 * tokens])) == 1
  assert len(set(thrice["gen_split"])) == len(set(thrice["gen_image"])) == 4
  for name in ("gen_position", "gen_latents"):
    assert thrice[name].shape[0] == 4 * tokens
  assert thrice["und_position"].max() == once["und_position"].max()


def test_everything_conditional_is_dropped_and_no_target(tokenizer):
  parts = [TextPart("a", False), TextPart("b", True), image(need_vae=True, need_vit=True),
           image(need_loss=True, need_vae=True)]
  got = splits(tokenizer, *parts, dropout=ALL)
  assert [type(s) for s in got] == [TextSplit, DroppedImage, DroppedImage, ImageSplit,
                                    DroppedImage]
  assert got[0].need_loss and got[3].need_loss
  features = record_features(Record(MODES[5], 3, tuple(parts)), tokenizer, MODEL,
                             dataclasses.replace(DATA, dropout=ALL), np.random.default_rng(0))
  # The text starts at 0, two dropped images then advance by one each, the target stands there.
  assert features["und_position"].tolist() == [0, 1, 2, 5, 5]


@pytest.mark.parametrize("kind", ["text", "vit", "vae"])
def test_each_kind_is_dropped_with_its_own_probability(tokenizer, kind):
  parts = [TextPart("a", False), image(np.zeros((2, 4, 4, 16)), need_vae=True, need_vit=True)]
  chance = Dropout(**(dict(text=0.0, vit=0.0, vae=0.0) | {kind: 0.3}))
  dropped = 0
  for seed in range(400):
    got = splits(tokenizer, *parts, seed=seed, dropout=chance)
    kept = dict(text=any(isinstance(s, TextSplit) for s in got),
                vae=any(getattr(s, "need_vae", False) for s in got),
                vit=any(getattr(s, "need_vit", False) for s in got))
    dropped += not kept.pop(kind)
    assert all(kept.values())
  assert 0.2 < dropped / 400 < 0.4


def test_splits_are_a_function_of_record_and_seed(tokenizer):
  parts = [TextPart("a", False), image(need_loss=True), image(need_vae=True, need_vit=True)]
  some = Dropout(text=0.5, vit=0.5, vae=0.5)
  shapes = set()
  for seed in range(8):
    one, two = (splits(tokenizer, *parts, seed=seed, dropout=some) for _ in range(2))
    assert str(one) == str(two)
    shapes.add(tuple(type(s) for s in one))
  assert len(shapes) > 2


def test_moments_give_latents_and_no_image_is_decoded(tokenizer):
  rng = np.random.default_rng(1)
  moments = rng.standard_normal((2, 4, 6, 16)).astype(np.float32)
  broken = ImagePart(b"not a picture", True, True, False, moments)
  target, clean = splits(tokenizer, broken, posterior="mean")
  assert target.pixels is None and target.latents.shape == (2, 3, MODEL.latent_dim)
  np.testing.assert_array_equal(target.latents, clean.latents)
  first = moments[0, :2, :2].reshape(-1)
  want = MODEL.vae.scale_factor * (first - MODEL.vae.shift_factor)
  np.testing.assert_allclose(clean.latents[0, 0], want, rtol=1e-5)


@pytest.mark.parametrize("part,message", [
    (ImagePart(b"not a picture", True, False, False), "image in part 1.*decoded"),
    (image(np.zeros((2, 3, 4, 16)), need_vae=True), "3 x 4 latents does not divide"),
    (image(np.zeros((2, 40, 4, 16)), need_vae=True), "exceeds the 8 x 8 positions"),
    (TextPart("\ud800", True), "surrogate"),
])
def test_record_that_cannot_be_laid_out_is_named_with_the_reason(tokenizer, part, message):
  record = Record(MODES[2], 17, (TextPart("a", False), part))
  with pytest.raises(ValueError, match=rf"{MODES[2]}, record 17: .*{message}"):
    record_features(record, tokenizer, MODEL, DATA, np.random.default_rng(0))
