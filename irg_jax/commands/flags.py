"""Command-line flags and types of values that several verbs share."""

import argparse
import pathlib
import re

# Short flags that only set fields of `generate.settings.Settings`: flag -> fields.
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


def new_parser(make, *args, **kwargs) -> argparse.ArgumentParser:
  """Makes a parser by `make`, such as `subparsers.add_parser`; descriptions keep their lines."""
  return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
              **kwargs)


def mesh(text: str) -> dict[str, int]:
  """Sizes by axis name of "data=2,fsdp=4".

  Raises:
    argparse.ArgumentTypeError: not of that form, or an axis twice.
  """
  axes = [re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip()) for part in text.split(",")]
  if not all(axes) or len({a[1] for a in axes}) < len(axes):
    raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write data=2,fsdp=4")
  return {a[1]: int(a[2]) for a in axes}


def size(text: str) -> tuple[int, int]:
  """Width and height of "S" or "WxH".

  Raises:
    argparse.ArgumentTypeError: not of that form.
  """
  match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
  if not match:
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 1024 or 768x1024 (WxH)")
  width = int(match[1])
  return width, int(match[2] or width)


def count(text: str) -> int:
  """A whole number, 1 or more.

  Raises:
    argparse.ArgumentTypeError: something else.
  """
  if not re.fullmatch(r"0*[1-9]\d*", text):
    raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
  return int(text)


def address(text: str) -> str:
  """HOST:PORT.

  Raises:
    argparse.ArgumentTypeError: not of that form.
  """
  if not re.fullmatch(r"\S+:\d+", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not an address; write host0:1234")
  return text


def add_hosts(parser) -> None:
  """--process-id and --num-processes, of hosts that share work through a common folder."""
  parser.add_argument("--process-id", type=int, default=0, metavar="I",
                      help="of this host, from 0 (default 0)")
  parser.add_argument("--num-processes", type=count, default=1, metavar="N",
                      help="hosts (default 1)")


def check_hosts(args) -> None:
  """Raises ValueError where there is no such host."""
  if not 0 <= args.process_id < args.num_processes:
    raise ValueError(f"--process-id {args.process_id}: must be from 0 to {args.num_processes - 1}")


def check_mesh(sizes: dict[str, int] | None) -> None:
  """Raises ValueError where --mesh names an axis that does not exist."""
  from irg_jax import sharding
  unknown = set(sizes or ()) - set(sharding.MESH_AXES)
  if unknown:
    raise ValueError(f"--mesh: unknown mesh axes {sorted(unknown)}; known: {sharding.MESH_AXES}")


def add_shorthands(group, think_limit: int = 1000) -> None:
  """Adds the short flags of `SHORTHANDS`; `think_limit` is the default to show."""
  add = group.add_argument
  add("--rounds", type=int, metavar="N", help="images of a prompt (2)")
  add("--size", type=size, metavar="S or WxH", help="pixels, multiples of 16 (1024)")
  add("--steps", type=int, metavar="N", help="points of the schedule; N - 1 updates (50)")
  add("--text-scale", type=float, metavar="X", help="text guidance, every round (4.0)")
  add("--image-scale", type=float, metavar="X",
      help="image guidance, rounds that have seen an image (2.0)")
  add("--think-limit", type=int, metavar="N", help=f"tokens of a thought ({think_limit})")
  add("--temperature", type=float, metavar="X", help="of the thoughts (0.3)")
  add("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens; 0: all (0)")
  add("--top-p", type=float, metavar="X", help="sample from this share of probability (1.0)")
  add("--greedy", action="store_true", help="take the likeliest token: temperature 0")
  add("--no-think", action="store_true", help="draw without thinking")
  add("--window", type=int, metavar="N", help="keep only the last N rounds in view (all)")


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


def read_settings(args, overrides, checkpoint, default=None):
  """Settings and system prompt of generation, from the checkpoint and all flags.

  Args:
    default: `generate.settings.Settings` for a checkpoint without generate.json.

  Raises:
    ValueError: names the flag or the file.
  """
  from irg_jax import config
  from irg_jax.generate.settings import Settings, read_defaults
  defaults = read_defaults(checkpoint, default or Settings())
  settings = config.read(defaults.settings, args.config, [*overrides, *shorthand_overrides(args)])
  prompt = defaults.system_prompt
  if args.system_prompt_file is not None:  # an empty file is a choice: no system prompt at all
    prompt = read_text("--system-prompt-file", args.system_prompt_file)
  return settings, prompt.strip()


def read_text(flag: str, path) -> str:
  """Reads the UTF-8 text file that a flag names.

  Raises:
    ValueError: an unreadable file or one that is not UTF-8; names the flag.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{flag} {path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e
  except OSError as e:
    raise ValueError(f"{flag} {path}: cannot be read ({e.strerror})") from e
