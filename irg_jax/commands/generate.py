"""`irg generate`: thoughts, images and traces of prompts."""

import contextlib
import dataclasses
import pathlib
import time

from irg_jax import runs
from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("generate", run=_run, help="generate thoughts and images")
  flags.add_generation(parser)


def _run(args, overrides):
  inputs = make_inputs(args, overrides)
  from irg_jax import compiled
  from irg_jax.generate import run
  compiled.keep_programs()
  with contextlib.nullcontext(inputs.out) if args.out else runs.own_folder(inputs.out) as out:
    run.run_generate(dataclasses.replace(inputs, out=out))


def make_inputs(args, overrides):
  """Checks the parsed flags and returns them as `generate.run.Inputs`.

  Raises:
    ValueError: names the flag or the file.
  """
  checkpoint = flags.checkpoint(args.checkpoint)
  for image in args.image or ():
    if not image.is_file():
      raise ValueError(f"--image {image}: no such file")
  if args.batch_size < 1:
    raise ValueError(f"--batch-size {args.batch_size}: must be 1 or more")
  prompts = _read_prompts(args.prompts, args.prompts_file)
  if not 0 <= args.seed <= 2**32 - len(prompts):
    raise ValueError(f"--seed {args.seed}: must be 0 or more, and that of the last prompt "
                     f"(SEED + {len(prompts) - 1}) below 2**32")
  settings, system_prompt = flags.read_settings(args, overrides, checkpoint)
  from irg_jax.generate.run import Inputs
  return Inputs(
      checkpoint=checkpoint, prompts=prompts, images=tuple(args.image or ()),
      out=args.out or pathlib.Path("out", time.strftime("%Y%m%d-%H%M%S")),
      settings=settings, system_prompt=system_prompt, seed=args.seed, batch_size=args.batch_size,
      **flags.model_options(args))


def _read_prompts(arguments, path) -> tuple[str, ...]:
  """The prompts of the command line, then those of a file."""
  from irg_jax.generate.settings import check_prompts
  from irg_jax.tokenizer import LONGEST_TEXT
  lines = [] if path is None else flags.read_text("--prompts-file", path).split("\n")
  if (longest := max(map(len, lines), default=0)) > LONGEST_TEXT:
    raise ValueError(f"--prompts-file {path}: line {[*map(len, lines)].index(longest) + 1} has "
                     f"{longest} characters, more than {LONGEST_TEXT}; shorten it")
  found = [line.strip() for line in lines if line.strip()]
  if path is not None and not found:
    raise ValueError(f"--prompts-file {path}: holds no prompt; write one a line")
  if not arguments and not found:
    raise ValueError("no prompt: give a PROMPT or --prompts-file FILE")
  return check_prompts([*arguments, *found])
