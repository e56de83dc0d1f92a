"""Writes docs/settings.md from the settings as they are declared: python docs/settings.py"""

import dataclasses
import pathlib

from irg_jax.config import ModelConfig
from irg_jax.generate.settings import Settings
from irg_jax.mini import run as mini_run
from irg_jax.reports.pages import table
from irg_jax.rl.settings import RlSettings
from irg_jax.serve.fields import ChatFields, ImageFields
from irg_jax.train.settings import TrainSettings

FILE = pathlib.Path(__file__).with_suffix(".md")
MINI = FILE.parents[1] / "configs" / "mini.py"

_TEXT = """\
# Settings

Every setting with its default, its range and its meaning. `python docs/settings.py` writes this
file from the code. A configuration file (`--config FILE` or `--config FILE:PRESET`, see
`configs/`) sets some of them, and `--config.FIELD=VALUE` sets one.

## Generation

Of `irg generate` and `irg eval generate`. A checkpoint's `generate.json` takes the place of these
defaults, and `irg eval generate` allows thoughts of 4096 tokens.

{generate}

## Server

Fields of requests to `irg serve` ([serve.md](serve.md)); where none is given, the server's settings
of generation hold, and its flags may bound a field further. First of both endpoints of images:

{images}

Of chats, beside `messages`, `modalities` and the fields of drawing above:

{chat}

## Training

Of `irg train`; the defaults are the recipe of the paper. The fields of `model` are listed below;
training has `model.dtype=bfloat16` and `model.remat=attention`.

{train}

## Learning from rewards

Of `irg rl` ([rl.md](rl.md)); `configs/rl.py` has presets. The fields of `model` are listed below.

{rl}

## Mini world

Of `irg mini run`. The sizes of its model are in `configs/mini.py`; the fields of
`generate` have the meaning and the range that they have above.

{mini}

## Model

Of `irg init`, and the group `model` of training; the defaults are BAGEL-7B-MoT.

{model}
"""


def render() -> str:
  """The text of docs/settings.md."""
  mini = [row for row in _rows(mini_run.load(MINI)) if row[0] != "`config`"]
  images, chat = _rows(ImageFields()), _rows(ChatFields())
  return _TEXT.format(generate=_table(_rows(Settings())), images=_table(images),
                      chat=_table([row for row in chat if row not in images]),
                      train=_table(_without(_rows(TrainSettings()), "model")),
                      rl=_table(_without(_rows(RlSettings()), "model")),
                      mini=_table(_without(mini, "model")), model=_table(_rows(ModelConfig())))


def _table(rows):
  return table(["setting", "default", "range", "meaning"], rows)


def _without(rows, group):
  return [row for row in rows if not row[0].startswith(f"`{group}.")]


def _rows(settings, prefix=""):
  rows = []
  for field in dataclasses.fields(settings):
    name, value = prefix + field.name, getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      rows += _rows(value, f"{name}.")
      continue
    items = value.items() if isinstance(value, dict) else [("", value)]
    rows += [_row(f"{name}.{key}".rstrip("."), item, field.metadata) for key, item in items]
  return rows


def _row(name, value, metadata):
  shown = "not set" if value is None else f"`{value!r}`"
  texts = {"low": "at least {}", "high": "at most {}", "above": "above {}"}
  limits = [text.format(metadata[bound]) for bound, text in texts.items()
            if metadata.get(bound) is not None]
  limits += [f"`{choice}`" for choice in metadata.get("choices", ())]
  return [f"`{name}`", shown, ", ".join(limits), metadata.get("doc", "")]


if __name__ == "__main__":
  FILE.write_text(render(), encoding="utf-8")
  print(f"wrote {FILE}")
