"""Interleaving Reasoning Generation: a model that thinks, draws, looks, and draws again.

    irg_jax.keep_programs()                         # compiles once for all processes, as `irg` does
    irg = irg_jax.load()                            # or load("weights/irg-7b")
    result = irg.generate("two red circles left of a blue star", seed=0)
    result.thoughts, result.images                  # of each round
    result.save("out/stars")                        # images, trace.json, trace.html
    irg.edit("make the sky stormy", "photo.png")    # an image, drawn anew
    irg.ask("What is in the image?", "photo.png")   # text

`help(irg_jax.load)` and `help(irg.generate)` list what can be set. The command line is `irg`.
"""

import importlib

__version__ = "0.1.0"
# Imported on first use: JAX takes seconds, and `irg --help` needs none.
_PLACES = {"load": "irg_jax.generate.generator", "keep_programs": "irg_jax.compiled"}


def __getattr__(name):
  if name in _PLACES:
    return getattr(importlib.import_module(_PLACES[name]), name)
  raise AttributeError(f"module 'irg_jax' has no attribute {name!r}")


def __dir__():
  return sorted((*globals(), *_PLACES))
