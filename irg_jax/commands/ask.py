"""`irg ask`: a question about images, or chat, answered in text."""

from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("ask", run=_run, help="answer a question about images, or chat")
  flags.add_generation(parser, images=False)


def _run(args, overrides):
  for image in args.image or ():
    if not image.is_file():
      raise ValueError(f"--image {image}: no such file")
  if not 0 <= args.seed < 2**32:
    raise ValueError(f"--seed {args.seed}: must be 0 or more and below 2**32")
  checkpoint = flags.checkpoint(args.checkpoint)
  settings, system_prompt = flags.read_settings(args, overrides, checkpoint)
  from irg_jax import compiled, weights
  from irg_jax.generate import answer, generator
  from irg_jax.generate.settings import check_prompts
  from irg_jax.progress import Progress
  from irg_jax.tokenizer import Speller, load_tokenizer
  question, = check_prompts([args.question])
  images, _ = generator.read_images(args.image or ())
  config = weights.read_config(checkpoint)
  answer.plan(config, load_tokenizer(checkpoint, config.llm.vocab_size), settings, system_prompt,
              [*images, question])
  options = flags.model_options(args)
  compiled.keep_programs()
  with Progress() as progress:
    loaded = generator.load(checkpoint, on_progress=progress, **options)
  speller = Speller()
  show = lambda text, whole=False: print(speller.piece(text, whole), end="", flush=True)
  show(loaded.ask(question, *images, seed=args.seed, settings=settings,
                  system_prompt=system_prompt, on_text=lambda _, texts: show(texts[0])), True)
  print()
