"""AdamW with clipping and warm-up, freezing, and the moving average (spec section 6)."""

import dataclasses
import re
from typing import Callable

import jax
import jax.numpy as jnp
import optax

from irg_jax.train.settings import OptimizerSettings, StageSettings

# What the names of `settings.Freeze` mean: patterns that parameter paths begin with.
FREEZABLE = {
    "und": r"decoder/(layers/und/|und_norm/)",
    "gen": r"decoder/(layers/gen/|gen_norm/)",
    "vit": r"vit/",
    "llm": r"decoder/|embed/|heads/text/",
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The update rule of a stage, and its learning rate as a function of the step."""

  transform: optax.GradientTransformation
  schedule: Callable


def make_optimizer(settings: OptimizerSettings, stage: StageSettings) -> Optimizer:
  """Clip by the global norm, AdamW, the stage's learning rate."""
  schedule = lambda step: stage.learning_rate * _share(stage, step)
  s = settings
  transform = optax.chain(
      optax.clip_by_global_norm(s.clip_norm),
      optax.adamw(schedule, b1=s.b1, b2=s.b2, eps=s.eps, weight_decay=s.weight_decay))
  return Optimizer(transform, schedule)


def _share(stage, step):
  """Of the stage's learning rate, in the update after `step` updates."""
  rise = step / stage.warmup_steps if stage.warmup_steps else 1.0
  fall = (stage.steps - step) / stage.decay_steps if stage.decay_steps else 1.0
  return jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)


def map_frozen(function, tree, frozen):
  """`function` of the leaves that the names in `frozen` cover; the others stay as they are."""
  if not frozen:
    return tree
  pattern = re.compile("|".join(FREEZABLE[name] for name in frozen))
  covered = lambda path: pattern.match(jax.tree_util.keystr(path, simple=True, separator="/"))
  return jax.tree.map_with_path(lambda path, x: function(x) if covered(path) else x, tree)


def update(optimizer: Optimizer, state, gradients, frozen, ema_decay: float):
  """The state after one step of the optimizer and of the moving average.

  Args:
    state: `train.state.TrainState`.
    gradients: float32, like the parameters.
    frozen: names of `FREEZABLE` that do not move.
  """
  updates, opt_state = optimizer.transform.update(gradients, state.opt_state, state.params)
  # A gradient of zero is not enough: the moments and the weight decay would still move it.
  updates = map_frozen(jnp.zeros_like, updates, frozen)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
  return dataclasses.replace(
      state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
