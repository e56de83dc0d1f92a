"""Training state and its update: AdamW, freezing, EMA (docs/spec.md, section 6)."""

import dataclasses
import re
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from irg_jax.train.settings import OptimizerSettings, StageSettings

# Parameters by the names of `settings.Freeze`: patterns of the beginning of their paths.
FREEZABLE = {
    "und": r"decoder/(layers/und/|und_norm/)",
    "gen": r"decoder/(layers/gen/|gen_norm/)",
    "vit": r"vit/",
    "llm": r"decoder/|embed/|heads/text/",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The state of one stage."""

  step: jax.Array  # int32 scalar, updates made in this stage
  params: Any  # float32, of the UnifiedTransformer; the VAE is frozen and not in here
  ema: Any  # exponential moving average of `params`
  opt_state: Any  # of optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optax transformation of a stage; its learning rate by the number of updates made."""

  transform: optax.GradientTransformation
  schedule: Callable


def make_optimizer(settings: OptimizerSettings, stage: StageSettings) -> Optimizer:
  """Clipping by the global norm, then AdamW with the stage's learning rate."""
  def schedule(step):
    rise = step / stage.warmup_steps if stage.warmup_steps else 1.0
    fall = (stage.steps - step) / stage.decay_steps if stage.decay_steps else 1.0
    return stage.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

  return Optimizer(optax.chain(
      optax.clip_by_global_norm(settings.clip_norm),
      optax.adamw(schedule, b1=0.9, b2=0.95, eps=settings.eps,
                  weight_decay=settings.weight_decay)), schedule)


def init_state(params, optimizer: Optimizer) -> TrainState:
  """The state before the first update, from parameters of any dtype. May be jitted."""
  master = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  # Copies: the state is donated, and no buffer may be donated twice.
  copy = lambda tree: jax.tree.map(jnp.array, tree)
  return TrainState(step=jnp.zeros((), jnp.int32), params=copy(master), ema=copy(master),
                    opt_state=optimizer.transform.init(master))


def map_frozen(function, tree, frozen):
  """Applies `function` to the leaves that the names in `frozen` cover; keeps the others."""
  if not frozen:
    return tree
  pattern = re.compile("|".join(FREEZABLE[name] for name in frozen))
  covered = lambda path: pattern.match(jax.tree_util.keystr(path, simple=True, separator="/"))
  return jax.tree.map_with_path(lambda path, x: function(x) if covered(path) else x, tree)


def update(optimizer: Optimizer, state: TrainState, gradients, frozen,
           ema_decay: float) -> TrainState:
  """The state after one step of the optimizer and of the moving average.

  Args:
    gradients: float32, like the parameters.
    frozen: names of `FREEZABLE` that are not trained.
  """
  updates, opt_state = optimizer.transform.update(gradients, state.opt_state, state.params)
  # Zero gradients are not enough: moments and weight decay would still move the parameters.
  updates = map_frozen(jnp.zeros_like, updates, frozen)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
  return dataclasses.replace(
      state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
