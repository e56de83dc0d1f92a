"""The model card of the mini world's checkpoint: what it learned, how, how well, and its limits."""

from irg_jax.mini import report_tables, world

_CARD = """\
# irg-mini

The default model of irg_jax: Interleaving Reasoning Generation in a world of coloured shapes. It
answers a prompt with a plan, an image of {size} x {size} pixels, a reflection on that image,
and a better image. It is small enough for two cores and is there to show the method, to try the
code, and to compare changes with; it is of no use for images of anything else.

## What it knows

One to {things} shapes ({shapes}) in {colors} on a ground of {grounds}; prompts in English of
GenEval's six kinds: one object, two objects, counting, colours, position, colours of each of two.

## How it was made

By `irg mini run`, with seed {seed}; the programs that painted its images and wrote the texts are
part of irg_jax, and no other data was used. {autoencoder}, then a base model on {base_rows} rows,
first in words alone and then with images, then that model's own plans and first images of
{trajectories} prompts, judged by a program, put into words and improved, as trajectories in six
modes for the two stages of training. Held out of all of it:
one colour of each shape, ten relations of two shapes, and the prompts of the test. Weights:
float32 in training, bfloat16 here, computed in float32.

## How well it does

{prompts} prompts, {test_pictures} images of each. An image is right if a program that reads it
sees exactly what was asked for. `irg mini report` makes the same tables (`scores.json` has every
figure).

{tables}

{notes}

## Limits

Prompts of the world it knows, in its words: `irg generate` says so where a word is new to it.
More than {things} things, other sizes, things that touch, and relations between more than two
groups were never trained. Reflections can be wrong in both directions; the tables say how often.

License: Apache-2.0, as irg_jax.
"""


def write(report: dict, settings: dict) -> str:
  """The card, Markdown.

  Args:
    report: from `report.build`, of the run that made the checkpoint.
    settings: of that run, as its mini.json has them.
  """
  tables = report_tables.tables(report)
  return _CARD.format(**settings | {
      "autoencoder": ("An autoencoder that was given, not trained by this run"
                      if settings.get("autoencoder") else
                      f"An autoencoder ({settings['vae_steps']} updates)"),
      "size": world.SIZE, "things": world.MAX_THINGS, "shapes": _listed(world.SHAPES),
      "colors": _listed(world.COLORS), "grounds": _listed(world.BACKGROUNDS),
      "prompts": settings["test_seen"] + settings["test_unseen"],
      "tables": "\n\n".join(report_tables.markdown_table(*table) for table in tables),
      "notes": report_tables.bullets(report_tables.notes(report))})


def _listed(words):
  *most, last = words
  return f"{', '.join(most)} and {last}"
