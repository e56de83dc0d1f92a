"""Resize rule, resize, pixels, patches and position ids against the reference, exactly."""

import json

import conftest
import numpy as np
import PIL
import pytest

from irg_jax import images


def resize_case_files():
  root = conftest.reference_root()
  found = sorted(root.rglob("image_resize_rule.json"))
  reason = f"no image_resize_rule.json under {root} (set IRG_REFERENCE)"
  return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def vit_sizes(reference):
  """(patch size, grid side) of the folder's ViT."""
  vit = reference.json("vit_config.json")
  return vit["patch_size"], vit["image_size"] // vit["patch_size"]


def block_shape(position_ids, grid):
  """Rows and columns of one picture's position ids."""
  return int(position_ids[-1]) // grid + 1, int(position_ids[-1]) % grid + 1


def train_images(reference):
  """(index, its entry) of every image of the packed row, in order."""
  splits = [s for sample in reference.json("train_samples.json") for s in sample]
  return list(enumerate(s for s in splits if s["type"] == "image"))


@pytest.mark.parametrize("path", resize_case_files(), ids=lambda p: p and p.parent.name)
def test_every_resize_case_is_exact(path):
  cases = json.loads(path.read_text())
  assert cases
  for c in cases:
    got = images.ImageTransform(c["max"], c["min"], c["stride"]).size(c["w"], c["h"])
    assert got == (c["out_w"], c["out_h"]), c


def test_vit_input_is_exact(reference):
  patch, grid = vit_sizes(reference)
  _, height, width = reference["vit/pixels"].shape
  pixels = images.to_pixels(images.resize_to(reference["vit/image"], width, height))
  np.testing.assert_array_equal(pixels, reference["vit/pixels"].transpose(1, 2, 0))
  np.testing.assert_array_equal(images.patchify(pixels, patch), reference["vit/tokens"])
  ids = images.position_ids(height // patch, width // patch, grid)
  np.testing.assert_array_equal(ids, reference["vit/position_ids"])


def test_packed_vit_tokens_are_exact(reference):
  patch, grid = vit_sizes(reference)
  seen = [i for i, p in train_images(reference) if p["need_vit"]]
  ends = np.cumsum(reference["train/vit_token_seqlens"])
  assert len(seen) == len(ends)
  for i, end, length in zip(seen, ends, reference["train/vit_token_seqlens"]):
    part = slice(end - length, end)
    want_ids = reference["train/packed_vit_position_ids"][part]
    rows, columns = block_shape(want_ids, grid)
    np.testing.assert_array_equal(images.position_ids(rows, columns, grid), want_ids)
    image = images.resize_to(reference[f"train/image_{i}"], columns * patch, rows * patch)
    tokens = images.patchify(images.to_pixels(image), patch)
    levels = 0 if PIL.__version__ >= "13" else 2  # of 255: Pillow 12 rounds some otherwise
    np.testing.assert_allclose(tokens, reference["train/packed_vit_tokens"][part],
                               atol=levels * 2 / 255 + 1e-7 * levels, rtol=0)


def test_packed_latent_position_ids_are_exact(reference):
  want = reference["train/packed_latent_position_ids"]
  shapes = reference["train/latent_shapes"].tolist()
  # The side of the latent grid is not in the files: a picture's second row starts it.
  first = next(i for i, (rows, _) in enumerate(shapes) if rows > 1)
  start = sum(rows * columns for rows, columns in shapes[:first])
  grid = int(want[start + shapes[first][1]])
  got = [images.position_ids(rows, columns, grid) for rows, columns in shapes]
  np.testing.assert_array_equal(np.concatenate(got), want)


def test_pixels_for_the_vae_are_exact(reference):
  """An image that is target and context goes in twice."""
  order = []
  for i, p in train_images(reference):
    order += [i] * (p["need_loss"] + p["need_vae"])
  padded = reference["train/padded_images"]
  assert len(order) == len(padded)
  for i, want in zip(order, padded):
    pixels = images.to_pixels(reference[f"train/image_{i}"])
    height, width, _ = pixels.shape
    np.testing.assert_array_equal(pixels, want[:, :height, :width].transpose(1, 2, 0))
