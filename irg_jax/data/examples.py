"""A record as a training sample: tokens, images at their size, draws, dropout (spec 3 and 5)."""

import numpy as np

from irg_jax import images
from irg_jax.config import ModelConfig
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.data.sequence import DroppedImage, ImageSplit, TextSplit, sample_features


def record_features(record: Record, tokenizer, model: ModelConfig, data, rng) -> dict:
  """The arrays of `sequence.sample_features` for one record; arguments as `record_splits`.

  Raises:
    ValueError: the record cannot be laid out; names its mode and number.
  """
  try:
    splits = record_splits(record, tokenizer, model, data, rng)
    return sample_features(
        splits, model, tokenizer.special, mode=MODES.index(record.mode), index=record.index,
        ce_loss_reweighting=data.ce_loss_reweighting)
  except ValueError as e:
    raise ValueError(f"{record.mode}, record {record.index}: {e}") from e


def record_splits(record: Record, tokenizer, model: ModelConfig, data, rng) -> list:
  """The splits of a record.

  Each role of an image is a split of its own, with its own draw of the VAE's posterior.

  Args:
    record: what to lay out. An image without moments comes back with its `pixels`.
    tokenizer: `tokenizer.Tokenizer`.
    model: sizes.
    data: `train.settings.DataSettings`: transforms, dropout, posterior.
    rng: numpy Generator of all draws; the splits are a function of it and of the record.

  Raises:
    ValueError: text or an image that cannot be used.
  """
  splits = []
  for number, part in enumerate(record.parts):
    if isinstance(part, TextPart):
      # A target is never dropped, and a dropped text leaves no gap in the positions.
      if part.need_loss or not _drop(data.dropout.text, rng):
        splits.append(TextSplit(tokenizer.encode(part.text), part.need_loss))
    else:
      splits += _image(part, f"image in part {number}", model, data, rng)
  return splits


def _image(part: ImagePart, name, model, data, rng):
  """Splits of an image in the order noised, clean, ViT."""
  keep_vae = part.need_vae and not _drop(data.dropout.vae, rng)
  keep_vit = part.need_vit and not _drop(data.dropout.vit, rng)
  to_encode = part.moments is None and (part.need_loss or keep_vae)
  image = images.decode_image(part.data, name) if to_encode or keep_vit else None
  pixels = data.vae_transform(image) if to_encode else None
  splits = []
  if part.need_loss:
    splits += [_latents(part.moments, pixels, model, data, rng, need_loss=True)
               for _ in range(data.noise_samples)]
  if part.need_vae:
    splits.append(_latents(part.moments, pixels, model, data, rng, need_vae=True) if keep_vae
                  else DroppedImage())
  if part.need_vit:
    splits.append(_vit(data.vit_transform(image), model.vit.patch_size) if keep_vit
                  else DroppedImage())
  return splits


def _latents(moments, pixels, model, data, rng, **role):
  patch, stride = model.latent_patch_size, model.pixel_stride
  height, width = np.shape(moments)[1:3] if pixels is None else pixels.shape[:2]
  unit = patch if pixels is None else stride
  if height % unit or width % unit:
    raise ValueError(f"an image of {height} x {width} {'latents' if pixels is None else 'pixels'}"
                     f" does not divide into latent tokens of {unit} a side; check vae_transform")
  shape = (height // unit, width // unit, model.latent_dim)
  if data.posterior == "sample":
    draw = rng.standard_normal(shape, np.float32)
  else:
    draw = np.zeros(shape, np.float32)
  if pixels is not None:
    return ImageSplit(draw, None, pixels=pixels, **role)
  return ImageSplit(draw_latents(moments, draw, model), None, **role)


def draw_latents(moments, draw, model: ModelConfig) -> np.ndarray:
  """Latent tokens of a posterior, as `model.vae.sample_latents` makes them.

  In numpy, so that worker processes need no device; for images with and without
  precomputed moments alike, so that both give the same latents.

  Args:
    moments: float [2, h, w, z], mean and log-variance, unscaled.
    draw: float32 [h / patch, w / patch, latent_dim], standard normal, zeros for the mean.

  Returns:
    float32, shape of `draw`.
  """
  mean, logvar = (images.patchify(x.astype(np.float32), model.latent_patch_size).reshape(draw.shape)
                  for x in moments)
  scale, shift = np.float32(model.vae.scale_factor), np.float32(model.vae.shift_factor)
  return scale * (mean + np.exp(np.float32(0.5) * logvar) * draw - shift)


def _vit(image, patch):
  height, width, _ = image.shape
  patches = images.patchify(image, patch)
  return ImageSplit(None, patches.reshape(height // patch, width // patch, -1), need_vit=True)


def _drop(probability, rng):
  # Drawn whatever the probability, so that changing one leaves the other draws as they were.
  return rng.random() < probability
