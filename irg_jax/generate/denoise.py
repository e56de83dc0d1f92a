"""One image drawn out of noise: the updates of a round, with and without guidance and forecasts.

`job` is an `irg.Job` everywhere.
"""

import itertools

import jax
import numpy as np

from irg_jax import flow
from irg_jax.generate import forecast, steps
from irg_jax.generate.context import FULL, Context, guidance_views, in_layers


def denoise(job, ctx: Context, number: int):
  """The clean latent tokens of round `number`, float32 [B, P, latent_dim]."""
  s, shape = job.settings, (len(job.seeds), int(np.prod(job.grid)), job.model.config.latent_dim)
  x_BPC = job.noise("noise", number, shape)
  times = flow.schedule(s.steps, s.timestep_shift)
  times = np.pad(times, (0, max(0, job.room.times - len(times))))  # `denoise` stops before these
  draw = _complete if s.forecast.interval == 1 else _forecast
  return draw(job, in_layers(ctx), number, x_BPC, times)


def passes(settings, number: int, edits: bool = False) -> int:
  """Times that the decoder runs for an image of round `number`, each guidance view counted."""
  views, _, active = _views(settings, number, edits)
  return sum(int(forecast.schedule(active[v], settings.forecast).passes.sum()) for v in views)


def _views(settings, number, edits):
  """(views, guidance, {view: updates in which it takes part, bool [M]}) of a round."""
  guidance = settings.first if number == 0 and not edits else settings.later
  views = guidance_views(guidance)
  times = flow.schedule(settings.steps, settings.timestep_shift)
  guided = flow.guided(times, guidance.interval) & (len(views) > 1)
  return views, guidance, {view: guided | (view == FULL) for view in views}


def _complete(job, ctx, number, x_BPC, times):
  """The decoder runs in every update."""
  views, guidance, active = _views(job.settings, number, bool(job.images))
  for part in job.parts("draw", number, job.settings.steps - 1):
    # Updates with and without guidance are loops of their own. A branch within one loop would cost
    # a copy of all weights in every update on a CPU; all rounds share the loop without guidance.
    for with_guidance, run in itertools.groupby(range(*part), active[views[-1]].__getitem__):
      with_guidance &= len(views) > 1
      start, stop = (run := list(run))[0], run[-1] + 1
      x_BPC = steps.denoise(
          job.model, job.params["transformer"], ctx, x_BPC, times,
          guidance if with_guidance else None, start, stop, grid=job.grid,
          special=job.tokenizer.special, views=views if with_guidance else (FULL,))
    jax.block_until_ready(x_BPC)
  return x_BPC


def _forecast(job, ctx, number, x_BPC, times):
  """The decoder runs in the updates of `forecast.schedule` only."""
  s = job.settings
  views, guidance, active = _views(s, number, bool(job.images))
  schedules = {view: forecast.schedule(active[view], s.forecast) for view in views}
  known = {view: forecast.blank(job.model.config, s.forecast.order, *x_BPC.shape[:2])
           for view in views}
  for part in job.parts("draw", number, s.steps - 1):
    for start, stop, seen, runs in _runs(part, active, schedules):
      x_BPC, found = steps.denoise_forecast(
          job.model, job.params["transformer"], ctx, x_BPC, {v: known[v] for v in seen}, times,
          {v: schedules[v].padded(len(times)) for v in seen}, guidance if len(seen) > 1 else None,
          start, stop, grid=job.grid, special=job.tokenizer.special, passes=runs)
      known |= found
    jax.block_until_ready(x_BPC)
  return x_BPC


def _runs(part, active, schedules):
  """Yields (start, stop, views, views that the decoder runs for) of updates that are one loop."""
  runs = []
  for i in range(*part):
    seen = tuple(view for view in active if active[view][i])
    found = tuple(view for view in seen if schedules[view].passes[i])
    if runs and runs[-1][2] == seen and (not found or runs[-1][3] in ((), found)):
      runs[-1][1], runs[-1][3] = i + 1, runs[-1][3] or found
    else:
      runs.append([i, i + 1, seen, found])
  # Without a pass no loop runs the decoder; it is the same program.
  return [(start, stop, seen, found or seen) for start, stop, seen, found in runs]
