"""Trajectories as rows of a batch: the conversation, what was sampled in it, what it is worth.

A row is one trajectory in the form of training (`data.samples`): prompts, then in each round the
thought, the image as it was before each stochastic step (noised splits, which nothing later sees),
and the image as it was read back. So one pass gives the log-probabilities of all tokens and steps.
A row that stopped ends with the thought that kept its image.
"""

import dataclasses

import einops
import jax
import numpy as np

from irg_jax import flow
from irg_jax.config import ModelConfig
from irg_jax.data.batch import Batch, BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.generate import stopping
from irg_jax.generate.settings import Defaults, Settings
from irg_jax.rl.rollout import Rollout
from irg_jax.rl.settings import RlSettings

_LENGTH = 128  # text lengths are multiples of it, so that few shapes are compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """B rows; the leading axis is B, or [A, B] under accumulation. I counts stochastic steps."""

  batch: Batch  # `latents` has x before the step on noised tokens
  text_weight: jax.Array  # float32 [B, E], 1 on sampled tokens; 0 on others and padding
  text_advantage: jax.Array  # float32 [B, E]
  step: jax.Array  # int32 [B, G], number of the stochastic step in the row; -1 on clean tokens
  time: jax.Array  # float32 [B, G], before the step; 0 on clean tokens
  next_time: jax.Array  # float32 [B, G], after it
  after: jax.Array  # float32 [B, G, latent_dim], x after it
  step_weight: jax.Array  # float32 [B, I], 1 on steps that were sampled; 0 on those of kept rounds
  step_advantage: jax.Array  # float32 [B, I]


def make_rows(rollouts: list[Rollout], text_advantages, image_advantages, settings: RlSettings,
              generation: Settings, defaults: Defaults, tokenizer,
              model: ModelConfig) -> list[Rows]:
  """Rows, each without its axis B, of trajectories.

  Args:
    text_advantages, image_advantages: float32 [N, rounds].
  """
  features = lambda r, rounds: _sample(r, rounds, settings, generation, defaults, tokenizer, model)
  samples = [features(r, stopping.own(r.trajectory.rounds)) for r in rollouts]
  # Room for all rounds, so that what is compiled does not depend on who stops.
  full = [features(r, [dataclasses.replace(entry, kept=False) for entry in r.trajectory.rounds])
          for r in rollouts if r.trajectory.rounds[-1].kept]
  sizes, rows = fitting([*samples, *full]), []
  times = flow.schedule(generation.steps, generation.timestep_shift)
  for rollout, sample, text, image in zip(rollouts, samples, text_advantages, image_advantages):
    rows.append(Rows(batch=pack_row([sample], sizes), **_tokens(rollout, text, settings, sizes),
                     **_steps(rollout, image, settings, times, sample, sizes)))
  return rows


def stack(rows: list[Rows], accumulate: int) -> Rows:
  """One Rows with axes [A, B, ...] of N = A * B rows, in order."""
  lead = lambda x: einops.rearrange(x, "(a b) ... -> a b ...", a=accumulate)
  return jax.tree.map(lead, dataclasses.replace(
      jax.tree.map(lambda *x: np.stack(x), *rows), batch=stack_rows([r.batch for r in rows])))


def fitting(samples) -> BufferSizes:
  """Sizes that fit every sample alone in a row, text lengths rounded up."""
  longest = lambda name: max(len(s[name]) for s in samples)
  up = lambda count: -(-count // _LENGTH) * _LENGTH
  return BufferSizes(und=up(longest("und_ids")), gen=longest("gen_place"),
                     vit=longest("vit_position"), text=up(longest("text_place")), samples=1)


def _sample(rollout, rounds, settings, generation, defaults, tokenizer, model):
  """Features of a trajectory's `rounds`, see `samples.sample_features`."""
  prompt = defaults.read(rollout.record["prompt"], generation).text
  texts = [defaults.system_prompt, prompt] if defaults.system_prompt else [prompt]
  splits = [TextSplit(tokenizer.encode(text)) for text in texts]
  grid = (generation.height // model.pixel_stride, generation.width // model.pixel_stride)
  for number, entry in enumerate(rounds):
    if generation.think:
      splits.append(TextSplit(list(entry.thought.ids), need_loss=bool(settings.text.weight)))
    if entry.kept:
      break
    splits += [ImageSplit(x_PC.reshape(*grid, -1), None, need_loss=True)
               for x_PC in rollout.path[number][:-1]]
    if number + 1 < len(rounds):
      seen = rollout.seen[number]
      splits.append(ImageSplit(seen["latents"], seen["patches"], need_vae=True, need_vit=True))
  return sample_features(splits, model, tokenizer.special)


def _tokens(rollout, advantages, settings, sizes):
  """text_weight, text_advantage [E]."""
  weight, advantage = [], []
  rounds = stopping.own(rollout.trajectory.rounds)
  for entry, worth in zip(rounds, advantages if settings.text.weight else ()):
    thought = entry.thought
    count = len(thought.ids)
    # A thought that was broken off has an end that was not sampled; one that reads otherwise than
    # it was sampled has no log-probability.
    weight += [float(thought.as_sampled)] * count
    weight.append(float(thought.as_sampled and not thought.hit_limit))
    advantage += [worth] * (count + 1)
  pad = lambda x: np.pad(np.array(x, np.float32), (0, sizes.text - len(x)))
  return {"text_weight": pad(weight), "text_advantage": pad(advantage)}


def _steps(rollout, advantages, settings, times, sample, sizes):
  """The fields of Rows about stochastic steps."""
  noised = sample["gen_weight"] > 0
  rounds, window = rollout.path.shape[0], max(rollout.path.shape[1] - 1, 0)
  P, drawn = rollout.path.shape[2], sum(not entry.kept for entry in rollout.trajectory.rounds)
  step, index = np.full(sizes.gen, -1, np.int32), np.tile(np.arange(window), drawn)
  where = np.flatnonzero(noised)  # step by step, as the splits stand
  step[where] = np.repeat(np.arange(drawn * window), P)
  time, next_time = np.zeros((2, sizes.gen), np.float32)
  time[where] = np.repeat(times[rollout.start + index], P)
  next_time[where] = np.repeat(times[rollout.start + index + 1], P)
  after = np.zeros((sizes.gen, sample["gen_latents"].shape[1]), np.float32)
  after[where] = rollout.path[:drawn, 1:].reshape(-1, after.shape[1])
  worth = np.repeat(np.asarray(advantages, np.float32), window)
  return {"step": step, "time": time, "next_time": next_time, "after": after,
          "step_weight": (np.arange(rounds * window) < drawn * window).astype(np.float32),
          "step_advantage": worth}
