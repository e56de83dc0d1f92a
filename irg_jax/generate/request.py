"""What one `irg generate` asks for, checked as far as that costs nothing."""

import dataclasses
import pathlib
import time

from irg_jax import config as config_lib
from irg_jax import sharding
from irg_jax.generate import defaults
from irg_jax.generate.prompts import SYSTEM_PROMPT
from irg_jax.generate.settings import Settings

# Flags that only set fields of the configuration: flag -> the fields it sets.
SHORTHANDS = {
    "rounds": ("rounds",),
    "steps": ("steps",),
    "think_limit": ("think_limit",),
    "temperature": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "text_scale": ("first.text_scale", "later.text_scale"),
    "image_scale": ("later.image_scale",),
    "window": ("window",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """Everything a run needs; nothing here has touched the weights.

  Attributes:
    checkpoint: folder of the weights.
    prompts: one image each; prompt number i takes the seed `seed + i`.
    image: image that every prompt edits, or None.
    out: folder of the results; it may not exist yet.
    settings: how to generate.
    system_prompt: read before every prompt; may be empty.
    seed: seed of the first prompt.
    batch_size: prompts that run side by side.
    mesh: mesh sizes by axis name, or None for all devices on one axis.
    dtype: dtype of the activations, or None for the checkpoint's own.
  """

  checkpoint: pathlib.Path
  prompts: tuple[str, ...]
  image: pathlib.Path | None
  out: pathlib.Path
  settings: Settings
  system_prompt: str
  seed: int
  batch_size: int
  mesh: dict[str, int] | None
  dtype: str | None


def from_args(args, overrides) -> Request:
  """Builds the request from parsed flags and `--config.field=value` overrides.

  Raises:
    ValueError: names the flag or the file.
  """
  checkpoint = _checkpoint(args.checkpoint)
  if args.image is not None and not args.image.is_file():
    raise ValueError(f"--image {args.image}: no such file")
  if args.batch_size < 1:
    raise ValueError(f"--batch-size {args.batch_size}: must be 1 or more")
  unknown = set(args.mesh or ()) - set(sharding.MESH_AXES)
  if unknown:
    raise ValueError(f"--mesh: unknown mesh axes {sorted(unknown)}; known: {sharding.MESH_AXES}")
  prompts = read_prompts(args.prompts, args.prompts_file)
  if not 0 <= args.seed <= 2**32 - len(prompts):
    raise ValueError(f"--seed {args.seed}: must be 0 or more, and that of the last prompt "
                     f"(SEED + {len(prompts) - 1}) below 2**32")
  default, system_prompt = defaults.read(checkpoint)
  return Request(
      checkpoint=checkpoint,
      prompts=prompts,
      image=args.image,
      out=args.out or pathlib.Path("out", time.strftime("%Y%m%d-%H%M%S")),
      settings=config_lib.read(default, args.config,
                               [*overrides, *shorthand_overrides(args)]),
      system_prompt=read_system_prompt(args.system_prompt_file, system_prompt),
      seed=args.seed,
      batch_size=args.batch_size,
      mesh=args.mesh,
      dtype=args.dtype,
  )


def _checkpoint(path):
  """The folder that was named, or the one that comes with this package."""
  if path is None and not defaults.CHECKPOINT.is_dir():
    raise ValueError("--checkpoint: give the folder of your weights; this copy of the package "
                     "comes without the mini world's")
  path = path or defaults.CHECKPOINT
  if not path.is_dir():
    raise ValueError(f"--checkpoint {path}: no such folder")
  return path


def shorthand_overrides(args) -> list[str]:
  """The short flags that were given, as "field=value" texts."""
  fields = {f: getattr(args, flag) for flag, names in SHORTHANDS.items() for f in names}
  if args.size is not None:
    fields["width"], fields["height"] = args.size
  if args.greedy:
    fields["temperature"] = 0.0
  if args.no_think:
    fields["think"] = False
  return [f"{field}={value}" for field, value in fields.items() if value is not None]


def read_prompts(arguments, path=None) -> tuple[str, ...]:
  """The prompts of the command line, then those of a file (one a line, blank lines skipped).

  Raises:
    ValueError: no prompt at all, a blank one, an unreadable file or one that is not UTF-8.
  """
  if any(not p.strip() for p in arguments):
    raise ValueError("PROMPT: a prompt is empty; leave it out or write what to draw")
  prompts = [p.strip() for p in arguments]
  if path is not None:
    lines = [line.strip() for line in _read_text("--prompts-file", path).splitlines()]
    if not any(lines):
      raise ValueError(f"--prompts-file {path}: holds no prompt; write one a line")
    prompts += [line for line in lines if line]
  if not prompts:
    raise ValueError("nothing to draw: give a PROMPT or --prompts-file FILE")
  return tuple(prompts)


def read_system_prompt(path, default: str = SYSTEM_PROMPT) -> str:
  """The text of the file, or `default` where `path` is None.

  Raises:
    ValueError: an unreadable file or one that is not UTF-8.
  """
  # An empty file is a choice: no system prompt at all.
  text = default if path is None else _read_text("--system-prompt-file", path)
  return text.strip()


def _read_text(flag, path):
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{flag} {path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e
  except OSError as e:
    raise ValueError(f"{flag} {path}: cannot be read ({e.strerror})") from e
