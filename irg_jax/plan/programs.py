"""The compiled programs of training and generation, traced on shapes instead of arrays."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from irg_jax import flow, sharding
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.data.batch import pack_row
from irg_jax.data.samples import TextSplit, sample_features
from irg_jax.generate import steps
from irg_jax.generate.context import FULL, NO_IMAGE, guidance_views, new_context, rung
from irg_jax.generate.settings import Settings
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train.settings import Switches, TrainSettings
from irg_jax.train.state import init_state, make_optimizer
from irg_jax.train.step import make_train_step, row_flops, token_flops
from irg_jax.weights.names import abstract_params

_SPECIAL = SpecialTokens()


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    name: what `irg plan --programs` calls it.
    unit: the work of one run, for people.
    mesh: the mesh that it is compiled for; set it while calling `trace`.
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
  s, count = getattr(settings, stage), settings.data.rows * settings.data.accumulate
  optimizer = make_optimizer(settings.optimizer, s)
  params = abstract_params(settings.model, jnp.float32)["transformer"]
  state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
  batch = _batch(settings, s.sizes)
  model = UnifiedTransformer(settings.model)
  step = make_train_step(model, optimizer, settings, mesh, state, batch)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return Program(
      f"train {stage}", f"an update of {count} rows of {s.sizes.und + s.sizes.gen} tokens", mesh,
      functools.partial(step.trace, Switches(), state, batch, key),
      count * row_flops(settings.model, s.sizes))


def _batch(settings, sizes):
  """Shapes of a global batch, taken from a packed row so that they always match."""
  features = sample_features([TextSplit([0], need_loss=True)], settings.model, _SPECIAL)
  lead = (settings.data.rows,)
  if settings.data.accumulate > 1:
    lead = (settings.data.accumulate, *lead)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype),
                      pack_row([features], sizes))


def generation_programs(config: ModelConfig, settings: Settings, rows: int, cache: int,
                        mesh) -> list[Program]:
  """The steps of `irg generate`, at their most expensive.

  Texts have the longest length that the settings allow, the cache is full, and guidance is that of
  the later rounds. Weights and cache have `config.dtype`.

  Args:
    rows: prompts generated together.
    cache: slots per row.
  """
  s, model, down = settings, UnifiedTransformer(config), config.vae.downsample
  height, width = (side // config.pixel_stride for side in (s.height, s.width))
  vae_width, vae_height = s.vae_transform.size(s.width, s.height)
  vit_width, vit_height = (side // config.vit.patch_size
                           for side in s.vit_transform.size(vae_width, vae_height))
  latents, patches = height * width, vit_height * vit_width
  views, text = guidance_views(s.later), rung(s.think_limit + 1)

  array = functools.partial(_array, mesh)
  params = abstract_params(config, jnp.dtype(config.dtype))
  params = jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
                        params, sharding.parameter_shardings(params, mesh))
  shapes = lambda tree: jax.tree.map(lambda x: array(x.shape, x.dtype), tree)
  context = shapes(jax.eval_shape(functools.partial(new_context, config, rows, cache)))
  draft = shapes(jax.eval_shape(
      functools.partial(steps.new_draft, config, rows, s.think_limit - 1, _SPECIAL)))
  on_context, scalar = (model, params["transformer"], context), array((), jnp.int32)
  noise = array((rows, latents, config.latent_dim))
  needed = functools.partial(_pass_flops, config, rows, cache)

  def made(unit, step, *args, needed=None, **static):
    trace = functools.partial(step.trace, *args, **static)
    programs.append(Program(step.__name__, unit, mesh, trace, needed))

  programs = []
  made(f"a text of {text} tokens a row", steps.append_text, *on_context,
       array((rows, text), jnp.int32), array((rows,), jnp.int32), (FULL, NO_IMAGE),
       needed=needed(und=text, seen=text))
  made("an image a row, VAE and ViT", steps.append_image, *on_context, noise,
       array((rows, patches, config.vit.patch_size**2 * 3)), latent_grid=(height, width),
       vit_grid=(vit_height, vit_width), special=_SPECIAL,
       needed=needed(und=patches + 4, gen=latents, vit=patches, seen=patches + latents + 4))
  made(f"a thought of {s.think_limit - 1} tokens a row", steps.think, *on_context, draft,
       jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), scalar,
       sampling=s.sampling, special=_SPECIAL,
       needed=(s.think_limit - 1) * needed(und=1, text=1, seen=1))
  made(f"{s.steps - 1} updates under {len(views)} views, an image a row", steps.denoise,
       *on_context, noise, flow.schedule(s.steps, s.timestep_shift), s.later, scalar,
       scalar, grid=(height, width), special=_SPECIAL, views=views,
       needed=(s.steps - 1) * len(views) * needed(und=2, gen=latents, seen=latents + 2))
  made("an image a row", steps.decode_pixels, config, params["vae"], noise, (height, width))
  made("an image a row", steps.encode_pixels, config, params["vae"],
       array((rows, vae_height, vae_width, 3)),
       array((rows, vae_height // down, vae_width // down, config.vae.z_channels)))
  return programs


def _array(mesh, shape, dtype=jnp.float32):
  """An abstract array of rows, or of a cache [layers, rows, kv heads, slots, head dim]."""
  axes = ("layers", "batch", "heads") if len(shape) == 5 else ("batch",)
  axes = (axes + (None,) * len(shape))[:len(shape)]
  spec = sharding.partition_spec(shape, axes, mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _pass_flops(config, rows, cache, seen, und=0, gen=0, vit=0, text=0) -> float:
  """FLOPs of a decoder pass over tokens that attend to `seen` new tokens and the full cache."""
  each, llm = token_flops(config), config.llm
  total = und * each["und"] + gen * each["gen"] + vit * each["vit"] + text * each["text"]
  total += 4.0 * llm.num_layers * llm.hidden_size * (und + gen) * (seen + cache)
  total += 4.0 * config.vit.num_layers * config.vit.hidden_size * vit**2
  return rows * total
