"""How many slots of the cache a run needs."""

from irg_jax.config import ModelConfig
from irg_jax.generate.context import NO_IMAGE, rung
from irg_jax.generate.settings import Settings
from irg_jax.generate.steps import guidance_views


def plan_cache(config: ModelConfig, settings: Settings, system_tokens: int, image=None,
               understand=False) -> tuple[int, int]:
  """Slots of the cache for each row, and how many earlier rounds fit into it.

  Both follow from the settings and the system prompt alone, never from what a row or its
  neighbours happen to say: so neither shapes nor results depend on them.

  Args:
    system_tokens: length of the system prompt.
    image: (height, width) of the images that the prompts are about, None without.
    understand: text is all that comes out, see `answer`.

  Raises:
    ValueError: an image of more pixels than the model has positions for, a system prompt
      that is too long, a `cache_size` that does not hold even one earlier round.
  """
  s = settings
  thought = rung(s.think_limit + 1)
  prompt = rung(s.max_prompt_tokens + 2)
  base = rung(system_tokens + 2, "a system prompt") + prompt + thought
  if image is not None:
    base += _image_slots(config, s, *image, vae=not understand)
    base += 0 if understand else prompt + thought  # texts after it are read a second time
  earlier = 0 if understand else s.rounds - 1
  reads = 2 if NO_IMAGE in guidance_views(s.later) else 1  # of a thought after an image
  one_round = reads * thought + _image_slots(config, s, s.height, s.width) if earlier else 0
  window = min(earlier, s.window or s.rounds)
  if s.cache_size is not None:
    window = min(window, (s.cache_size - base) // max(one_round, 1))
    need = base + one_round
    if s.cache_size < need:
      raise ValueError(f"cache_size {s.cache_size} is too small: these settings need at least "
                       f"{need} slots a row; raise cache_size, or lower think_limit or the size")
  return s.cache_size or base + one_round * window, window


def _image_slots(config, settings, height, width, vae=True):
  """Slots that an image takes once it is read back, each split with its ends."""
  size = settings.vae_transform.size(width, height)
  slots = 0
  if vae:
    slots = _tokens("vae_transform", settings, size, config.pixel_stride,
                    config.max_latent_size) + 2
  size = settings.vit_transform.size(*size)
  return slots + 2 + _tokens("vit_transform", settings, size, config.vit.patch_size,
                             config.vit.grid_size)


def _tokens(name, settings, size, stride, grid):
  """Tokens of an image of `size`, which the transform `name` makes."""
  if getattr(settings, name).stride % stride:
    raise ValueError(f"{name}.stride is {getattr(settings, name).stride}, but must be a multiple "
                     f"of {stride} pixels, one token of this model")
  if max(size) > stride * grid:
    raise ValueError(f"{name} reads images back at {size[0]} x {size[1]} pixels, but this model "
                     f"has positions for {stride * grid} a side: lower {name}.max_size and "
                     f"{name}.min_size (with --config.{name}.min_size=N and so on)")
  return (size[0] // stride) * (size[1] // stride)
