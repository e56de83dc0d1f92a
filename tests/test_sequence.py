"""Splits to arrays, arrays to rows: layouts written out by hand."""

import jax
import numpy as np
import pytest

from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import pack_row, stack_rows
from irg_jax.data.sequence import PictureSplit, TextSplit, sample_features
from irg_jax.model.attention import CAUSAL, FULL, NOISE, PADDING, allowed

CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=100), vit=VitConfig(patch_size=1, grid_size=5),
    vae=VaeConfig(z_channels=1), max_latent_size=4, latent_patch_size=1)
START, END, OPEN, CLOSE = 90, 91, 92, 93
SPECIAL = SpecialTokens(text_start=START, text_end=END, image_start=OPEN, image_end=CLOSE)
C, F, X = CAUSAL, FULL, NOISE
GRID = {"latents": (2, 1), "vit_patches": (1, 3)}  # rows, columns


def picture(first=0, **roles):
  """A picture of 2 x 1 latent tokens and 1 x 3 patches, numbered from `first`."""
  latents = np.arange(first, first + 2, dtype=np.float32).reshape(*GRID["latents"], 1)
  patches = np.arange(first, first + 9, dtype=np.float32).reshape(*GRID["vit_patches"], 3)
  return PictureSplit(latents, patches, **roles)


def features(*splits):
  return sample_features(splits, CONFIG, SPECIAL)


def check(arrays, **expected):
  for name, want in expected.items():
    np.testing.assert_array_equal(arrays[name], want, err_msg=name)


def test_text_is_causal_and_predicts_the_next_token():
  check(features(TextSplit([1, 2], need_loss=True), TextSplit([3])),
        und_ids=[START, 1, 2, END, START, 3, END],
        und_weight=[1, 1, 1, 0, 0, 0, 0],  # nothing follows the end token
        und_position=range(7), und_index=range(7), und_split=[0] * 4 + [1] * 3, und_kind=[C] * 7,
        und_vit=[-1] * 7)
  got = features(TextSplit([1, 2], need_loss=True))
  assert got["und_target"][:3].tolist() == [1, 2, END]


def test_empty_text_is_its_two_control_tokens():
  check(features(TextSplit([], need_loss=True)), und_ids=[START, END], und_weight=[1, 0],
        und_position=[0, 1])
  assert features(TextSplit([], need_loss=True))["und_target"][0] == END


def test_clean_picture_shares_one_position_and_advances_by_one():
  check(features(TextSplit([1]), picture(need_vae=True), TextSplit([2])),
        und_ids=[START, 1, END, OPEN, CLOSE, START, 2, END],
        und_position=[0, 1, 2, 3, 3, 4, 5, 6],
        und_index=[0, 1, 2, 3, 6, 7, 8, 9],  # the latents stand between the boundaries
        und_split=[0, 0, 0, 1, 1, 2, 2, 2], und_kind=[C, C, C, F, F, C, C, C],
        gen_position=[3, 3], gen_index=[4, 5], gen_split=[1, 1], gen_kind=[F, F],
        gen_weight=[0, 0], gen_latents=[[0], [1]])


def test_noised_picture_does_not_advance_the_position():
  check(features(TextSplit([1]), picture(need_loss=True), TextSplit([2])),
        und_position=[0, 1, 2, 3, 3, 3, 4, 5], und_kind=[C, C, C, X, X, C, C, C],
        und_weight=[0] * 8, gen_position=[3, 3], gen_kind=[X, X], gen_weight=[1, 1])


def test_picture_in_all_roles_is_noised_then_clean_then_vit():
  check(features(TextSplit([]), picture(need_loss=True, need_vae=True, need_vit=True),
                 TextSplit([])),
        # text, noised boundaries, clean boundaries, ViT with its boundaries, text
        und_ids=[START, END, OPEN, CLOSE, OPEN, CLOSE, OPEN, 0, 0, 0, CLOSE, START, END],
        und_position=[0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5],
        und_index=[0, 1, 2, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16],
        und_split=[0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4],
        und_kind=[C, C, X, X, F, F, F, F, F, F, F, C, C],
        und_vit=[-1] * 7 + [0, 1, 2] + [-1] * 3,
        gen_position=[2, 2, 2, 2], gen_index=[3, 4, 7, 8], gen_split=[1, 1, 2, 2],
        gen_kind=[X, X, F, F], gen_weight=[1, 1, 0, 0], gen_latents=[[0], [1], [0], [1]],
        vit_patches=np.arange(9).reshape(3, 3))
  assert len(set(features(picture(need_loss=True, need_vae=True))["gen_picture"])) == 2


def test_places_go_row_by_row_in_the_grids_of_the_model():
  square = PictureSplit(np.zeros((2, 2, 1)), np.zeros((2, 3, 3)), need_vae=True, need_vit=True)
  check(features(square), gen_place=[0, 1, 4, 5], vit_position=[0, 1, 2, 5, 6, 7])


def test_patches_of_a_second_picture_come_after_the_first():
  got = features(picture(need_vit=True), picture(20, need_vit=True))
  check(got, und_vit=[-1, 0, 1, 2, -1, -1, 3, 4, 5, -1], und_position=[0] * 5 + [1] * 5)
  assert got["vit_patches"][3, 0] == 20
  assert got["vit_picture"].tolist()[:3] != got["vit_picture"].tolist()[3:]


def test_sample_without_pictures_has_empty_arrays_of_the_right_kind():
  got = features(TextSplit([1]))
  assert got["gen_latents"].shape == (0, CONFIG.latent_dim)
  assert got["vit_patches"].shape == (0, 3)
  for name, x in got.items():
    real = name in ("und_weight", "gen_weight", "gen_latents", "vit_patches")
    assert x.dtype == (np.float32 if real else np.int32), name


def two_samples():
  roles = dict(need_loss=True, need_vae=True, need_vit=True)
  return [features(TextSplit([1, 2]), picture(**roles)),
          features(picture(50, **roles), TextSplit([3], need_loss=True))]


def sizes(samples, spare=0):
  return [sum(len(s[f"{p}_position"]) for s in samples) + spare for p in ("und", "gen", "vit")]


def test_samples_of_a_row_stay_apart():
  samples = two_samples()
  row = pack_row(samples, *sizes(samples))
  und, gen = [13, 12], [4, 4]
  number = np.repeat([0, 1, 0, 1], und + gen)
  np.testing.assert_array_equal(row.tokens.sample, number)
  mask = np.asarray(allowed(row.tokens, row.tokens))
  for one, other in ((0, 1), (1, 0)):
    assert not mask[number == one][:, number == other].any()
  assert row.position[number == 1].min() == 0  # positions start anew
  # ViT tokens of the second sample point behind the patches of the first.
  np.testing.assert_array_equal(row.vit_index[row.vit_index >= 0], range(6))
  np.testing.assert_array_equal(row.vit_patches[3:].reshape(-1), range(50, 59))


def test_every_picture_of_a_row_has_a_number_of_its_own():
  """One flow time is drawn for each number, and ViT attention stays within one."""
  samples = two_samples() + [features(TextSplit([4]))] + two_samples()
  row = pack_row(samples, *sizes(samples))
  numbers = [*row.latent_picture[::2], *row.vit_picture[::3]]
  np.testing.assert_array_equal(row.latent_picture, np.repeat(row.latent_picture[::2], 2))
  np.testing.assert_array_equal(row.vit_picture, np.repeat(row.vit_picture[::3], 3))
  assert len(set(numbers)) == len(numbers) == 12


def test_padding_is_inert():
  samples = two_samples()
  row, exact = pack_row(samples, *sizes(samples, 3)), pack_row(samples, *sizes(samples))
  und, gen, vit = sizes(samples)
  padding = row.tokens.sample == PADDING  # at the end of each buffer
  np.testing.assert_array_equal(padding, np.repeat([0, 1, 0, 1], [und, 3, gen, 3]))
  mask = np.asarray(allowed(row.tokens, row.tokens))
  assert not mask[padding].any() and not mask[:, padding].any()
  np.testing.assert_array_equal(mask[~padding][:, ~padding], allowed(exact.tokens, exact.tokens))
  assert not row.text_weight[und:].any() and not row.latent_weight[gen:].any()
  assert (row.vit_index[und:] == -1).all() and (row.latent_picture[gen:] == PADDING).all()
  assert (row.vit_picture[vit:] == PADDING).all()


@pytest.mark.parametrize("short", range(3), ids=["und", "gen", "vit"])
def test_buffer_that_is_too_small_is_named(short):
  samples = two_samples()
  have = sizes(samples)
  have[short] -= 1
  name = ("und", "gen", "vit")[short]
  with pytest.raises(ValueError, match=rf"{have[short] + 1} values of {name}_\w+, "
                                       rf"but the buffer holds {have[short]}"):
    pack_row(samples, *have)


def test_rows_of_equal_sizes_stack_to_a_batch():
  samples = two_samples()
  rows = [pack_row([s], 15, 5, 4) for s in samples]
  batch = stack_rows(rows)
  assert batch.tokens.sample.shape == (2, 20) and batch.vit_patches.shape == (2, 4, 3)
  jax.tree.map(lambda x, a, b: np.testing.assert_array_equal(x, [a, b]), batch, *rows)


@pytest.mark.parametrize("split,message", [
    (PictureSplit(np.zeros((1, 99, CONFIG.latent_dim)), None, need_vae=True), "exceeds the"),
    (PictureSplit(None, None, need_vae=True), "latents must be"),
    (PictureSplit(np.zeros((1, 2, 9)), None, need_loss=True), "latents must be"),
    (PictureSplit(None, np.zeros((2, 2, 5)), need_vit=True), "vit_patches must be"),
    (TextSplit([CONFIG.llm.vocab_size]), "do not fit the vocabulary"),
])
def test_splits_that_the_model_cannot_place_are_refused(split, message):
  with pytest.raises(ValueError, match=message):
    sample_features([split], CONFIG, SPECIAL)


def test_an_empty_row_is_refused():
  with pytest.raises(ValueError, match="at least one sample"):
    pack_row([], 1, 1, 1)
