"""Images: decoding, the resize rule, patches."""

import io

import numpy as np
import pytest
from PIL import Image

from irg_jax import images


@pytest.fixture
def image():
  return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def decoded(image, **options):
  return images.decode_image(encoded(image, **options), "p")


@pytest.mark.parametrize("transform", [images.VAE_TRANSFORM, images.VIT_TRANSFORM,
                                       images.VIT_TRAIN_TRANSFORM])
def test_sides_are_multiples_of_the_stride_within_the_long_limit(transform):
  rng = np.random.default_rng(0)
  for width, height in np.exp(rng.uniform(0, 9, (500, 2))).astype(int) + 1:
    size = transform.size(int(width), int(height))
    assert all(side % transform.stride == 0 and side > 0 for side in size)
    assert max(size) <= transform.max_size
    assert transform.size(int(height), int(width)) == size[::-1]
    if max(width, height) <= 1.5 * min(width, height):
      assert min(size) >= transform.min_size


def test_the_resize_rule_is_idempotent_for_images_it_made():
  assert images.VAE_TRANSFORM.size(1024, 512) == (1024, 512)
  assert images.VAE_TRANSFORM.size(688, 512) == (688, 512)


def test_worked_examples_of_the_resize_rule():
  assert images.VAE_TRANSFORM.size(640, 480) == (688, 512)
  assert images.VAE_TRANSFORM.size(1999, 201) == (1024, 96)


def test_the_area_cap_decides_the_rounding_of_stretched_images(monkeypatch):
  assert images.VAE_TRANSFORM.size(246, 4630) == (64, 1024)
  monkeypatch.setattr(images, "_MAX_PIXELS", 2**40)
  assert images.VAE_TRANSFORM.size(246, 4630) == (48, 1024)


@pytest.mark.parametrize("sizes", [(64, 32, 0), (32, 64, 16), (64, 8, 16), (70, 32, 16),
                                   (64, 40, 16)])
def test_a_transform_that_cannot_hold_its_promise_is_refused(sizes):
  with pytest.raises(ValueError, match="ImageTransform"):
    images.ImageTransform(*sizes)


def test_a_image_without_pixels_is_refused():
  with pytest.raises(ValueError, match="0 x 5"):
    images.VAE_TRANSFORM.size(0, 5)


def test_resizing_to_the_same_size_changes_nothing(image):
  np.testing.assert_array_equal(images.resize_to(image, 60, 40), image)
  transform = images.ImageTransform(64, 32, 16)
  assert transform(image).shape == (32, 64, 3)  # 40 is 2.5 strides: half goes to even
  np.testing.assert_array_equal(transform(image), images.resize_to(image, 64, 32))


def test_pixels_span_minus_one_to_one():
  pixels = images.to_pixels(np.array([0, 255], np.uint8))
  assert pixels.dtype == np.float32 and pixels.tolist() == [-1.0, 1.0]


def test_patches_are_row_column_channel_in_row_major_order(image):
  patches = images.patchify(image, 20)
  assert patches.shape == (6, 1200)
  np.testing.assert_array_equal(patches[4], image[20:40, 20:40].reshape(-1))
  with pytest.raises(ValueError, match="60 x 40"):
    images.patchify(image, 16)


def test_position_ids_index_the_models_grid():
  assert images.position_ids(2, 3, 8).tolist() == [0, 1, 2, 8, 9, 10]
  with pytest.raises(ValueError, match="9 x 2 patches exceeds the 8 x 8"):
    images.position_ids(2, 9, 8)


def test_colour_images_come_back_exactly(image, tmp_path):
  Image.fromarray(image).save(tmp_path / "a.png")
  got = images.read_image(tmp_path / "a.png")
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, image)


def test_transparency_lies_on_white():
  rgba = np.zeros((1, 3, 4), np.uint8)
  rgba[0, :, 0] = 200
  rgba[0, :, 3] = [0, 255, 128]
  got = decoded(Image.fromarray(rgba))[0]
  assert got[0].tolist() == [255, 255, 255] and got[1].tolist() == [200, 0, 0]
  assert 225 <= got[2][0] <= 229 and 125 <= got[2][1] <= 129
  grey = Image.fromarray(np.array([[[0, 0], [9, 255]]], np.uint8), "LA")
  assert decoded(grey)[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_palettes_with_and_without_transparency():
  image = Image.new("P", (2, 1))
  image.putpalette([255, 0, 0, 0, 0, 255])
  image.putdata([0, 1])
  assert decoded(image)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
  assert decoded(image, transparency=0)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_grey_black_and_white_and_16_bit():
  assert decoded(Image.fromarray(np.array([[7]], np.uint8)))[0, 0].tolist() == [7, 7, 7]
  assert decoded(Image.new("1", (1, 1), 1))[0, 0].tolist() == [255, 255, 255]
  deep = Image.fromarray(np.array([[0, 2**15, 2**16 - 1]], np.uint16))
  assert decoded(deep)[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_applied(image):
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees, clockwise
  got = decoded(Image.fromarray(image), exif=exif)
  np.testing.assert_array_equal(got, np.rot90(image, -1))


def test_unreadable_files_are_named(tmp_path):
  for name in ("missing.png", "."):
    with pytest.raises(ValueError, match="cannot read the image"):
      images.read_image(tmp_path / name)
  for content in (b"", b"not a picture"):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: not an image that can be decoded"):
      images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_images_are_refused(image, kind):
  data = encoded(Image.fromarray(image), kind)
  with pytest.raises(ValueError, match="half.img: not an image that can be decoded"):
    images.decode_image(data[: len(data) // 2], "half.img")


@pytest.mark.parametrize("limit", ["ours", "pillow's"])
def test_huge_images_are_refused_before_they_are_decoded(image, monkeypatch, limit):
  if limit == "ours":
    monkeypatch.setattr(images, "_MAX_READ_PIXELS", 2399)
  else:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(ValueError, match="big.png: more than .* pixels; make"):
    images.decode_image(encoded(Image.fromarray(image)), "big.png")
