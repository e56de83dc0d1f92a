"""Splits to arrays and arrays to rows: layouts written out by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import DroppedImage, ImageSplit, TextSplit, sample_features
from irg_jax.images import to_pixels
from irg_jax.tokens import CAUSAL, FULL, NOISE, PADDING, allowed

CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=100), vit=VitConfig(patch_size=1, grid_size=5),
    vae=VaeConfig(z_channels=1), max_latent_size=4, latent_patch_size=1)
START, END, OPEN, CLOSE = 90, 91, 92, 93
SPECIAL = SpecialTokens(text_start=START, text_end=END, image_start=OPEN, image_end=CLOSE)
C, F, X = CAUSAL, FULL, NOISE
GRID = {"latents": (2, 1), "vit_patches": (1, 3)}  # rows, columns


def image(first=0, **roles):
  """An image of 2 x 1 latent tokens and 1 x 3 patches, numbered from `first`."""
  latents = np.arange(first, first + 2, dtype=np.float32).reshape(*GRID["latents"], 1)
  patches = np.arange(first, first + 9, dtype=np.float32).reshape(*GRID["vit_patches"], 3)
  return ImageSplit(latents, patches, **roles)


def features(*splits):
  return sample_features(splits, CONFIG, SPECIAL)


def check(arrays, **expected):
  for name, want in expected.items():
    np.testing.assert_array_equal(arrays[name], want, err_msg=name)


def test_text_is_causal_and_predicts_the_next_token():
  check(features(TextSplit([1, 2], need_loss=True), TextSplit([3])),
        und_ids=[START, 1, 2, END, START, 3, END],
        text_place=[0, 1, 2], text_target=[1, 2, END],  # nothing follows the end token
        text_weight=[1, 1, 1],
        und_position=range(7), und_index=range(7), und_split=[0] * 4 + [1] * 3, und_kind=[C] * 7,
        und_vit=[-1] * 7)


def test_predicted_text_is_found_behind_other_splits():
  check(features(TextSplit([1]), image(need_vae=True), TextSplit([2, 3], need_loss=True)),
        text_place=[5, 6, 7], text_target=[2, 3, END])  # latents are not in the und buffer


def test_reweighting_counts_a_split_by_the_root_of_its_length():
  splits = [TextSplit([1, 2, 3], need_loss=True), TextSplit([1]), TextSplit([], need_loss=True)]
  got = sample_features(splits, CONFIG, SPECIAL, ce_loss_reweighting=True)
  check(got, text_weight=[0.5] * 4 + [1])


def test_sample_is_known_by_its_mode_and_number():
  check(sample_features([TextSplit([1])], CONFIG, SPECIAL, mode=4, index=7),
        sample_mode=[4], sample_index=[7])


def test_empty_text_is_its_two_control_tokens():
  check(features(TextSplit([], need_loss=True)), und_ids=[START, END], text_place=[0],
        text_target=[END], und_position=[0, 1])


def test_clean_image_shares_one_position_and_advances_by_one():
  check(features(TextSplit([1]), image(need_vae=True), TextSplit([2])),
        und_ids=[START, 1, END, OPEN, CLOSE, START, 2, END],
        und_position=[0, 1, 2, 3, 3, 4, 5, 6],
        und_index=[0, 1, 2, 3, 6, 7, 8, 9],  # the latents stand between the boundaries
        und_split=[0, 0, 0, 1, 1, 2, 2, 2], und_kind=[C, C, C, F, F, C, C, C],
        gen_position=[3, 3], gen_index=[4, 5], gen_split=[1, 1], gen_kind=[F, F],
        gen_weight=[0, 0], gen_latents=[[0], [1]])


def test_noised_image_does_not_advance_the_position():
  check(features(TextSplit([1]), image(need_loss=True), TextSplit([2])),
        und_position=[0, 1, 2, 3, 3, 3, 4, 5], und_kind=[C, C, C, X, X, C, C, C],
        text_place=[], gen_position=[3, 3], gen_kind=[X, X], gen_weight=[1, 1])


def test_image_in_all_roles_is_noised_then_clean_then_vit():
  check(features(TextSplit([]), image(need_loss=True, need_vae=True, need_vit=True),
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
  assert len(set(features(image(need_loss=True, need_vae=True))["gen_image"])) == 2


def test_dropped_image_leaves_a_gap_in_the_positions_and_nothing_else():
  kept = features(TextSplit([1]), image(need_vae=True), TextSplit([2]))
  got = features(TextSplit([1]), DroppedImage(), TextSplit([2]))
  check(got, und_ids=[START, 1, END, START, 2, END], und_position=[0, 1, 2, 4, 5, 6],
        und_index=range(6), gen_place=[])
  assert got["und_position"][-1] == kept["und_position"][-1]


def test_images_to_be_encoded_come_with_the_place_of_their_tokens():
  raw = [np.full((2, 1, 3), i, np.uint8) for i in range(2)]
  noise = np.zeros((2, 1, 1))
  got = features(ImageSplit(noise, None, need_vae=True, pixels=raw[0]), image(need_vae=True),
                 ImageSplit(noise, None, need_loss=True, pixels=raw[1]))
  assert [start for start, _ in got["images"]] == [0, 4]
  assert all(a is b for (_, a), b in zip(got["images"], raw))


def test_places_go_row_by_row_in_the_grids_of_the_model():
  square = ImageSplit(np.zeros((2, 2, 1)), np.zeros((2, 3, 3)), need_vae=True, need_vit=True)
  check(features(square), gen_place=[0, 1, 4, 5], vit_position=[0, 1, 2, 5, 6, 7])


def test_patches_of_a_second_image_come_after_the_first():
  got = features(image(need_vit=True), image(20, need_vit=True))
  check(got, und_vit=[-1, 0, 1, 2, -1, -1, 3, 4, 5, -1], und_position=[0] * 5 + [1] * 5)
  assert got["vit_patches"][3, 0] == 20
  assert got["vit_image"].tolist()[:3] != got["vit_image"].tolist()[3:]


def test_sample_without_images_has_empty_arrays_of_the_right_kind():
  got = features(TextSplit([1]))
  assert got["gen_latents"].shape == (0, CONFIG.latent_dim)
  assert got["vit_patches"].shape == (0, 3)
  for name, x in got.items():
    real = name in ("gen_weight", "gen_latents", "text_weight")
    if name not in ("vit_patches", "images"):  # patches: of either kind, as their neighbours
      assert x.dtype == (np.float32 if real else np.int32), name


def two_samples():
  roles = dict(need_loss=True, need_vae=True, need_vit=True)
  return [features(TextSplit([1, 2]), image(**roles)),
          features(image(50, **roles), TextSplit([3], need_loss=True))]


def sizes(samples, spare=0):
  return BufferSizes(**{buffer: sum(len(s[name]) for s in samples) + spare
                        for buffer, name in LENGTH_FEATURES.items()})


def test_samples_of_a_row_stay_apart():
  samples = two_samples()
  row = pack_row(samples, sizes(samples))
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


def test_predictions_and_samples_of_a_row_are_found_again():
  samples = [sample_features([TextSplit([i, i + 1], need_loss=i > 0), image(need_vit=True),
                              TextSplit([i], need_loss=True)], CONFIG, SPECIAL, mode=i, index=9 - i)
             for i in range(3)]
  row = pack_row(samples, sizes(samples, spare=2))
  here = row.text_weight > 0
  assert here.sum() == 2 + 5 + 5
  place = row.text_place[here]
  np.testing.assert_array_equal(row.text_ids[place + 1], row.text_target[here])
  np.testing.assert_array_equal(row.tokens.sample[place], row.text_sample[here])
  np.testing.assert_array_equal(row.sample_mode, [0, 1, 2, -1, -1])
  np.testing.assert_array_equal(row.sample_index, [9, 8, 7, -1, -1])
  by_sample = [row.text_ids[place[row.text_sample[here] == i]].max() for i in range(3)]
  assert by_sample == [START] * 3 and set(row.text_sample[here]) == {0, 1, 2}


def test_eight_bit_patches_become_pixels_and_are_never_mixed_with_floats():
  levels = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
  samples = [features(TextSplit([1])), features(ImageSplit(None, levels, need_vit=True))]
  row = pack_row(samples, sizes(samples))
  np.testing.assert_array_equal(row.vit_patches, to_pixels(levels[0]))
  with pytest.raises(ValueError, match="dtype of vit_patches"):
    pack_row(samples + two_samples(), sizes(samples + two_samples()))
  with pytest.raises(ValueError, match="all 8-bit levels or all float"):
    features(ImageSplit(None, levels, need_vit=True), image(need_vit=True))


def test_every_image_of_a_row_has_a_number_of_its_own():
  """One timestep is sampled for each number, and ViT attention stays within one."""
  samples = two_samples() + [features(TextSplit([4]))] + two_samples()
  row = pack_row(samples, sizes(samples))
  numbers = [*row.latent_image[::2], *row.vit_image[::3]]
  np.testing.assert_array_equal(row.latent_image, np.repeat(row.latent_image[::2], 2))
  np.testing.assert_array_equal(row.vit_image, np.repeat(row.vit_image[::3], 3))
  assert len(set(numbers)) == len(numbers) == 12


def test_padding_is_inert():
  samples = two_samples()
  row, exact = pack_row(samples, sizes(samples, 3)), pack_row(samples, sizes(samples))
  und, gen, vit, text, number = dataclasses.astuple(sizes(samples))
  padding = row.tokens.sample == PADDING  # at the end of each buffer
  np.testing.assert_array_equal(padding, np.repeat([0, 1, 0, 1], [und, 3, gen, 3]))
  mask = np.asarray(allowed(row.tokens, row.tokens))
  assert not mask[padding].any() and not mask[:, padding].any()
  np.testing.assert_array_equal(mask[~padding][:, ~padding], allowed(exact.tokens, exact.tokens))
  assert not row.text_weight[text:].any() and not row.latent_weight[gen:].any()
  assert not row.text_place[text:].any() and (row.text_sample[text:] == PADDING).all()
  assert (row.sample_mode[number:] == -1).all() and (row.sample_index[number:] == -1).all()
  assert (row.vit_index[und:] == -1).all() and (row.latent_image[gen:] == PADDING).all()
  assert (row.vit_image[vit:] == PADDING).all()


@pytest.mark.parametrize("name", LENGTH_FEATURES)
def test_buffer_that_is_too_small_is_named(name):
  samples = two_samples()
  have = sizes(samples)
  size = getattr(have, name)
  prefix = name.removesuffix("s")
  with pytest.raises(ValueError, match=rf"{size} values of {prefix}_\w+, "
                                       rf"but the buffer holds {size - 1}"):
    pack_row(samples, dataclasses.replace(have, **{name: size - 1}))


@pytest.mark.parametrize("name,size", [("und", -1), ("samples", 0)])
def test_buffer_size_that_cannot_be_is_named(name, size):
  with pytest.raises(ValueError, match=f"{name}={size}"):
    BufferSizes(**dict(und=1, gen=0, vit=0, text=0, samples=1) | {name: size})


def test_rows_of_equal_sizes_stack_to_a_batch():
  samples = two_samples()
  rows = [pack_row([s], BufferSizes(und=15, gen=5, vit=4, text=3, samples=2)) for s in samples]
  batch = stack_rows(rows)
  assert batch.tokens.sample.shape == (2, 20) and batch.vit_patches.shape == (2, 4, 3)
  jax.tree.map(lambda x, a, b: np.testing.assert_array_equal(x, [a, b]), batch, *rows)


@pytest.mark.parametrize("split,message", [
    (ImageSplit(np.zeros((1, 99, CONFIG.latent_dim)), None, need_vae=True), "exceeds the"),
    (ImageSplit(None, None, need_vae=True), "latents must be"),
    (ImageSplit(np.zeros((1, 2, 9)), None, need_loss=True), "latents must be"),
    (ImageSplit(None, np.zeros((2, 2, 5)), need_vit=True), "vit_patches must be"),
    (TextSplit([CONFIG.llm.vocab_size]), "do not fit the vocabulary"),
])
def test_splits_that_the_model_cannot_place_are_refused(split, message):
  with pytest.raises(ValueError, match=message):
    sample_features([split], CONFIG, SPECIAL)


def test_an_empty_row_is_refused():
  with pytest.raises(ValueError, match="at least one sample"):
    pack_row([], BufferSizes(und=1, gen=1, vit=1, text=1, samples=1))
