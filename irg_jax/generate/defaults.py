"""How a checkpoint is meant to be used: `generate.json` beside its weights, if there is one."""

import dataclasses
import json
import pathlib
import re

from irg_jax import config as config_lib
from irg_jax.storage import atomic_file
from irg_jax.generate.prompts import SYSTEM_PROMPT
from irg_jax.generate.settings import Settings

NAME = "generate.json"
CHECKPOINT = pathlib.Path(__file__).parents[1] / "mini" / "checkpoint"  # used when none is named


def write(folder, settings: Settings, system_prompt: str, words=(), note: str = "",
          dtype: str | None = None) -> None:
  """Writes settings and system prompt beside the weights in `folder`.

  Args:
    dtype: of the arithmetic, if it is not that of the weights as they are stored.
    words: all that prompts of its training are made of, if those are few.
    note: what the model knows, for whoever asks for something else (see `outside`).
  """
  content = {"system_prompt": system_prompt, "settings": dataclasses.asdict(settings),
             "words": sorted(words), "note": note, "dtype": dtype}
  with atomic_file(pathlib.Path(folder) / NAME) as path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read(folder, otherwise: Settings = Settings()) -> tuple[Settings, str]:
  """Settings and system prompt of a checkpoint; `otherwise` and the project's own where it says
  nothing.

  Raises:
    ValueError: the file is broken; names it.
  """
  try:
    content = _content(folder)
    if content is None:
      return otherwise, SYSTEM_PROMPT
    return config_lib.build(Settings, content["settings"]), str(content["system_prompt"])
  except (ValueError, TypeError, KeyError) as e:
    raise ValueError(f"{pathlib.Path(folder) / NAME}: not settings of irg generate "
                     f"({type(e).__name__}: {e}); remove the file to use the defaults") from e


def dtype(folder) -> str | None:
  """What the checkpoint in `folder` is to be computed in; None: as its weights are stored."""
  return (_content(folder) or {}).get("dtype")


def outside(folder, prompt: str) -> str | None:
  """What to tell about a prompt with words that the checkpoint in `folder` never saw, or None."""
  content = _content(folder) or {}
  known = set(content.get("words", ()))
  unknown = [w for w in re.findall(r"\w+", prompt.lower()) if w not in known]
  if not known or not unknown:
    return None
  return f"this model has never seen {', '.join(dict.fromkeys(unknown))}. {content.get('note', '')}"


def _content(folder):
  """What the file says; None where there is none."""
  path = pathlib.Path(folder) / NAME
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
