"""Model cards: README.md of a checkpoint folder, with what the files say of themselves."""

import math
import re

from irg_jax import runs, storage
from irg_jax.config import ModelConfig
from irg_jax.reports import pages
from irg_jax.weights import names


def write(folder, config: ModelConfig, dtype, run=None) -> None:
  """Writes README.md into a checkpoint folder, in place of one that is there.

  Args:
    folder: in the published layout.
    dtype: of the weights; None where each has its own.
    run: record file of the training run that made the weights, see `runs.read`.
  """
  folder = storage.path(folder)
  record = {} if run is None else runs.read(run, ("settings",))
  settings = record.get("settings", {})
  shown = {key: settings[key] for key in ("stage1", "stage2", "data", "seed") if key in settings}
  content = pages.render(
      "card.md", name=folder.absolute().name, facts=_facts(config, dtype),
      base=_hub_name(record.get("base")),
      settings=storage.json_text(shown).strip() if shown else None)
  storage.write_text(folder / "README.md", content)


def _hub_name(path):
  """The name on the hub of a checkpoint in the hub's cache; None for another folder."""
  found = re.search(r"models--([^/]+?)--([^/]+)", str(path))
  return found and "/".join(found.groups())


def _facts(config, dtype):
  """(label, value) of the card's table."""
  count = sum(math.prod(row.shape) for row in names.rows(config))
  llm = config.llm
  return [
      ("parameters", f"{count:,}"), ("dtype", dtype or "each parameter's own"),
      ("decoder", f"{llm.num_layers} layers, width {llm.hidden_size}, two experts"),
      ("largest image", f"{config.max_latent_size * config.pixel_stride} pixels a side"),
      ("layout", "llm_config.json, vit_config.json, ema.safetensors, ae.safetensors, tokenizer")]
