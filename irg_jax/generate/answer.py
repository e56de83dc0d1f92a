"""Text output: chat and questions about images, by the phases of `irg` (docs/spec.md, section 7).
"""

import numpy as np

from irg_jax import config as config_lib
from irg_jax.generate import irg
from irg_jax.generate.context import FULL, plan_answer
from irg_jax.generate.settings import Settings
from irg_jax.model.unified import UnifiedTransformer


def answer(model: UnifiedTransformer, params, tokenizer, conversations, *, seeds,
           settings: Settings = Settings(), system_prompt="", on_progress=None, on_text=None,
           room=irg.Room()) -> list[irg.Thought]:
  """Answers conversations in text; images are read by the ViT alone.

  Args:
    conversations: B questions, or lists of texts (of both sides) and images in their order, the
      same kinds and sizes of images for all: strings and uint8 [Y, X, 3].
    settings: `think_limit` limits the answer.
    others: as of `generate`.

  Raises:
    ValueError: settings or conversations that cannot work; before anything is computed.
  """
  config_lib.check(settings)
  rows = [list(c) if isinstance(c, (list, tuple)) else [c] for c in conversations]
  job = irg.prepare(model, params, tokenizer, [""] * len(rows), seeds=seeds, settings=settings,
                    system_prompt=system_prompt, on_progress=on_progress, on_text=on_text,
                    room=room)
  size = max(plan(model.config, tokenizer, settings, system_prompt, row) for row in rows)
  columns = _columns(job, rows)
  ctx = irg.open_context(job, size)
  for number, column in enumerate(columns):
    if isinstance(column, np.ndarray):
      ctx = irg.look(job, ctx, irg.encode(job, column, number, vae=False))
    else:
      ctx = irg.append(job, ctx, column, (FULL,))
  return irg.think(job, ctx, 0)


def plan(config, tokenizer, settings: Settings, system_prompt: str, parts) -> int:
  """Slots of the cache for a conversation of `answer`; ValueError if it does not fit."""
  counts = [len(tokenizer.encode(part)) for part in parts if not _is_image(part)]
  # Answers may be among several texts.
  limit = max(settings.max_prompt_tokens, settings.think_limit if len(counts) > 1 else 0)
  for number, count in enumerate(counts, 1):
    if count > limit:
      raise ValueError(f"text {number} of the conversation has {count} tokens, but the cache is "
                       f"made for {limit}: shorten it or raise max_prompt_tokens")
  return plan_answer(config, settings, len(tokenizer.encode(system_prompt)), counts,
                     [part.shape[:2] for part in parts if _is_image(part)])


def _columns(job, rows):
  """The first parts of all conversations, their second ones, ...: token ids or an image array."""
  kinds = [list(map(_is_image, row)) for row in rows]
  if not all(rows) or any(row != kinds[0] for row in kinds):
    raise ValueError(f"{len(rows)} conversations that are empty, or differ in the places of texts "
                     "and images: give each as many texts and images in one order")
  columns = []
  for is_image, column in zip(kinds[0], zip(*rows)):
    if is_image:
      images, = irg.check_images(column, column)
      columns.append(np.stack([job.settings.vae_transform(image) for image in images]))
    else:
      columns.append(list(map(job.tokenizer.encode, column)))
  return columns


def _is_image(part):
  return getattr(part, "ndim", 0) == 3
