"""The update of `irg rl` for `irg plan`, traced on shapes instead of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax.config import SpecialTokens
from irg_jax.data.batch import BufferSizes
from irg_jax.generate import irg
from irg_jax.generate.settings import Defaults, Settings
from irg_jax.model.attention import visible_pairs
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.plan.programs import (
    PROMPT, SYSTEM, Case, Program, attention_forms, trained)
from irg_jax.rl import batches, step
from irg_jax.rl.rollout import Rollout
from irg_jax.rl.settings import RlSettings
from irg_jax.train.step import row_flops


class _Counted:
  """A tokenizer of texts that are numbers: so many tokens."""

  special = SpecialTokens()

  def encode(self, text):
    return [0] * int(text)


def longest_row(settings: RlSettings, generation: Settings, system: int = SYSTEM,
                prompt: int = PROMPT) -> batches.Rows:
  """A row, without its axis B, of the longest thoughts; `system`, `prompt`: tokens of the texts."""
  model, s = settings.model, generation
  thought = irg.Thought(ids=(0,) * (s.think_limit - 1))
  width, height = s.vae_transform.size(s.width, s.height)
  grid = lambda size, side, channels: np.zeros((size[1] // side, size[0] // side, channels))
  seen = {"latents": grid((width, height), model.pixel_stride, model.latent_dim),
          "patches": grid(s.vit_transform.size(width, height), model.vit.patch_size,
                          model.vit.patch_size**2 * 3)}
  drawn = grid((s.width, s.height), model.pixel_stride, model.latent_dim)
  window = settings.image.window + 1 if settings.image.weight else 0
  path = np.zeros((s.rounds, window, drawn[..., 0].size, model.latent_dim), np.float32)
  rounds = [irg.Round(thought, None, None, {})] * s.rounds
  rollout = Rollout({"prompt": str(prompt)}, 0, irg.Trajectory("", rounds), 0, path,
                    (seen,) * (s.rounds - 1))
  worth = np.zeros((1, s.rounds))
  return batches.make_rows([rollout], worth, worth, settings, s, Defaults(
      system_prompt=str(system)), _Counted(), model)[0]


def rl_program(settings: RlSettings, generation: Settings, mesh) -> Program:
  """One update of `irg rl` on the longest rows, with the state that it trains."""
  row, model = longest_row(settings, generation), UnifiedTransformer(settings.model)
  parts, size = settings.accumulate, settings.part
  rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, size, *np.shape(x)), x.dtype), row)
  optimizer, state, base = trained(settings, settings.stage)
  batch, float32 = rows.batch, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  old = step.Measured(text=float32(batch.text_place.shape), steps=float32(rows.step_weight.shape),
                      velocity=float32(batch.latents.shape))
  update = step.make_update(model, optimizer, settings, mesh, state, rows, old, *base)
  needed, tokens, forms = _needed(settings, row.batch, mesh)
  return Program(
      "rl", f"an update of {parts} times {size} rows of {tokens} tokens", mesh,
      functools.partial(update.trace, state, rows, old, old, jax.ShapeDtypeStruct((), jnp.bool_),
                        *base), (Case("", {}, needed),), forms)


def _needed(settings, batch, mesh):
  """(FLOPs of an update, tokens of a row, forms of attention) of rows like this one."""
  und, gen, vit = (x.shape[-1] for x in (batch.text_ids, batch.latent_image, batch.vit_image))
  sizes = BufferSizes(und=und, gen=gen, vit=vit, text=batch.text_place.shape[-1], samples=1)
  seen = visible_pairs(jax.tree.map(lambda x: jnp.asarray(x)[None], batch.tokens))
  rows, tokens = settings.trajectories // settings.updates, und + gen
  needed = rows * row_flops(settings.model, sizes, {"pairs": float(seen) / tokens**2},
                            settings.lora)
  parts = {"decoder": (tokens, [tokens])} | ({"ViT": (vit, [vit])} if vit else {})
  forms = attention_forms(settings.model, mesh, parts)
  return needed, tokens, tuple(f"{part} {form}" for part, form in forms.items())
