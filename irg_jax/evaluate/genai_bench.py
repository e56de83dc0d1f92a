"""GenAI-Bench: VQAScores of the prompts to means by skill, and over all skills together."""

import math

import numpy as np

BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal", "advanced")
OVERALL = ("basic", "advanced", "all")
TAG_GROUPS = {"basic": BASIC, "advanced": ADVANCED, "overall": OVERALL}


def aggregate(scores: dict[str, float | None], skills: dict[str, list[int]]) -> dict:
  """Mean and unbiased deviation of each tag, and of the union of all tags' prompts ("all").

  Args:
    scores: {prompt id of five digits: score from 0 to 1, or None where there is none}.
    skills: {tag: [number of a prompt, ...]}, the official genai_skills.json. Prompts are found
      by their id, not by their place, so that files that count from 1 work as well.

  Returns:
    {"overall": the score of "all", "tags": {tag: {"score", "deviation", "count": of prompts with
     a score, "absent": of those without}}, "items": prompts with a score, "untagged": of those
     the ones without a tag, which "all" leaves out}.
  """
  ids = {tag: list(dict.fromkeys(map(prompt_id, numbers))) for tag, numbers in skills.items()}
  union = list(dict.fromkeys(i for members in ids.values() for i in members))
  tags = {tag: _statistics(scores, members) for tag, members in (ids | {"all": union}).items()}
  tagged, scored = set(union), [i for i, value in scores.items() if value is not None]
  return {
      "overall": tags["all"]["score"],
      "tags": tags,
      "items": len(scored),
      "untagged": sum(i not in tagged for i in scored),
  }


def prompt_id(number) -> str:
  """The id of a prompt number, or the id itself: five digits."""
  return f"{int(number):05d}"


def check_skills(skills: dict, known_ids, path="genai_skills.json") -> None:
  """Checks that the file of skills speaks of prompts that exist.

  Raises:
    ValueError: a tag is no list of numbers, a published tag is absent, or an id is unknown.
  """
  known = set(known_ids)
  for tag, numbers in skills.items():
    if not isinstance(numbers, list):
      raise ValueError(f"{path}: tag {tag!r} is not a list of prompt numbers")
    if unknown := [n for n in numbers if prompt_id(n) not in known]:
      raise ValueError(f"{path}: tag {tag!r} names prompt {unknown[0]}, which the prompt file "
                       "does not have; do the two files belong together?")
  if absent := [t for t in (*BASIC, *ADVANCED) if t not in skills]:
    raise ValueError(f"{path}: has no tag {absent[0]!r}")


def printed(tag: dict) -> tuple[str, str]:
  """Mean and deviation as the official script prints them."""
  show = lambda value: "nan" if value is None else f"{value:.2f}"
  return show(tag["score"]), show(tag["deviation"])


def table_text(result: dict, model: str) -> str:
  """The three tables of the official script."""
  lines = []
  for group, tags in TAG_GROUPS.items():
    cells = [" +- ".join(printed(result["tags"][tag])) for tag in tags]
    lines += [f"Tag Group: {group} (metric performance)",
              f"{'Model':<20}" + " ".join(f"{tag:<20}" for tag in tags),
              f"{model:<20}" + " ".join(f"{cell:<20}" for cell in cells)]
  return "\n".join(lines) + "\n"


def _statistics(scores, ids):
  # VQAScores are float32 upstream: the same rounding here makes the same means.
  found = np.array([scores[i] for i in ids if scores.get(i) is not None], np.float32)
  values = found.astype(np.float64)
  deviation = float(values.std(ddof=1)) if len(values) > 1 else None
  mean = float(values.mean()) if len(values) else None
  if mean is not None and not math.isfinite(mean):
    raise ValueError("a score is not a finite number")
  return {"score": mean, "deviation": deviation, "count": len(values),
          "absent": len(ids) - len(values)}
