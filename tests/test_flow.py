"""Schedule and guidance of the flow, against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax import flow
from irg_jax.generate.context import FULL, NO_IMAGE, NO_TEXT, guidance_views
from irg_jax.generate.settings import Guidance, Settings


def test_shift_one_changes_no_time_and_the_ends_stay():
  t = np.linspace(0, 1, 11)
  np.testing.assert_allclose(flow.shift_time(t, 1.0), t)
  for shift in (0.5, 3.0, 4.0):
    assert flow.shift_time(0.0, shift) == 0 and flow.shift_time(1.0, shift) == 1
  np.testing.assert_allclose(flow.shift_time(0.5, 3.0), 0.75)


@pytest.mark.parametrize("steps, shift", [(2, 3.0), (3, 1.0), (25, 3.0), (50, 4.0)])
def test_schedule_falls_from_one_to_zero(steps, shift):
  times = flow.schedule(steps, shift)
  assert times.shape == (steps,) and times.dtype == np.float32
  assert times[0] == 1 and times[-1] == 0
  assert (np.diff(times) < 0).all()


def test_schedule_of_three_points_worked_out_by_hand():
  np.testing.assert_allclose(flow.schedule(3, 3.0), [1, 0.75, 0])


@pytest.mark.parametrize("guidance, guided", [(Settings().first, 41), (Settings().later, 49)],
                         ids=["first round", "later rounds"])
def test_fifty_times_are_49_updates_of_which_the_interval_guides(guidance, guided):
  times = flow.schedule(50, 3.0)[:-1]  # the last time is arrived at, never evaluated
  low, high = guidance.interval
  assert len(times) == 49
  assert np.sum((low < times) & (times <= high)) == guided


def test_euler_steps_along_the_true_velocity_arrive_at_the_image():
  rng = np.random.default_rng(0)
  latents, noise = rng.standard_normal((2, 5, 3), np.float32)
  x, times = noise, flow.schedule(7, 3.0)
  for t, t_next in zip(times[:-1], times[1:]):
    np.testing.assert_allclose(x, flow.interpolate(latents, noise, t), atol=1e-5)
    x = x - (noise - latents) * (t - t_next)
  np.testing.assert_allclose(x, latents, atol=1e-5)


# Two tokens of one number each. Guided by text: 3 + 2 (3 - 3) = 3 and 0 + 2 (4 - 0) = 8, of norm
# sqrt(73) where the full velocity has 5. Guided by the image as well, before any renorm:
# 1 + 3 (3 - 1) = 7 and 2 + 3 (8 - 2) = 20, of norm sqrt(449).
FULL_V, NO_TEXT_V, NO_IMAGE_V = ([[3.0], [4.0]], [[3.0], [0.0]], [[1.0], [2.0]])


def guide(renorm, image=False, renorm_min=0.0, full=FULL_V, no_text=NO_TEXT_V, text_scale=2.0):
  velocities = {"full": full, "no_text": no_text} | ({"no_image": NO_IMAGE_V} if image else {})
  velocities = {name: jnp.array([v]) for name, v in velocities.items()}
  return np.asarray(flow.guide(velocities, text_scale, 3.0, renorm, renorm_min))[0, :, 0]


@pytest.mark.parametrize("renorm, image, want", [
    ("global", False, [3 * 5 / 73**0.5, 8 * 5 / 73**0.5]),
    ("channel", False, [3, 4]),
    ("text_channel", False, [3, 4]),
    ("global", True, [7 * 5 / 449**0.5, 20 * 5 / 449**0.5]),
    ("channel", True, [3, 4]),
    # Scaled to (3, 4) first: 1 + 3 (3 - 1) = 7, 2 + 3 (4 - 2) = 8, and not scaled again.
    ("text_channel", True, [7, 8]),
])
def test_guided_velocity_worked_out_by_hand(renorm, image, want):
  np.testing.assert_allclose(guide(renorm, image), want, rtol=1e-6)


def test_norms_run_over_all_numbers_of_a_token():
  """With more than one number a token, so that `channel` is not a matter of signs."""
  full = jnp.array([[[3.0, 4.0], [0.0, 1.0]]])
  v = {"full": full, "no_text": jnp.zeros_like(full)}  # guided: twice the full velocity
  for renorm in flow.RENORMS:
    np.testing.assert_allclose(flow.guide(v, 2.0, 1.0, renorm, 0.0), full, rtol=1e-6)
  turned = v | {"no_text": full.at[0, 0].set(jnp.array([3.0, 0.0]))}  # guided: (3, 8), (0, 1)
  got = flow.guide(turned, 2.0, 1.0, "channel", 0.0)
  np.testing.assert_allclose(got[0], [[3 * 5 / 73**0.5, 8 * 5 / 73**0.5], [0, 1]], rtol=1e-6)


def test_renorm_min_bounds_the_scaling_from_below():
  np.testing.assert_allclose(guide("global", renorm_min=0.9), [2.7, 7.2], rtol=1e-6)
  np.testing.assert_allclose(guide("channel", renorm_min=0.9), [3, 7.2], rtol=1e-6)
  np.testing.assert_allclose(guide("text_channel", renorm_min=1.0), [3, 8], rtol=1e-6)


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_a_guided_velocity_is_never_scaled_up(renorm):
  got = guide(renorm, no_text=[[4.5], [6.0]])  # 4.5 + 2 (3 - 4.5) and 6 + 2 (4 - 6)
  np.testing.assert_allclose(got, [1.5, 2], rtol=1e-6)


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_zero_velocities_stay_zero(renorm):
  assert not guide(renorm, full=[[0.0], [0.0]], no_text=[[0.0], [0.0]]).any()


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_guidance_of_a_row_does_not_depend_on_the_rows_beside_it(renorm):
  rng = np.random.default_rng(0)
  scales = np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None]
  v = {name: scales * rng.standard_normal((3, 6, 4), np.float32)
       for name in ("full", "no_text", "no_image")}
  together = flow.guide(v, 4.0, 2.0, renorm, 0.0)
  for row in range(3):
    alone = flow.guide({name: x[row:row + 1] for name, x in v.items()}, 4.0, 2.0, renorm, 0.0)
    np.testing.assert_allclose(together[row], alone[0], rtol=1e-5)


def test_renorm_that_nobody_knows_is_refused():
  with pytest.raises(ValueError, match="unknown renorm 'layer'.*text_channel"):
    jax.eval_shape(lambda: flow.guide({}, 4.0, 2.0, "layer", 0.0))


@pytest.mark.parametrize("text_scale, image_scale, views", [
    (4.0, 2.0, (FULL, NO_TEXT, NO_IMAGE)),
    (4.0, 1.0, (FULL, NO_TEXT)),
    (1.0, 2.0, (FULL,)),  # without text guidance there is no image guidance either
    (1.0, 1.0, (FULL,)),
])
def test_scales_of_at_most_one_leave_their_context_out(text_scale, image_scale, views):
  assert guidance_views(Guidance(text_scale=text_scale, image_scale=image_scale)) == views
