"""The reward "judge": what an endpoint in OpenAI's form says of an image, from 0 to 1.

The client is that of `irg eval score`: every answer is paid for once, and kept beside the run.
"""

import contextlib
import math
import pathlib
import tempfile

from irg_jax import storage
from irg_jax.evaluate import answers, questions
from irg_jax.evaluate import judge as judge_lib
from irg_jax.evaluate.answers import NoAnswer
from irg_jax.images import encode_image

_HIGHEST = 10
GRADE = questions.Template(
    user="The request for this image was:\n\n{prompt}\n\nGrade how well the image fulfils it: "
    "every thing that is asked for, their numbers, colours and places, and nothing that "
    "contradicts it; then its quality. Reason briefly, then end with a line \"Score: N\", where N "
    f"is a whole number from 0 (not at all) to {_HIGHEST} (completely).")
YES = questions.Template(
    user="The request for this image was:\n\n{prompt}\n\nDoes the image show exactly what is asked "
    "for? Answer with Yes or No.")


@contextlib.contextmanager
def opened(settings, out):
  """Yields the function; ValueError for an endpoint or a wording that cannot be."""
  options = settings.judge
  endpoint = questions.JudgeSettings(
      url=options.url, model=options.model, concurrency=options.concurrency)
  template = {"grade": GRADE, "probability": YES}[options.form]
  if options.template:
    template = questions.load_template(options.template, "judge", ("prompt",))
  with judge_lib.Judge(endpoint, storage.path(out) / judge_lib.CACHE) as opened_judge:
    yield _reward(opened_judge.ask, template, options.form == "probability")


def grade(text: str) -> int:
  """The grade in an answer; NoAnswer without one."""
  return answers.grades(text, {"score": "score"}, _HIGHEST)["score"]


def _reward(ask, template, probability):
  """The function; NaN where the judge did not answer."""
  def many(records, trajectories):
    with tempfile.TemporaryDirectory() as folder:
      asked = [_question(pathlib.Path(folder), i, record, trajectory.rounds[-1].image, template,
                         probability)
               for i, (record, trajectory) in enumerate(zip(records, trajectories))]
      return [_value(answer, probability) for answer in ask(asked)]

  one = lambda record, trajectory: many([record], [trajectory])[0]
  one.many = many
  return one


def _question(folder, number, record, image, template, probability):
  path = folder / f"{number}.png"
  path.write_bytes(encode_image(image))
  user, system = template.fill(prompt=record["prompt"])
  return questions.Question(f"rl/{number}", (path,), user, system, fault=_fault,
                            probability=probability)


def _fault(text):
  try:
    grade(text)
  except NoAnswer as e:
    return str(e)
  return None


def _value(answer, probability):
  if answer.error:
    return math.nan
  return answer.probability if probability else grade(answer.text) / _HIGHEST
