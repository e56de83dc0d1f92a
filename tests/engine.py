"""A stand-in for `irg.generate`, and tiny weights, for tests of what is around drawing."""

import hashlib

import jax
import numpy as np

from conftest import ROOT
from irg_jax import commands
from irg_jax.generate import irg, settings
from irg_jax.generate.settings import Defaults, Settings
from irg_jax.images import ImageTransform

TINY = Settings(height=32, width=48, steps=3, think_limit=5, max_prompt_tokens=256,
                vae_transform=ImageTransform(128, 32, 16),
                vit_transform=ImageTransform(112, 28, 14))
SYSTEM_PROMPT = "Think, then draw."


def make_checkpoint(folder):
  """Random weights with one layer, whose defaults are `TINY` and `SYSTEM_PROMPT`."""
  assert commands.main(["init", "--config", str(ROOT / "configs" / "tiny.py"), "--out", str(folder),
                        "--config.model.llm.num_layers=1"]) == 0
  settings.write_defaults(folder, Defaults(system_prompt=SYSTEM_PROMPT, settings=TINY))
  return folder


def stand_in(model, params, tokenizer, prompts, *, seeds, settings, system_prompt, images,
             on_progress, done, on_result, satisfied):
  """Like `irg.generate`; images and thoughts follow from all that it is called with."""
  settings.validate(model.config)
  mesh, drawn = jax.sharding.get_mesh(), []
  for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
    used = [prompt, int(seed), settings, system_prompt, model.config, mesh.shape,
            [x.tobytes() for x in images[i]] if images else None]
    digest = hashlib.sha256(repr(used).encode()).digest()
    image = np.resize(np.frombuffer(digest, np.uint8), (settings.height, settings.width, 3))
    thought = irg.Thought(digest.hex()[:9]) if settings.think else irg.Thought()
    drawn.append(irg.Trajectory(prompt, [
        irg.Round(thought, None, image + n, {"draw": 1.0}) for n in range(settings.rounds)]))
  return drawn
