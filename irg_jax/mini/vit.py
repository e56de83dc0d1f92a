"""Trains the small ViT of a mini world to name what each cell shows: the stand-in for SigLIP.

BAGEL starts from a ViT that was trained on images and words. A random one learns so slowly inside
the base model that what is seen is guessed from the plan instead.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from irg_jax.config import ModelConfig
from irg_jax.images import patchify, to_pixels
from irg_jax.mini import datasets, thoughts
from irg_jax.mini.scenes import crowded_scene, paint, training_scene
from irg_jax.mini.world import CELL, GRID, WORLD1, World
from irg_jax.model.vit import Vit

_BATCH, _LEARNING_RATE = 64, 2e-3  # the peak of a cosine
_NOISE = 0.05  # of pixels in [-1, 1]: drawn images are not painted ones


def train(config: ModelConfig, params: dict, *, steps: int, images: int, seed: int,
          world: World = WORLD1, progress=None) -> dict:
  """Trains the parameters of `Vit` on painted scenes; returns them without the classifier.

  It starts from `params`; `images` is the number of distinct ones, see `examples`. ValueError where
  a patch of the ViT is not a cell of the world.
  """
  if config.vit.grid_size != GRID:
    raise ValueError(f"config field 'vit_steps': a patch of the ViT must be a cell of the world, "
                     f"but model.vit.grid_size is {config.vit.grid_size}, not {GRID}; train with 0")
  config, rng = dataclasses.replace(config, dtype="float32"), datasets.generator(seed, "vit")
  patches, words = examples(images, rng, world)
  state = {"vit": params, "head": jnp.zeros((config.vit.hidden_size, int(words.max()) + 1))}
  opt_state = _optimizer(steps).init(state)
  for i in range(steps):
    rows, key = rng.integers(0, images, _BATCH), jax.random.fold_in(jax.random.key(seed), i)
    state, opt_state = _step(state, opt_state, patches[rows], words[rows], key, config, steps)
    if progress:
      progress("training the ViT", 0, i + 1, steps)
  return state["vit"]


def examples(count: int, rng, world: World = WORLD1) -> tuple[np.ndarray, np.ndarray]:
  """Patches of painted scenes, float32 [count, cells, P], and the words of each cell.

  Every other scene is a crowded one. The words are numbers, int32 [count, cells, 2 or 3],
  different for each place in the name.
  """
  scenes = [(crowded_scene if i % 2 else training_scene)(rng, world) for i in range(count)]
  patches = np.stack([patchify(to_pixels(paint(scene)), CELL) for scene in scenes])
  names = np.array([[cell.split() for cell in thoughts.grid(scene)] for scene in scenes])
  said = np.char.add(names, np.arange(names.shape[-1]).astype(str))
  return patches, np.unique(said, return_inverse=True)[1].reshape(said.shape).astype(np.int32)


def loss_fn(state, config: ModelConfig, patches_BPC, words_BPN):
  """Sigmoid loss, as of SigLIP: which of all words each cell shows; a scalar."""
  place_BP = jnp.broadcast_to(jnp.arange(patches_BPC.shape[1]), patches_BPC.shape[:2])
  seen_BPD = Vit(config).apply({"params": state["vit"]}, patches_BPC, place_BP, place_BP * 0)
  scores_BPW = seen_BPD @ state["head"]
  said_BPW = jax.nn.one_hot(words_BPN, scores_BPW.shape[-1]).sum(-2)
  return optax.sigmoid_binary_cross_entropy(scores_BPW, said_BPW).sum(-1).mean()


def _optimizer(steps):
  return optax.adamw(optax.warmup_cosine_decay_schedule(
      0.0, _LEARNING_RATE, min(50, steps // 2), steps))


@functools.partial(jax.jit, static_argnums=(5, 6))
def _step(state, opt_state, patches, words, key, config, steps):
  patches += _NOISE * jax.random.normal(key, patches.shape)
  gradients = jax.grad(loss_fn)(state, config, patches, words)
  updates, opt_state = _optimizer(steps).update(gradients, opt_state, state)
  return optax.apply_updates(state, updates), opt_state
