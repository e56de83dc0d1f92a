"""Interleaving Reasoning Generation: a model that thinks, draws, looks, and draws again.

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


def __getattr__(name):
  if name == "load":  # on first use: JAX takes seconds, and `irg --help` needs none
    return importlib.import_module("irg_jax.generate.generator").load
  raise AttributeError(f"module 'irg_jax' has no attribute {name!r}")


def __dir__():
  return sorted((*globals(), "load"))
