"""Command-line flags and types of values that several verbs share."""

import argparse
import pathlib
import re

# Short flags of settings of generation: (flag, type, what stands for the value, help, fields).
_SHORT = (
    ("--rounds", int, "N", "rounds, one image each (2)", ("rounds",)),
    ("--steps", int, "N", "points of the flow schedule, N - 1 updates (50)", ("steps",)),
    ("--text-scale", float, "X", "text guidance of all rounds (4.0)",
     ("first.text_scale", "later.text_scale")),
    ("--image-scale", float, "X", "image guidance of the rounds after an image (2.0)",
     ("later.image_scale",)),
    ("--think-limit", int, "N", "longest thought in tokens ({think_limit})", ("think_limit",)),
    ("--temperature", float, "X", "sampling temperature of thoughts (0.3)", ("temperature",)),
    ("--top-k", int, "N", "sample from the N likeliest tokens; 0: all (0)", ("top_k",)),
    ("--top-p", float, "X", "sample from the likeliest tokens of this total probability (1.0)",
     ("top_p",)),
    ("--window", int, "N", "earlier rounds that a round can see (all)", ("window",)),
)
SHORTHANDS = {flag[2:].replace("-", "_"): fields for flag, *_, fields in _SHORT}


def new_parser(make, *args, **kwargs) -> argparse.ArgumentParser:
  """Calls `make`, such as `subparsers.add_parser`, for a parser that keeps line breaks in texts."""
  return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
              **kwargs)


def mesh(text: str) -> dict[str, int]:
  """Parses "data=2,fsdp=4" to sizes by axis name.

  Raises:
    argparse.ArgumentTypeError: another form, or an axis twice.
  """
  axes = [re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip()) for part in text.split(",")]
  if not all(axes) or len({a[1] for a in axes}) < len(axes):
    raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write data=2,fsdp=4")
  return {a[1]: int(a[2]) for a in axes}


def size(text: str) -> tuple[int, int]:
  """Parses "S" or "WxH" to (width, height).

  Raises:
    argparse.ArgumentTypeError: another form.
  """
  match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
  if not match:
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 1024 or 768x1024 (WxH)")
  width = int(match[1])
  return width, int(match[2] or width)


def count(text: str) -> int:
  """Parses an integer of at least 1.

  Raises:
    argparse.ArgumentTypeError: another text.
  """
  if not re.fullmatch(r"0*[1-9]\d*", text):
    raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
  return int(text)


def address(text: str) -> str:
  """Checks "HOST:PORT".

  Raises:
    argparse.ArgumentTypeError: another form.
  """
  if not re.fullmatch(r"\S+:\d+", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not an address; write host0:1234")
  return text


def add_hosts(parser) -> None:
  """Adds --process-id and --num-processes, for hosts that share the work in one folder."""
  parser.add_argument("--process-id", type=int, default=0, metavar="I",
                      help="number of this host, from 0 (default 0)")
  parser.add_argument("--num-processes", type=count, default=1, metavar="N",
                      help="number of hosts (default 1)")


def check_hosts(args) -> None:
  """Raises ValueError if --process-id is out of range."""
  if not 0 <= args.process_id < args.num_processes:
    raise ValueError(f"--process-id {args.process_id}: must be from 0 to {args.num_processes - 1}")


def check_mesh(sizes: dict[str, int] | None) -> None:
  """Raises ValueError if --mesh names an unknown axis."""
  from irg_jax import sharding
  unknown = set(sizes or ()) - set(sharding.MESH_AXES)
  if unknown:
    raise ValueError(f"--mesh: unknown mesh axes {sorted(unknown)}; known: {sharding.MESH_AXES}")


def add_shorthands(group, think_limit: int = 1000) -> None:
  """Adds the short flags; `think_limit` is the default to show for --think-limit."""
  for flag, kind, metavar, text, _ in _SHORT:
    group.add_argument(flag, type=kind, metavar=metavar, help=text.format(think_limit=think_limit))
  add = group.add_argument
  add("--size", type=size, metavar="S or WxH", help="pixels, multiples of 16 (1024)")
  add("--greedy", action="store_true", help="take the likeliest token: temperature 0")
  add("--no-think", action="store_true", help="generate images without thoughts")


def shorthand_overrides(args) -> list[str]:
  """Overrides ("field=value") by the short flags that are given."""
  fields = {f: getattr(args, flag) for flag, names in SHORTHANDS.items() for f in names}
  if args.size is not None:
    fields["width"], fields["height"] = args.size
  if args.greedy:
    fields["temperature"] = 0.0
  if args.no_think:
    fields["think"] = False
  return [f"{field}={value}" for field, value in fields.items() if value is not None]


def read_settings(args, overrides, checkpoint, default=None):
  """Reads settings and system prompt of generation from the checkpoint and all flags.

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
    ValueError: the file cannot be read or is not UTF-8; names the flag.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{flag} {path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e
  except OSError as e:
    raise ValueError(f"{flag} {path}: cannot be read ({e.strerror})") from e
