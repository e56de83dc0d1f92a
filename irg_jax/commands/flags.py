"""Parser, flags and types of values that several verbs share.

A function for `type=` raises argparse.ArgumentTypeError if the text has another form.
"""

import argparse
import pathlib
import re
import tomllib

from irg_jax import hub, storage
from irg_jax.messages import guess

_HELP = tomllib.loads(pathlib.Path(__file__).with_name("help.toml").read_text(encoding="utf-8"))
# Metavars that stand for a path.
_PATHS = ("DIR", "FILE", "FILE[:PRESET]", "SRC", "DST", "PATH", "OUT")
# Verbs whose paths may be in buckets, but for --config, which is a program.
_IN_BUCKETS = tuple(f"irg {verb}" for verb in (
    "generate", "ask", "serve", "demo", "convert", "init", "train", "data", "fetch", "eval", "rl"))


def rounds(text: str) -> str:
  """Checks a number, "auto" or "auto:N", see `generate.settings.expand`."""
  return _matched(text, r"-?\d+|auto(:[1-9]\d*)?", "a number of rounds; write 3, auto or auto:6")[0]


# Short flags of settings of generation: (name, type, help, default of `generate.settings`).
_SHORT = (
    ("rounds", rounds, "rounds, one image each; auto or auto:N: until nothing falls short", 2),
    ("steps", int, "points of the flow schedule, N - 1 updates", 50),
    ("text_scale", float, "text guidance of all rounds", 4.0),
    ("image_scale", float, "image guidance of the rounds after an image", 2.0),
    ("think_limit", int, "longest thought, or answer, in tokens", 1000),
    ("temperature", float, "sampling temperature of text", 0.3),
    ("top_k", int, "sample from the N likeliest tokens; 0: all", 0),
    ("top_p", float, "sample from the likeliest tokens of this total probability", 1.0),
    ("window", int, "earlier rounds that a round can see", None),
)
FAST = 3  # forecast.interval of --fast
_TEXT = ("think_limit", "temperature", "top_k", "top_p")  # those that matter for an answer
# Fields of the settings that a short flag sets.
SHORTHANDS = {name: (name,) for name, *_ in _SHORT} | {
    "text_scale": ("first.text_scale", "later.text_scale"), "image_scale": ("later.image_scale",),
    "think": ("think",), "fast": ("forecast.interval",)}


class Parser(argparse.ArgumentParser):
  """Parser of `prog`, "irg VERB", with the texts and flags of help.toml.

  It calls `run(args, overrides)`; a parser of subcommands alone shows its help. A flag whose
  metavar stands for a path has the type `path`. Parsers of subcommands are of the same class.
  """

  before_help = None  # function of the arguments, called where --help is one of them

  def __init__(self, *, prog, run=None, **kwargs):
    texts = _HELP.get(prog, {}) | kwargs
    table = texts.pop("flags", {})
    super().__init__(prog=prog, allow_abbrev=False, **texts,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    self.add_table(table)
    if run is not None:
      self.set_defaults(run=run)

  def add_shared(self, name):
    """Adds the flags of the section `name` of help.toml, which several verbs share."""
    self.add_table(_HELP[name]["flags"])

  def add_table(self, table, **values):
    """Adds the flags of a TOML file; `values` are for the braces in their help."""
    for name, options in table.items():
      kind = {"type": _TYPES[options["type"]]} if "type" in options else {}
      lists = {key: tuple(v) for key, v in options.items() if isinstance(v, list)}
      self.add_argument(name, **options | lists | kind | {"help": options["help"].format(**values)})

  def add_subparsers(self, **kwargs):
    self.set_defaults(run=lambda *_: self.print_help())
    return super().add_subparsers(**kwargs)

  def parse_known_args(self, args=None, namespace=None):
    if self.before_help and {"-h", "--help"} & set(args):
      self.before_help(args)
    parsed, unknown = super().parse_known_args(args, namespace)
    if unknown:
      near = guess(unknown[0].split("=")[0], self._option_string_actions) if (
          unknown[0].startswith("-")) else "; words without a flag stand together"
      self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return parsed, unknown

  def error(self, message):
    self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

  def _check_value(self, action, value):  # argparse's own lists the choices alone
    if action.choices is not None and value not in action.choices:
      known = ", ".join(map(str, action.choices))
      raise argparse.ArgumentError(
          action, f"invalid choice: {value!r}{guess(value, action.choices)}; known: {known}")

  def add_argument(self, *names, **kwargs):
    if kwargs.get("metavar") in _PATHS:
      anywhere = self.prog.startswith(_IN_BUCKETS) and names[0] != "--config"
      kwargs.setdefault("type", path if anywhere else local_path)
    return super().add_argument(*names, **kwargs)


def path(text: str) -> pathlib.Path:
  """Parses a path, see `storage.path`."""
  try:
    return storage.path(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def local_path(text: str) -> pathlib.Path:
  """Parses a path of this machine."""
  try:
    return storage.local_path(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def mesh(text: str) -> dict[str, int]:
  """Parses "data=2,fsdp=4" to sizes by axis name."""
  axes = [re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip()) for part in text.split(",")]
  if not all(axes) or len({a[1] for a in axes}) < len(axes):
    raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write data=2,fsdp=4")
  return {a[1]: int(a[2]) for a in axes}


def _matched(text, pattern, wanted):
  match = re.fullmatch(pattern, text)
  if not match:
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
  return match


def size(text: str) -> tuple[int, int]:
  """Parses "S" or "WxH" to (width, height)."""
  match = _matched(text, r"([1-9]\d*)(?:x([1-9]\d*))?", "a size; write 1024 or 768x1024 (WxH)")
  return int(match[1]), int(match[2] or match[1])


def count(text: str) -> int:
  """Parses an integer of at least 1."""
  return int(_matched(text, r"0*[1-9]\d*", "1 or more")[0])


def number(text: str) -> float:
  """Parses a finite number."""
  value = float(text)
  if not abs(value) < 1e38:
    raise argparse.ArgumentTypeError(f"{text} is not a finite number")
  return value


def seconds(text: str) -> float:
  """Parses a number above 0."""
  if not 0 < (value := float(text)) < 1e9:
    raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
  return value


def share(text: str) -> float:
  """Parses a number from 0 to 1."""
  value = float(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1; 1 % is 0.01")
  return value


def address(text: str) -> str:
  """Checks "HOST:PORT"."""
  return _matched(text, r"\S+:\d+", "an address; write host0:1234")[0]


# Types in the TOML files.
_TYPES = {kind.__name__: kind for kind in (int, float, count, mesh, seconds, share)}


def add_generation(parser, think_limit: int = 1000, images: bool = True) -> None:
  """Adds the flags of `read_settings`, and those of the model; without `images`, those for text.

  --help shows the defaults of the checkpoint that the command line names; `think_limit` is that of
  checkpoints without generate.json.
  """
  add = parser.add_argument
  add("--checkpoint", metavar="DIR", help="weights, in the published layout or Orbax; a "
      "generate.json there has the defaults (default: the mini world's, in the package)")
  add("--config", metavar="FILE", help="settings, like configs/generate.py")
  add("--system-prompt-file", metavar="FILE",
      help="replaces the system prompt; an empty file means none")
  add("--mesh", type=mesh, metavar="AXIS=N,...",
      help="devices by axis, such as data=2,fsdp=2,tensor=2 (default: tensor first, then data)")
  add("--dtype", choices=("bfloat16", "float32"),
      help="dtype of the arithmetic (default: the checkpoint's)")
  add_weights(add)
  add("--attention", choices=("auto", "dense", "chunked", "kernel"), default="auto",
      help="form of attention (default: by platform and length)")
  add_lora(add)
  group = parser.add_argument_group("short flags of settings")
  add = group.add_argument
  actions = {name: add(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (%(shown)s)",
                       metavar="X" if kind is float else "N")
             for name, kind, text, _ in _SHORT if images or name in _TEXT}
  if images:
    actions["size"] = add("--size", type=size, metavar="S or WxH",
                          help="pixels, multiples of 16 (%(shown)s)")
  parser.before_help = lambda args: _show_defaults(args, think_limit, group, actions)
  parser.before_help([])
  add("--greedy", dest="temperature", action="store_const", const=0.0,
      help="take the likeliest token: temperature 0")
  if images:
    add("--no-think", dest="think", action="store_const", const=False,
        help="generate images without thoughts")
    add("--fast", action="store_const", const=FAST,
        help="forecast most updates of an image: 2.4 times fewer passes (docs/cheaper.md)")


def add_weights(add) -> None:
  """Adds --weights by `add`, the `add_argument` of a parser."""
  add("--weights", choices=("int8",), help="int8: matrices of layers take one byte a number, with "
      "a scale for each output (default: as stored)")


def add_lora(add) -> None:
  """Adds --lora and --lora-scale by `add`, the `add_argument` of a parser."""
  add("--lora", metavar="DIR", help="adapters of irg train, or others in PEFT's files, to merge "
      "into the weights")
  add("--lora-scale", type=number, default=1.0, metavar="X",
      help="how much they count (default 1: as they were trained)")


def model_options(args) -> dict:
  """Arguments of `generator.load` by the flags of `add_generation`; ValueError names --lora."""
  return dict(mesh=args.mesh, dtype=args.dtype, attention=args.attention, lora=lora_folder(args),
              lora_scale=args.lora_scale, weights=args.weights)


def _show_defaults(args, think_limit, group, actions):
  """Fills the defaults of the checkpoint in `args` into the help; needs no JAX."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--checkpoint", nargs="?", type=storage.path)
  folder = parser.parse_known_args(args)[0].checkpoint or storage.SHIPPED
  values = {field: default for name, _, _, default in _SHORT for field in SHORTHANDS[name]} | {
      "think_limit": think_limit, "width": 1024, "height": 1024}
  try:
    values |= _flat(storage.read_json(folder / "generate.json").get("settings"))
    whose = "the mini world's, in the package" if folder == storage.SHIPPED else f"{folder}'s"
  except (ValueError, OSError):
    whose = "those of a checkpoint without generate.json"
  group.description = f"defaults in brackets: {whose}"
  for name, action in actions.items():
    found = (values[field] for field in SHORTHANDS.get(name, ("width", "height")))
    action.shown = ("x" if name == "size" else " and ").join(
        dict.fromkeys("all" if value is None else str(value) for value in found))


def _flat(fields: dict, prefix: str = "") -> dict:
  """Values by dotted name."""
  found = {}
  for name, value in fields.items() if isinstance(fields, dict) else ():
    found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return found


def read_settings(args, overrides, checkpoint, default=None):
  """Reads (settings, system prompt) of generation from the checkpoint and all flags.

  `default` holds the settings for a checkpoint without generate.json. ValueError names the flag or
  the file.
  """
  from irg_jax import config, sharding
  from irg_jax.generate.settings import Settings, expand, read_defaults
  if unknown := set(args.mesh or ()) - set(sharding.MESH_AXES):
    raise ValueError(f"--mesh: unknown mesh axes {sorted(unknown)}"
                     f"{guess(min(unknown), sharding.MESH_AXES)}; known: {sharding.MESH_AXES}")
  fields = {f: getattr(args, name, None) for name, names in SHORTHANDS.items() for f in names}
  fields["width"], fields["height"] = getattr(args, "size", None) or (None, None)
  if (fields["rounds"] or "").startswith("auto"):
    fields |= expand({"rounds": fields["rounds"]})
  short = [f"{field}={value}" for field, value in fields.items() if value is not None]
  defaults = read_defaults(checkpoint, default or Settings())
  settings = config.read(defaults.settings, args.config, [*overrides, *short])
  defaults.check(settings)
  prompt = defaults.system_prompt
  if args.system_prompt_file is not None:  # an empty file is a choice: no system prompt at all
    prompt = read_text("--system-prompt-file", args.system_prompt_file)
  return settings, prompt.strip()


def read_text(flag: str, path: pathlib.Path) -> str:
  """Reads a flag's text file, see `storage.read_text`; ValueError names the flag."""
  try:
    return storage.read_text(path)
  except ValueError as e:
    raise ValueError(f"{flag} {path}: {e}") from e
  except OSError as e:
    raise ValueError(f"{flag} {path}: cannot be read ({e.strerror})") from e


def checkpoint(path: pathlib.Path | None) -> pathlib.Path:
  """The folder of --checkpoint: by default that of the model in the package."""
  if path is None and not storage.SHIPPED.is_dir():
    raise ValueError("--checkpoint: give the folder of your weights; this copy of the package "
                     "comes without the mini world's")
  return weights_folder("--checkpoint", path or storage.SHIPPED)


def weights_folder(flag: str, path) -> pathlib.Path:
  """`folder`, or that of a checkpoint on the hub, see `hub.fetch`."""
  if hub.is_name(path):
    from irg_jax import weights
    return _fetch(flag, path, weights.needed, "model")
  return folder(flag, path)


def lora_folder(args) -> pathlib.Path | None:
  """The folder of --lora, which may be on the hub; None without the flag."""
  if args.lora is None or not hub.is_name(args.lora):
    return args.lora and folder("--lora", args.lora)
  from irg_jax.weights import peft
  return _fetch("--lora", args.lora, lambda files: [f for f in files if f in peft.FILES], "model")


def data_folder(flag: str, path) -> pathlib.Path:
  """`folder`, or that of a dataset on the hub, see `hub.fetch`."""
  if hub.is_name(path):
    from irg_jax.data import sources
    return _fetch(flag, path, sources.needed, "dataset")
  return folder(flag, path)


def _fetch(flag, path, choose, kind):
  try:
    return hub.fetch(str(path), choose, kind)
  except ValueError as e:
    raise ValueError(f"{flag} {e}") from e


def folder(flag: str, path: pathlib.Path) -> pathlib.Path:
  """Returns `path`; ValueError names the flag if it is no folder."""
  if not path.is_dir():
    raise ValueError(f"{flag} {path}: no such folder")
  return path


def check_hosts(args) -> None:
  """Raises ValueError if --process-id is out of range."""
  if not 0 <= args.process_id < args.num_processes:
    raise ValueError(f"--process-id {args.process_id}: must be from 0 to {args.num_processes - 1}")
