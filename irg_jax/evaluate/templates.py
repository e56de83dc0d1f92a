"""The words in which a judge is asked. Each benchmark's are one named value, none is hidden.

The criteria, what is filled in, and the form of the answer are the benchmarks'; the wording is
this project's. Who wants an official wording gives a file of it: a JSON object with "user" and,
if there is one, "system", and the same {fields}.
"""

import dataclasses
import json
import re


@dataclasses.dataclass(frozen=True)
class Template:
  """Attributes: the text of the `user` turn and of the `system` role, with {fields} to fill."""

  user: str
  system: str = ""

  def fill(self, **fields) -> tuple[str, str]:
    """The user's and the system's text. What is filled in is not looked through for fields."""
    put = lambda match: str(fields.get(match[1], match[0]))
    return tuple(re.sub(r"\{(\w+)\}", put, text) for text in (self.user, self.system))


WISE = Template(
    system="You grade pictures and you are hard to please. Only what can be seen counts.",
    user="""\
Somebody drew this picture for the prompt below. The explanation tells what a viewer who knows \
the subject expects to see. Grade the picture on three scales, each for itself, with 0, 1 or 2.

Consistency: is what the prompt means, by the explanation, in the picture?
  0: the main thing is absent or wrong. 1: it is there in part. 2: it is there, with every detail.
Realism: could it be a photograph of something that obeys physics, in materials, light, \
proportions and space?
  0: it plainly could not. 1: it could, but for faults that one notices. 2: one finds no fault.
Aesthetic Quality: composition, colour, sharpness, and the pleasure of looking at it.
  0: unpleasant or botched. 1: ordinary. 2: outstanding.

Most pictures do not earn a 2 on any scale. Where you hesitate between two grades, give the lower.

Prompt: "{prompt}"
Explanation: "{explanation}"

Answer in exactly three lines, each ending in its grade, without anything before or after:
Consistency: 0, 1 or 2
Realism: 0, 1 or 2
Aesthetic Quality: 0, 1 or 2""")

TIIF = Template(
    system="You check pictures against questions and report what you see, not what is likely.",
    user="""\
Look closely at the picture, then answer these {count} questions, one a line:
{questions}

Write {count} lines, the first for the first question and so on. The first word of every line is \
yes or no, in plain letters with nothing before it, and after it comes why, in the same line. \
Write nothing else.""")

GENAI_BENCH = Template('Is "{prompt}" what this picture shows? Reply with one word, Yes or No.')

ONEIG_ALIGNMENT = Template("{question}\nReply with one word, Yes or No, and no full stop.")

ONEIG_TEXT = Template("""\
Write down all the text that can be read in this picture, spelled as it is there, and nothing of \
your own. If there is none, write: No text recognized.""")

# By name, as --template takes them, with the fields that a wording cannot do without.
BUILT_IN = {
    "wise": (WISE, ("prompt", "explanation")),
    "tiif": (TIIF, ("questions",)),
    "genai_bench": (GENAI_BENCH, ("prompt",)),
    "oneig_alignment": (ONEIG_ALIGNMENT, ("question",)),
    "oneig_text": (ONEIG_TEXT, ()),
}


def load(path, name: str) -> Template:
  """The wording in a file, for the questions that `name`, a key of BUILT_IN, stands for.

  Raises:
    ValueError: it is no such file, or a field is not asked for in it.
  """
  try:
    with open(path, encoding="utf-8") as file:
      entry = json.load(file)
    template = Template(**entry)
  except (OSError, ValueError, TypeError) as e:
    raise ValueError(f"--template {path}: must be a JSON file with an object of \"user\" and, if "
                     f"wanted, \"system\" ({e})") from e
  if not isinstance(template.user, str) or not isinstance(template.system, str):
    raise ValueError(f"--template {path}: \"user\" and \"system\" must be texts")
  for field in BUILT_IN[name][1]:
    if f"{{{field}}}" not in template.user:
      raise ValueError(f"--template {path}: the user's text has no {{{field}}}, which is to be "
                       f"put into it for {name}")
  return template
