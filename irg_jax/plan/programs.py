"""The compiled programs of training and generation, traced on shapes instead of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from irg_jax import flow, sharding
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.data.batch import BufferSizes, pack_row
from irg_jax.data.samples import TextSplit, sample_features
from irg_jax.generate import steps
from irg_jax.generate.context import FULL, NO_IMAGE, guidance_views, new_context, rung
from irg_jax.generate.settings import Settings
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.step import init_state, make_optimizer, make_train_step, row_flops
from irg_jax.weights.names import abstract_params

_SPECIAL = SpecialTokens()


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    name: as in `irg plan --programs`.
    unit: the work of one run, for people.
    mesh: the mesh to compile for; set it while calling `trace`.
    trace: function () -> `jax.stages.Traced`.
    needed_flops: FLOPs of matrix products and attention by formula, over all chips, without
      recomputation; None if there is no formula.
  """

  name: str
  unit: str
  mesh: jax.sharding.Mesh
  trace: Callable
  needed_flops: float | None = None


def train_program(settings: TrainSettings, stage: str, mesh) -> Program:
  """One update of a stage, with the state and batch shapes of `irg train`."""
  s, data, model = getattr(settings, stage), settings.data, settings.model
  optimizer = make_optimizer(settings.optimizer, s)
  state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer),
                         abstract_params(model, jnp.float32)["transformer"])
  row = pack_row([sample_features([TextSplit([0], need_loss=True)], model, _SPECIAL)], s.sizes)
  lead = (data.rows,) if data.accumulate == 1 else (data.accumulate, data.rows)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), row)
  step = make_train_step(UnifiedTransformer(model), optimizer, settings, mesh, state, batch)
  key, count = jax.eval_shape(lambda: jax.random.key(0)), math.prod(lead)
  return Program(
      f"train {stage}", f"an update of {count} rows of {s.sizes.und + s.sizes.gen} tokens", mesh,
      functools.partial(step.trace, Switches(), state, batch, key),
      count * row_flops(model, s.sizes))


def generation_programs(config: ModelConfig, settings: Settings, rows: int, cache: int,
                        mesh) -> list[Program]:
  """The steps of `irg generate`, at their most expensive.

  Texts have the longest length that the settings allow, the cache is full, and guidance is that of
  the later rounds. Weights and cache have `config.dtype`.

  Args:
    rows: prompts generated together.
    cache: slots per row.
  """
  s, model, vit_patch = settings, UnifiedTransformer(config), config.vit.patch_size
  grid = s.height // config.pixel_stride, s.width // config.pixel_stride
  width, height = s.vae_transform.size(s.width, s.height)
  vit_grid = tuple(side // vit_patch for side in s.vit_transform.size(width, height)[::-1])
  latents, patches, thought = math.prod(grid), math.prod(vit_grid), s.think_limit - 1
  views, text, down = guidance_views(s.later), rung(s.think_limit + 1), config.vae.downsample

  def array(*shape, dtype=jnp.float32):
    """An array of rows, or of a cache [layers, rows, kv heads, slots, head dim]."""
    axes = ("batch", None, None, None)[:len(shape)]
    axes = ("layers", "batch", "heads", None, None) if len(shape) == 5 else axes
    placed = NamedSharding(mesh, sharding.partition_spec(shape, axes, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

  def made(unit, step, *args, flops=None, **static):
    return Program(step.__name__, unit, mesh, functools.partial(step.trace, *args, **static), flops)

  def needed(und, gen=0, vit=0, text=0):
    """FLOPs of a decoder pass over tokens that attend to each other and to the full cache."""
    pairs = 1 + cache / (und + gen)
    sizes = BufferSizes(und=und, gen=gen, vit=vit, text=text, samples=1)
    return rows * row_flops(config, sizes, {"pairs": pairs}) / 3  # a third is the forward pass

  params = abstract_params(config, jnp.dtype(config.dtype))
  params = jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
                        params, sharding.parameter_shardings(params, mesh))
  context, draft = jax.tree.map(
      lambda x: array(*x.shape, dtype=x.dtype),
      jax.eval_shape(lambda: (new_context(config, rows, cache),
                              steps.new_draft(config, rows, thought, _SPECIAL))))
  on_context, scalar = (model, params["transformer"], context), array(dtype=jnp.int32)
  noise = array(rows, latents, config.latent_dim)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  return [
      made(f"a text of {text} tokens a row", steps.append_text, *on_context,
           array(rows, text, dtype=jnp.int32), array(rows, dtype=jnp.int32), (FULL, NO_IMAGE),
           flops=needed(und=text)),
      made("an image a row, VAE and ViT", steps.append_image, *on_context, noise,
           array(rows, patches, vit_patch**2 * 3), latent_grid=grid, vit_grid=vit_grid,
           special=_SPECIAL, flops=needed(und=patches + 4, gen=latents, vit=patches)),
      made(f"a thought of {thought} tokens a row", steps.think, *on_context, draft, keys, scalar,
           sampling=s.sampling, special=_SPECIAL, flops=thought * needed(und=1, text=1)),
      made(f"{s.steps - 1} updates under {len(views)} views, an image a row", steps.denoise,
           *on_context, noise, flow.schedule(s.steps, s.timestep_shift), s.later, scalar, scalar,
           grid=grid, special=_SPECIAL, views=views,
           flops=(s.steps - 1) * len(views) * needed(und=2, gen=latents)),
      made("an image a row", steps.decode_pixels, config, params["vae"], noise, grid),
      made("an image a row", steps.encode_pixels, config, params["vae"],
           array(rows, height, width, 3),
           array(rows, height // down, width // down, config.vae.z_channels))]
