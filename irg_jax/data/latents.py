"""Pictures to VAE moments, on a process's own devices: during training or once beforehand.

Images are encoded in groups of equal size. A group is filled up with copies to one of few
counts, so that few programs are compiled; an image itself is never padded (spec section 8).
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax import sharding
from irg_jax.config import ModelConfig
from irg_jax.data.examples import draw_latents
from irg_jax.model.vae import Vae

# Of a group, on each device: the encoder's first layers need about 2 KiB for every pixel.
_GROUP_PIXELS = 1024 * 1024


class Encoder:
  """Encodes images with a frozen VAE.

  Args:
    model: sizes, and the dtype of the arithmetic.
    params: the VAE's parameters, host or local arrays.
    devices: those to use, a copy of the VAE on each; this process's own by default.
  """

  def __init__(self, model: ModelConfig, params, devices=None):
    self._model = model
    mesh = sharding.make_mesh({"data": len(devices or jax.local_devices())},
                              devices or jax.local_devices())
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.P(*axes))
    self._devices, self._rows = mesh.size, place("data")
    self._params = jax.device_put(params, place())

  def moments(self, images) -> list[np.ndarray]:
    """Posteriors of images.

    Args:
      images: list of uint8 [H, W, 3], of any sizes that the VAE can halve.

    Returns:
      float32 [2, h, w, z] each: mean and log-variance, unscaled.
    """
    groups, found = {}, [None] * len(images)
    for i, image in enumerate(images):
      groups.setdefault(image.shape, []).append(i)
    for (height, width, _), members in sorted(groups.items()):
      most = max(_GROUP_PIXELS // (height * width), 1) * self._devices
      for start in range(0, len(members), most):
        some = members[start:start + most]
        for i, one in zip(some, self._group([images[i] for i in some])):
          found[i] = one
    return found

  def _group(self, images):
    count = self._devices  # then twice that, and so on
    while count < len(images):
      count *= 2
    filled = images + images[-1:] * (count - len(images))
    levels = jax.device_put(np.stack(filled), self._rows)
    return np.asarray(_moments(self._model, self._params, levels))[:len(images)]

  def __call__(self, batch, images):
    """Completes a batch: replaces posterior draws in `batch.latents` by latents.

    Args:
      batch: `data.batch.Batch` of numpy arrays [B, ...].
      images: list of (row, first token in gen, uint8 [H, W, 3]).
    """
    latents = batch.latents.copy()
    stride, dim = self._model.pixel_stride, self._model.latent_dim
    found = self.moments([pixels for _, _, pixels in images])
    for (row, first, pixels), moments in zip(images, found):
      rows, columns = pixels.shape[0] // stride, pixels.shape[1] // stride
      here = latents[row, first:first + rows * columns]
      draw = here.reshape(rows, columns, dim)
      here[:] = draw_latents(moments, draw, self._model).reshape(-1, dim)
    return dataclasses.replace(batch, latents=latents)

  def fingerprint(self) -> str:
    """A short text that differs for other weights."""
    digest = hashlib.sha256(self._model.dtype.encode())
    for x in jax.tree.leaves(self._params):
      digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=0)
def _moments(model, params, levels):
  """uint8 [N, H, W, 3] -> float32 [N, 2, h, w, z]."""
  pixels = (levels.astype(jnp.float32) / 255 - 0.5) / 0.5  # as images.to_pixels
  vae = Vae(model.vae, model.dtype)
  return jnp.stack(vae.apply({"params": params}, pixels, method="encode"), 1)
