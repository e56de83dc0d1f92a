"""Trains the small autoencoder of the mini world; it is frozen afterwards."""

import functools
import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from irg_jax import storage, weights
from irg_jax.config import VaeConfig
from irg_jax.images import to_pixels
from irg_jax.mini import verifier
from irg_jax.mini.scenes import crowded_scene, paint, sample_scene, training_scene
from irg_jax.mini.world import SIZE, WORLD1, World
from irg_jax.model.vae import Vae, sample_latents, to_uint8

KL_WEIGHT = 1e-6


def train(config: VaeConfig, path, *, steps: int, batch: int, learning_rate: float,
          images: int, seed: int, world: World = WORLD1, save_every: int = 50,
          progress=None) -> dict:
  """Trains on painted scenes; continues from the state in `path` if there is one.

  The numbers are those of `run.Settings`; the state is written after every `save_every` updates.
  Returns parameters of `Vae`, see `normalise`.
  """
  painted = paint_both(images, np.random.default_rng(seed), world)
  path, schedule = pathlib.Path(path), (steps, learning_rate)
  params = _init(config, jax.random.key(seed))
  state = (0, params, _optimizer(*schedule).init(params))
  if path.exists():
    state = flax.serialization.from_bytes(state, path.read_bytes())
  start, *state = state
  for i in range(start, steps):
    rows = np.random.default_rng([seed, i]).integers(0, images, batch)
    key = jax.random.fold_in(jax.random.key(seed + 1), i)
    state = _step(*state, to_pixels(painted[rows]), key, config, schedule)
    if progress:
      progress("training the autoencoder", 0, i + 1, steps)
    if (i + 1) % save_every == 0 or i + 1 == steps:
      storage.write_bytes(path, flax.serialization.to_bytes((i + 1, *state)))
  return normalise(config, state[0], painted[-256:])


def paint_both(count: int, rng, world: World = WORLD1) -> np.ndarray:
  """Images to train on, half of crowded scenes, half of training scenes, uint8 [count, 64, 64, 3].

  Crowded images have less background, so more of the loss is on shapes.
  """
  crowded = [paint(crowded_scene(rng, world)) for _ in range(count - count // 2)]
  return np.stack(crowded + [paint(training_scene(rng, world)) for _ in range(count // 2)])


def loss_fn(params, config: VaeConfig, pixels, key):
  """Reconstruction error, also of edges, and a weak KL divergence from N(0, 1); a scalar.

  Squared errors have more weight than absolute ones: a missing shape must cost more than a
  background that is slightly off everywhere. `pixels` is float32 [B, height, width, 3] in [-1, 1],
  `key` that of the sample from the posterior.
  """
  vae = Vae(config)
  mean, logvar = vae.apply({"params": params}, pixels, method="encode")
  latents = sample_latents(config, mean, logvar, jax.random.normal(key, mean.shape))
  error = vae.apply({"params": params}, latents, method="decode") - pixels
  edges = sum((jnp.diff(error, axis=axis)**2).mean() for axis in (1, 2))
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3)).mean()
  absolute = jnp.abs(error).mean()
  return 4.0 * (error**2).mean() + 2.0 * edges + 0.3 * absolute + KL_WEIGHT * kl


def normalise(config: VaeConfig, params: dict, images: np.ndarray) -> dict:
  """Scales the latents to a root mean square of 1 in each channel; reconstructions stay the same.

  The encoder's last and the decoder's first convolution absorb the factors, so the published
  scale factor stays. Latents are not shifted: that would not match the zero padding of the
  decoder's first convolution. It is measured on `images`, uint8 [B, height, width, 3].
  """
  encode = jax.jit(lambda p, x: Vae(config).apply({"params": p}, x, method="encode")[0])
  mean = np.concatenate([encode(params, to_pixels(images[i:i + 32]))
                         for i in range(0, len(images), 32)])
  ratio = 1.0 / (np.sqrt((mean**2).mean((0, 1, 2))) * config.scale_factor)
  last, first = params["encoder"]["conv_out"], params["decoder"]["conv_in"]
  # The second half of the encoder's outputs are log-variances.
  factor = np.concatenate([ratio, np.ones_like(ratio)])
  shift = np.concatenate([np.zeros_like(ratio), 2 * np.log(ratio)])
  last = {"kernel": last["kernel"] * factor, "bias": last["bias"] * factor + shift}
  first = first | {"kernel": first["kernel"] / ratio[:, None]}
  return {"encoder": params["encoder"] | {"conv_out": last},
          "decoder": params["decoder"] | {"conv_in": first}}


def round_trip(config: VaeConfig, params: dict, records, rng) -> np.ndarray:
  """Whether painted images of `records` are correct once encoded and decoded, bool [records].

  A new scene of each record is painted with `rng`.
  """
  vae = Vae(config)

  @jax.jit
  def there_and_back(params, pixels):
    moments = vae.apply({"params": params}, pixels, method="encode")
    latents = sample_latents(config, *moments)
    return to_uint8(vae.apply({"params": params}, latents, method="decode"))

  images = [paint(sample_scene(record, rng)) for record in records]
  images = [np.asarray(there_and_back(params, to_pixels(image[None])))[0] for image in images]
  return np.array([verifier.score(*pair).correct for pair in zip(images, records)])


def measure(checkpoint, path: pathlib.Path, records) -> None:
  """Writes the number of painted images, two of each record, that `round_trip` keeps correct."""
  if not path.is_file():
    config, params = weights.load_checkpoint(checkpoint, part="vae", dtype="float32",
                                             compute_dtype="float32")
    twice = [record for record in records for _ in range(2)]
    right = round_trip(config.vae, params["vae"], twice, np.random.default_rng(0))
    storage.write_json(path, {"right": int(right.sum()), "pictures": len(right)})


def _init(config, key):
  """Random parameters, with a narrow posterior."""
  params = Vae(config).init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
  last = params["encoder"]["conv_out"]
  params["encoder"]["conv_out"] = last | {"bias": last["bias"].at[config.z_channels:].set(-6.0)}
  return params


def _optimizer(steps, learning_rate):
  """Muon for kernels, Adam for the rest: fewer steps than Adam alone. The rate falls twice."""
  first = -(-2 * steps // 3)

  def peak(rate):
    return optax.sgdr_schedule([
        dict(init_value=0.0, peak_value=height, warmup_steps=min(50, length // 2),
             decay_steps=max(length, 1), end_value=0.02 * height)
        for height, length in ((rate, first), (0.4 * rate, steps - first))])

  matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))  # inputs, outputs of a kernel
  return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.contrib.muon(
          peak(20.0 * learning_rate), adam_learning_rate=peak(learning_rate), adam_b2=0.99,
          muon_weight_dimension_numbers=lambda params: jax.tree.map(
              lambda x: matrix if x.ndim == 4 else None, params)))


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=(4, 5))
def _step(params, opt_state, pixels, key, config, schedule):
  gradients = jax.grad(loss_fn)(params, config, pixels, key)
  updates, opt_state = _optimizer(*schedule).update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state
