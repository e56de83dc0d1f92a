"""Phases of generation by themselves: plans without images, and second thoughts without looking."""

import dataclasses
import time

import jax

from irg_jax.generate import irg
from irg_jax.generate.generator import Generator
from irg_jax.generate.stopping import filled


def plans(loaded: Generator, prompts, seeds, settings, system_prompt: str, *,
          size: int) -> list[irg.Thought]:
  """The first thoughts that `Generator.batch` of the same arguments would write."""
  with jax.set_mesh(loaded.mesh):
    job = _job(loaded, prompts, seeds, settings, system_prompt, size)
    return irg.think(job, irg.begin(job), 0)[:len(prompts)]


def blind(loaded: Generator, prompts, seeds, settings, system_prompt: str, *, size: int,
          **options) -> list[irg.Trajectory]:
  """`Generator.batch` of two rounds whose second thought is written without the first image.

  The second image is drawn after both, as ever. Such a context is not new to a model whose training
  has reflections in text alone.
  """
  drawn = loaded.batch(prompts, seeds, dataclasses.replace(settings, rounds=1), system_prompt,
                       size=size, **options)
  first, start = [trajectory.rounds[0] for trajectory in drawn], time.perf_counter()
  with jax.set_mesh(loaded.mesh):
    job = _job(loaded, prompts, seeds, settings, system_prompt, size)
    told = filled([row.thought for row in first], size)
    ctx = irg.read_thoughts(job, irg.begin(job), told, after_image=False)
    thoughts = irg.think(job, ctx, 1)[:len(prompts)]
  seconds = {"think": time.perf_counter() - start}
  second = [irg.Round(thought, None, None, dict(seconds)) for thought in thoughts]
  return loaded.batch(prompts, seeds, settings, system_prompt, size=size, done=[first, second],
                      **options)


def _job(loaded, prompts, seeds, settings, system_prompt, size):
  texts = [loaded.defaults.read(prompt, settings).text for prompt in prompts]
  return irg.prepare(loaded.model, loaded.params, loaded.tokenizer, filled(texts, size),
                     seeds=filled(seeds, size), settings=settings, system_prompt=system_prompt)
