"""Figures that models other than a judge give, read from a file of JSON lines.

  {"round": 1, "part": "vqascore", "id": "00001", "values": [0.83]}          GenAI-Bench
  {"round": 1, "part": "reasoning", "id": "reasoning/000", "values": [0.21, ...]}   a cell each
  {"round": 1, "part": "style", "id": "anime/004", "values": [[0.5, 0.6], ...]}     CSD, encoder
  {"round": 1, "part": "diversity", "id": "text/000", "values": [0.31, ...]}        a pair each

The official models are clip-flant5-xxl (vqascore), LLM2CLIP-Openai-L-14-336 (reasoning), CSD and
OneIG-StyleEncoder (style: the largest similarity to the references of the style) and DreamSim
(diversity). Black cells have no value; a grid with fewer than two images has an empty list of
pairs.
"""

from irg_jax.evaluate import oneig
from irg_jax.evaluate import scorers
from irg_jax.evaluate import tally
from irg_jax.evaluate.judge_types import Answer

PARTS = {"genai_bench": ("vqascore",), "oneig": ("reasoning", "style", "diversity")}


def read(path, benchmark: str) -> dict[tuple[int, str, str], list[float]]:
  """{(round, part, prompt id): values} of a file; style's pairs become one number a cell.

  Raises:
    ValueError: names the file and the line: malformed, or the same thing twice.
  """
  found = {}
  for number, record in tally.read_lines(path):
    where = f"{path}, line {number}"
    try:
      key = record["round"], record["part"], record["id"]
      values = [oneig.style_cell(*v) if key[1] == "style" else v for v in record["values"]]
    except (KeyError, TypeError) as e:
      raise ValueError(f"{where}: must be an object with round, part, id and values, which are "
                       f"numbers, or pairs of them for style ({e!r})") from e
    if key[1] not in PARTS[benchmark]:
      raise ValueError(f"{where}: part {key[1]!r} is none of {', '.join(PARTS[benchmark])}")
    if bad := [v for v in values if not tally.is_number(v)]:
      raise ValueError(f"{where}: {bad[0]!r} is not a number")
    if key in found:
      raise ValueError(f"{where}: {key[2]} of round {key[0]} is there already")
    found[key] = values
  return found


def merged(groups, table: dict):
  """The groups (item, round, answers), with the measurements added to the answers."""
  for item, number, answers in groups:
    added = {(part, "values"): table[number, part, item.id]
             for part in PARTS["oneig"] if (number, part, item.id) in table}
    yield item, number, {**answers, **added}


def vqascores(run, table: dict):
  """Groups for GenAI-Bench from its measurements alone."""
  for item, number in ((i, n) for n in run.rounds for i in run.items):
    values = table.get((number, "vqascore", item.id))
    answer = Answer(f"{item.id}/r{number}", probability=values[0]) if values else None
    yield item, number, {(0, scorers.VQA): answer} if answer else {}


def nothing_asked(run):
  """Groups without any answer, for what measurements alone score."""
  return ((item, number, {}) for number in run.rounds for item in run.items)
