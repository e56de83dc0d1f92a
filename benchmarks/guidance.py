"""Guidance in every k-th update only, beside forecasts: passes, and the difference to the full run.

  python benchmarks/guidance.py
  python benchmarks/guidance.py --prompts 160 --text-scale 4 --image-scale 2

Draws prompts of the mini world's test with the default model, two rounds of 49 updates, guidance in
both, the same seeds for each option. "every k" evaluates the views of guidance in every k-th update
with guidance, and keeps their differences to the full context's velocity in between. "forecast" is
interval, order and first (docs/cheaper.md). Prints the passes of the decoder, the mean difference of
pixels to the run without either in levels of 255, and the share of images that are right, which
guidance does not raise here: the model was trained without.
"""

import argparse
import dataclasses
import functools

import jax
import numpy as np

import irg_jax
from irg_jax import flow
from irg_jax.config import update
from irg_jax.generate import denoise, steps
from irg_jax.generate.context import FULL, guidance_views, in_layers
from irg_jax.generate.settings import Forecast, expand
from irg_jax.mini import verifier
from quality import by_option

OPTIONS = ("full", "every 2", "every 3", "every 4", "every 6", "forecast 3,2,5", "forecast 4,2,5")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=80)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--text-scale", type=float, default=2.0)
  parser.add_argument("--image-scale", type=float, default=1.5)
  parser.add_argument("--options", nargs="+", default=OPTIONS)
  args = parser.parse_args()
  irg_jax.keep_programs()
  loaded = irg_jax.load()
  guided = expand({"text_scale": args.text_scale, "image_scale": args.image_scale, "steps": 50})
  settings = update(loaded.settings, guided)
  settings = dataclasses.replace(settings, **{
      name: dataclasses.replace(getattr(settings, name), interval=(0.4, 1.0))
      for name in ("first", "later")})
  found = by_option(args.options, args.prompts, args.batch_size, lambda batch, name: draw(
      loaded, settings, batch, name, args.batch_size))
  for name, rows in found.items():
    print(line(name, rows, found["full"]))


def draw(loaded, settings, batch, name, size):
  """[(images, right, passes) by round] by prompt."""
  kind, _, value = name.partition(" ")
  if kind == "forecast":
    settings = dataclasses.replace(settings, forecast=Forecast(*map(int, value.split(","))))
  drawn = loaded.batch(
      [item.prompt for _, item in batch], [number for number, _ in batch], settings,
      loaded.defaults.system_prompt, size=size,
      draw=functools.partial(draw_every, int(value)) if kind == "every" else None)
  passes = [passes_every(settings, i, int(value)) if kind == "every" else
            denoise.passes(settings, i) for i in range(settings.rounds)]
  return [([r.image.astype(float) for r in trajectory.rounds],
           [verifier.score(r.image, item.extra).correct for r in trajectory.rounds], passes)
          for (_, item), trajectory in zip(batch, drawn)]


def draw_every(k, job, ctx, number):
  """`denoise.denoise` with the views of guidance in every k-th update with guidance."""
  s, shape = job.settings, (len(job.seeds), int(np.prod(job.grid)), job.model.config.latent_dim)
  guidance, views, guided_M = guided_updates(s, number)
  times, ctx = flow.schedule(s.steps, s.timestep_shift), in_layers(ctx)
  x_BPC, kept, count = job.noise("noise", number, shape), {}, 0
  for t, after, guided in zip(times, times[1:], guided_M):
    whole = guided and count % k == 0
    count += guided
    v = velocities(job.model, job.params["transformer"], ctx, x_BPC, t, grid=job.grid,
                   special=job.tokenizer.special, views=views if whole else (FULL,))
    if whole:
      kept = {name: v["full"] - x for name, x in v.items()}
    elif guided:
      v = {name: v["full"] - x for name, x in kept.items()}
    x_BPC = updated(x_BPC, v, t - after, guidance if guided else None)
  return x_BPC


velocities = jax.jit(steps.velocities, static_argnames=("model", "grid", "special", "views"))


@jax.jit
def updated(x_BPC, v, dt, guidance):
  v_BPC = v["full"] if guidance is None else flow.guide(
      v, guidance.text_scale, guidance.image_scale, guidance.renorm, guidance.renorm_min)
  return x_BPC - v_BPC * dt


def guided_updates(settings, number):
  """(guidance, its views, whether each update has guidance, bool [M - 1]) of a round."""
  guidance = settings.later if number else settings.first
  views = guidance_views(guidance)
  times = flow.schedule(settings.steps, settings.timestep_shift)
  return guidance, views, flow.guided(times, guidance.interval) & (len(views) > 1)


def passes_every(settings, number, k):
  _, views, guided_M = guided_updates(settings, number)
  return settings.steps - 1 + (len(views) - 1) * -(-int(guided_M.sum()) // k)


def line(name, found, full):
  off = np.array([[np.abs(a - b).mean() for a, b in zip(x[0], y[0])] for x, y in zip(found, full)])
  right = np.array([x[1] for x in found], float)
  passes = " + ".join(map(str, found[0][2]))
  return f"{name:14} | {passes} | " + " | ".join(
      f"{off[:, i].mean():.2f} | {right[:, i].mean():.3f}" for i in range(off.shape[1]))


if __name__ == "__main__":
  main()
