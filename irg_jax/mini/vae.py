"""Trains the small autoencoder that the mini world draws through; it is frozen afterwards."""

import functools
import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from irg_jax.images import to_pixels
from irg_jax.config import VaeConfig
from irg_jax.storage import atomic_file
from irg_jax.mini import tasks, verifier, world
from irg_jax.mini.painter import paint
from irg_jax.model.vae import Vae, sample_latents, to_uint8

KL_WEIGHT = 1e-6


def train(config: VaeConfig, path, *, steps: int, batch: int, learning_rate: float,
          images: int, seed: int, save_every: int = 50, progress=None) -> dict:
  """Trains on painted scenes; what a killed run did is in `path` and is gone on with.

  Args:
    path: file of the state.
    steps, batch: updates, and images of each.
    learning_rate: at its peak; it falls along a cosine, and along a lower one once more.
    images: different images that the batches are drawn from.
    seed: of everything.
    save_every: updates between two writes of the state.
    progress: see `irg_jax.progress.Progress`.

  Returns:
    parameters of `Vae`, see `normalise`.
  """
  painted = paint_both(images, np.random.default_rng(seed))
  optimizer = _optimizer(steps, learning_rate)
  params = _init(config, jax.random.key(seed))
  state = (0, params, optimizer.init(params))
  path = pathlib.Path(path)
  if path.exists():
    state = flax.serialization.from_bytes(state, path.read_bytes())
  start, params, opt_state = state
  step = _make_step(config, optimizer)
  for i in range(start, steps):
    rows = np.random.default_rng([seed, i]).integers(0, images, batch)
    key = jax.random.fold_in(jax.random.key(seed + 1), i)
    params, opt_state, error = step(params, opt_state, to_pixels(painted[rows]), key)
    if progress:
      progress("training the autoencoder", 0, i + 1, steps)
    if (i + 1) % save_every == 0 or i + 1 == steps:
      with atomic_file(path) as aside:
        aside.write_bytes(flax.serialization.to_bytes((i + 1, params, opt_state)))
  return normalise(config, params, painted[-256:])


def paint_both(count: int, rng) -> np.ndarray:
  """Half of the images crowded, half scenes of the training, uint8 [count, 64, 64, 3]."""
  scenes = (tasks.training_scene(rng) for _ in range(count // 2))
  return np.concatenate([paint_crowded(count - count // 2, rng), *([paint(s)] for s in scenes)])


def paint_crowded(count: int, rng) -> np.ndarray:
  """Pictures with things in most cells, uint8 [count, 64, 64, 3].

  An autoencoder learns what things look like from images that are not mostly ground.
  """
  return np.stack([paint(tasks.crowded_scene(rng)) for _ in range(count)])


def loss_fn(params, config: VaeConfig, pixels, key):
  """Error of the reconstruction, edges counted too, and a light pull towards N(0, 1).

  Squares weigh more than absolute values: a thing that is missing must outweigh a ground
  that is a little off, of which there is so much more.

  Args:
    pixels: float32 [B, height, width, 3] in [-1, 1].
    key: of the draw from the posterior.

  Returns:
    (loss, mean absolute error), float32 scalars.
  """
  vae = Vae(config)
  mean, logvar = vae.apply({"params": params}, pixels, method="encode")
  latents = sample_latents(config, mean, logvar, jax.random.normal(key, mean.shape))
  error = vae.apply({"params": params}, latents, method="decode") - pixels
  edges = sum((jnp.diff(error, axis=axis)**2).mean() for axis in (1, 2))
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3)).mean()
  absolute = jnp.abs(error).mean()
  loss = 4.0 * (error**2).mean() + 2.0 * edges + 0.3 * absolute + KL_WEIGHT * kl
  return loss, absolute


def normalise(config: VaeConfig, params: dict, images: np.ndarray) -> dict:
  """The same autoencoder with latents whose root mean square is 1 in every channel.

  The change goes into the encoder's last and the decoder's first convolution, so that the
  published scale stays. It is a factor alone: a shift would not agree with the zeros that the
  decoder's first convolution sees around the image.

  Args:
    images: uint8 [B, height, width, 3] to measure on.
  """
  encode = jax.jit(lambda p, x: Vae(config).apply({"params": p}, x, method="encode")[0])
  mean = np.concatenate([encode(params, to_pixels(images[i:i + 32]))
                         for i in range(0, len(images), 32)])
  ratio = 1.0 / (np.sqrt((mean**2).mean((0, 1, 2))) * config.scale_factor)
  last, first = params["encoder"]["conv_out"], params["decoder"]["conv_in"]
  one, zero = np.ones_like(ratio), np.zeros_like(ratio)
  factor = np.concatenate([ratio, one])  # the second half are log-variances
  last = {"kernel": last["kernel"] * factor,
          "bias": last["bias"] * factor + np.concatenate([zero, 2 * np.log(ratio)])}
  first = first | {"kernel": first["kernel"] / ratio[:, None]}
  return {"encoder": params["encoder"] | {"conv_out": last},
          "decoder": params["decoder"] | {"conv_in": first}}


def round_trip(config: VaeConfig, params: dict, records, rng) -> np.ndarray:
  """Whether painted images of `records` are still right once encoded and decoded.

  Args:
    records: see `tasks`; a new scene of each is painted.
    rng: numpy Generator, of the scenes.

  Returns:
    bool [len(records)].
  """
  vae = Vae(config)

  @jax.jit
  def there_and_back(params, pixels):
    moments = vae.apply({"params": params}, pixels, method="encode")
    latents = sample_latents(config, *moments)
    return to_uint8(vae.apply({"params": params}, latents, method="decode"))

  scenes = [tasks.sample_scene(record, rng) for record in records]
  images = [np.asarray(there_and_back(params, to_pixels(paint(scene)[None])))[0]
              for scene in scenes]
  return np.array([verifier.score(*pair).correct for pair in zip(images, records)])


def _init(config, key):
  """Fresh parameters with a posterior that is narrow from the start."""
  params = Vae(config).init(key, jnp.zeros((1, world.SIZE, world.SIZE, 3)))["params"]
  last = params["encoder"]["conv_out"]
  params["encoder"]["conv_out"] = last | {"bias": last["bias"].at[config.z_channels:].set(-6.0)}
  return params


def _optimizer(steps, learning_rate):
  """Muon for the kernels, Adam for the rest: it takes fewer steps than Adam alone."""
  first = -(-2 * steps // 3)
  fall = lambda rate, steps: dict(
      init_value=0.0, peak_value=rate, warmup_steps=min(50, steps // 2),
      decay_steps=max(steps, 1), end_value=0.02 * rate)
  peak = lambda rate: optax.sgdr_schedule([fall(rate, first), fall(0.4 * rate, steps - first)])
  matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))  # inputs, outputs of a kernel
  return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.contrib.muon(
          peak(20.0 * learning_rate), adam_learning_rate=peak(learning_rate), adam_b2=0.99,
          muon_weight_dimension_numbers=lambda params: jax.tree.map(
              lambda x: matrix if x.ndim == 4 else None, params)))


def _make_step(config, optimizer):
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, pixels, key):
    (_, error), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, config, pixels, key)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, error

  return step
