"""Forecasts between updates: counts of passes, exactness, rows and meshes, traces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax import sharding
from irg_jax.generate import denoise, forecast, irg
from irg_jax.generate.settings import Forecast, Guidance, Settings
from test_generate import CONFIG, MODEL, ONE_ROUND, PROMPTS, SEEDS, SETTINGS, generate, params

LONG = dataclasses.replace(
    SETTINGS, steps=14, first=Guidance(interval=(0.3, 1.0)),
    later=Guidance(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel"))
FAST = dataclasses.replace(LONG, forecast=Forecast(interval=3, order=2, first=4))
ONCE = dataclasses.replace(FAST, rounds=1)


def test_the_published_settings_need_the_published_passes():
  full, fast = Settings(), Settings(forecast=Forecast(interval=3, order=2, first=5))
  assert [denoise.passes(full, number) for number in (0, 1)] == [90, 147]
  assert [denoise.passes(fast, number) for number in (0, 1)] == [36, 57]
  assert denoise.passes(fast, 0, edits=True) == 57


def test_every_view_counts_the_updates_in_which_it_takes_part():
  active = np.arange(14) >= 4
  found = forecast.schedule(active, Forecast(interval=3, order=2, first=2))
  assert np.flatnonzero(found.passes).tolist() == [4, 5, 8, 11]
  assert found.order[found.passes].tolist() == [0, 1, 2, 2]
  assert found.distance[found.passes].tolist() == [1, 1, 3, 3]
  assert found.since[4:].tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_polynomial_of_the_order_is_forecast_exactly_from_equal_distances(order):
  # Backward differences are derivatives of a straight line only; of a higher power the forecast
  # is what its definition says.
  rng = np.random.default_rng(order)
  values = rng.normal(size=(order + 2, 1, 3, 4)).astype(np.float32)
  f = jnp.zeros((order + 1, 1, 3, 4))
  old = [np.zeros((1, 3, 4))] * (order + 1)
  for number, h in enumerate(values):
    f = forecast.learn(f, h, min(number, order), 2.0)
    new = [h]
    for i in range(order):
      new.append((new[i] - old[i]) / 2.0 if i < min(number, order) else np.zeros_like(h))
    old = new
  want = sum(g * 1.5**i / [1, 1, 2, 6][i] for i, g in enumerate(old))
  np.testing.assert_allclose(forecast.extrapolate(f, 1.5), want, atol=1e-5)


def straight(model, params, ctx, x_BPC, t, grid, special, views):
  """A decoder whose hidden state is a straight line in the number of the update."""
  at, slope = (jax.random.normal(jax.random.key(i), (x_BPC.shape[1], CONFIG.llm.hidden_size))
               for i in range(2))
  line_PD = at + slope * (1 - t) * 10 / 5
  return {view: jnp.broadcast_to(line_PD * (1 + view) + view, (len(x_BPC), *line_PD.shape))
          for view in views}


def test_a_hidden_state_that_is_linear_in_the_step_is_exact_with_interval_2(monkeypatch):
  monkeypatch.setattr(irg.steps, "_hidden", straight)
  settings = dataclasses.replace(ONE_ROUND, steps=11, timestep_shift=1.0, think=False,
                                 first=Guidance(interval=(0.0, 1.0)))
  jax.clear_caches()
  try:
    full, = generate(PROMPTS[:1], SEEDS[:1], settings)
    for interval in (2, 5):
      fast, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(
          settings, forecast=Forecast(interval=interval, order=1, first=2)))
      np.testing.assert_allclose(fast.rounds[0].latents, full.rounds[0].latents, atol=2e-5)
    rough, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(
        settings, forecast=Forecast(interval=2, order=0, first=2)))
    assert np.abs(rough.rounds[0].latents - full.rounds[0].latents).max() > 1e-3
  finally:
    jax.clear_caches()


def test_order_0_with_interval_1_is_the_complete_run_bit_for_bit(monkeypatch):
  full = generate(PROMPTS[:2], SEEDS[:2], dataclasses.replace(LONG, rounds=1))
  monkeypatch.setattr(denoise, "_complete", denoise._forecast)
  fast = generate(PROMPTS[:2], SEEDS[:2], dataclasses.replace(
      LONG, rounds=1, forecast=Forecast(interval=1, order=0)))
  for a, b in zip(full, fast):
    np.testing.assert_array_equal(a.rounds[0].latents, b.rounds[0].latents)


def test_rows_progress_and_the_number_of_parts_change_nothing():
  both = generate(PROMPTS[:2], SEEDS[:2], FAST)
  for row in range(2):
    alone, = generate(PROMPTS[row:row + 1], SEEDS[row:row + 1], FAST)
    for a, b in zip(both[row].rounds, alone.rounds):
      assert a.thought == b.thought and a.passes == b.passes
      assert np.abs(a.image.astype(int) - b.image).max() <= 1
  heard = []
  parts = generate(PROMPTS[:2], SEEDS[:2], FAST, on_progress=lambda *event: heard.append(event))
  assert len(heard) > 20
  for a, b in zip(both, parts):
    np.testing.assert_array_equal(a.rounds[1].latents, b.rounds[1].latents)


def test_it_is_near_the_complete_run_and_not_the_same():
  full, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(LONG, rounds=1))
  fast, = generate(PROMPTS[:1], SEEDS[:1], ONCE)
  off = np.abs(fast.rounds[0].latents - full.rounds[0].latents)
  assert 1e-5 < off.mean() < 0.1 * np.abs(full.rounds[0].latents).mean()
  assert fast.rounds[0].passes < full.rounds[0].passes


def test_guidance_acts_in_forecasts_too():
  fast, = generate(PROMPTS[:1], SEEDS[:1], ONCE)
  more, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(
      ONCE, first=dataclasses.replace(ONCE.first, text_scale=8.0)))
  none, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(
      ONCE, first=dataclasses.replace(ONCE.first, text_scale=1.0)))
  a, b, c = (x.rounds[0].latents for x in (fast, more, none))
  assert min(np.abs(a - b).max(), np.abs(a - c).max(), np.abs(b - c).max()) > 1e-3


def test_guidance_that_begins_later_counts_from_there():
  settings = dataclasses.replace(FAST, rounds=1, first=Guidance(interval=(0.2, 0.9)))
  found, = generate(PROMPTS[:1], SEEDS[:1], settings)
  full, = generate(PROMPTS[:1], SEEDS[:1], dataclasses.replace(settings, forecast=Forecast()))
  off = np.abs(found.rounds[0].latents - full.rounds[0].latents).mean()
  assert off < 0.1 * np.abs(full.rounds[0].latents).mean()


def test_eight_devices_give_what_one_gives():
  alone = generate(PROMPTS, SEEDS, ONCE)
  mesh = sharding.make_mesh({"data": 4, "tensor": 2})
  with jax.set_mesh(mesh):
    weights = jax.device_put(params(), sharding.parameter_shardings(params(), mesh))
    split = generate(PROMPTS, SEEDS, ONCE, weights=weights)
  for a, b in zip(alone, split):
    assert a.rounds[0].thought == b.rounds[0].thought
    np.testing.assert_allclose(a.rounds[0].latents, b.rounds[0].latents, atol=2e-3)
