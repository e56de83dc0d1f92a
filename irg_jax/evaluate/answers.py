"""Answers of judges in words: grades, yes and no, transcriptions, and when a text is none of them.

  text -> spoken (without thoughts) -> plain (one form of signs) -> grades, yes_no or yes_nos

All readers raise `NoAnswer` rather than guess. A `Form` pairs such a reader with the reading of the
published script; docs/spec.md, section 9, compares the two.
"""

import dataclasses
import html
import json
import math
import re
import typing
import unicodedata

from irg_jax.reports.pages import short

LONGEST = 50_000  # characters of an answer, thoughts aside

_THOUGHT = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad)"
_LEFT, _RIGHT = r"(?:<|＜|&lt;)", r"(?:>|＞|&gt;)"
_MARKS = re.compile(
    rf"(?P<open>{_LEFT}\s*{_THOUGHT}(?:\s[^<>]{{0,80}})?{_RIGHT}|\[THINK\]|◁think▷|"
    rf"<\|begin_of_{_THOUGHT}\|>|<\|channel\|>\s*(?:analysis|commentary)|"
    r"\Aanalysis(?-i:(?=[A-Z])))|"
    rf"{_LEFT}\s*/\s*{_THOUGHT}\s*{_RIGHT}|\[/THINK\]|◁/think▷|<\|end_of_{_THOUGHT}\|>|"
    r"<\|channel\|>\s*final\s*<\|message\|>|assistantfinal", re.IGNORECASE)
_BOXES = re.compile(r"<answer>(.*?)(?:</answer>|\Z)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
                    re.IGNORECASE | re.DOTALL)
_BLOCKS = re.compile(r"</?(?:br|p|li|ul|ol|div|tr)\b[^<>]{0,80}>", re.IGNORECASE)
_INLINE = re.compile(r"</?(?:b|i|u|em|strong|span|code|mark|td|th)\b[^<>]{0,80}>", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)\s*\{([^{}]*)\}")
_EMPHASIS = re.compile(r"[*`$]|(?<!\w)_+|_+(?!\w)")

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SCALE = re.compile(rf"(?:/|\b(?:out of|scale of)\b)\s*({_NUMBER}|three|four|five|ten|a hundred)\b|"
                    rf"(?<![\w.])[01]\s*(?:-|–|to)\s*({_NUMBER})\b", re.IGNORECASE)
_LIST_GOES_ON = re.compile(r"\s*(?:or|to|and|[^\w\s(%+]+)\s*[0-9]", re.IGNORECASE)
_ENDED = re.compile(r"[\s.,;:!|)\]}\"'”]*")
_EXPLAINED = re.compile(r"\s*(?:(?:points?|pts?)\b)?\s*(?:$|[.,;:!()\[\]{}|\"'”–—]|-\s)",
                        re.IGNORECASE)
_GRADE_KEYS = ("score", "grade", "rating", "value", "points")
_LONE = re.compile(r"[\s(\[\"']*(?:[1-9][.)]\s+)?([0-9]+)[\s)\].,\"']*")

_LABEL = (r"(?:(?:so|thus|therefore|hence)[\s,]+)?(?:(?:the|my)\s+)?(?:final\s+)?"
          r"(?:answer|response|verdict|a)\b\s*[0-9]{0,3}\s*(?:is\b)?[\W_]*+")
_SAYS = re.compile(rf"[\W_]*+(?:[0-9]{{1,3}}[.):]\s*)?[\W_]*+(?:{_LABEL})?(yes|no)\b(.*)",
                   re.IGNORECASE)
_AFTER_QUESTION = re.compile(rf"(?>.*[?？])[\W_]*+(?:{_LABEL})?(yes|no)\b(.*)", re.IGNORECASE)
_AT_LAST = re.compile(r".*\b(?:answer|verdict)\s*(?:is|:)[\W_]*+(yes|no)([\W_]*+)", re.IGNORECASE)
_EITHER = re.compile(r"\s*(?:[/|]|,?\s*(?:or|and)\b)[\s\"']*(?:yes|not?)\b", re.IGNORECASE)
_STRONG = re.compile(r"[\s\"'”]*(?:$|[.,;:!)\]}(|–—]|-\s)")
_OTHERWISE = re.compile(
    r"[.,;:!–—-]\s*(?:(?:wait|actually|but|sorry|or)[\s,]+)*(yes|no)\s*(?:[.,;:!]|$)",
    re.IGNORECASE)
_NO_BECAUSE = re.compile(r"\s+(?:there|it|the|this|that|these|those|because|since|as)\b",
                         re.IGNORECASE)
_ITEM = (r"\(?\[?(?:q(?:uestion)?|a(?:nswer)?)?\s*#?[\"']?([0-9]{1,3})[\"']?\s*[.):\]-][\s)]*"
         r"(?![0-9])")
_AT_START = re.compile(rf"^[^\w\n(\[]*{_ITEM}", re.IGNORECASE | re.MULTILINE)
_INSIDE = re.compile(rf"(?:^|(?<=[\s,{{])){_ITEM}", re.IGNORECASE)
_KEYED = re.compile(r"[\"'](?:answer|response|verdict)[\"']\s*:\s*[\"']?(yes|no|true|false)\b",
                    re.IGNORECASE)
_UNLISTED = 0.005  # probability that the unlisted tokens may have for "no Yes listed" to mean 0
_SUBSTANTIAL = 0.5  # least share of yes and no among the tokens that are no blank


class NoAnswer(ValueError):
  """A text that is no answer; the message says why."""


@dataclasses.dataclass(frozen=True)
class Form:
  """The form of an answer, as two functions: text -> value, or NoAnswer raised."""

  lenient: typing.Callable  # of this project
  official: typing.Callable  # of the published script

  def faults(self) -> dict:
    """The arguments `fault` and `official` of a `questions.Question`."""
    return {"fault": lambda text: self._try(text, False)[1],
            "official": lambda text: self._try(text, True)[1]}

  def take(self, answer, strict: bool = False):
    """(value, reason for none, whether the two functions differ) of a `questions.Answer`."""
    if why := failure(answer):
      return None, why, False
    value, why = self._try(answer.text, strict)
    if why:
      return None, f"unparsable: {why}", False
    return value, None, value != self._try(answer.text, not strict)[0]

  def _try(self, text, strict):
    try:
      return (self.official if strict else self.lenient)(text), None
    except NoAnswer as e:
      return None, str(e)


def failure(answer) -> str | None:
  """Reason for a missing `questions.Answer`, as "reason: detail"; None where there is one."""
  return "no answer" if answer is None else answer.error


def spoken(text: str) -> str:
  """The text without thoughts, or what its one answer box holds; NoAnswer for an open thought."""
  said, start, thinking = [], 0, False
  for mark in _MARKS.finditer(text):
    if mark["open"] and not thinking:
      said.append(text[start : mark.start()])
    elif not mark["open"] and not thinking:
      said = []  # the thought began in the prompt
    thinking, start = bool(mark["open"]), mark.end()
  if thinking:
    raise NoAnswer("the judge's thought has no end")
  text = "\n".join([*said, text[start:]])
  if len(text) > LONGEST:
    raise NoAnswer(f"{len(text)} characters are no answer")
  if not text.strip():
    raise NoAnswer("nothing follows the judge's thought")
  boxes = [a or b for a, b in _BOXES.findall(text)]
  return boxes[0] if len(boxes) == 1 else text


def plain(text: str) -> str:
  """`spoken` without emphasis, HTML, LaTeX and runs of blanks, with full-width signs as ASCII."""
  text = html.unescape(spoken(text).replace("\ufe0f", "").replace("\u20e3", "."))
  text = unicodedata.normalize("NFKC", _INLINE.sub("", _BLOCKS.sub("\n", text)))
  text = "".join(c for c in text if unicodedata.category(c) != "Cf").replace("\u2236", ":")
  text = re.sub(r"[^\S\n]+", " ", text)
  return _EMPHASIS.sub("", _LATEX.sub(r"\1", _LATEX.sub(r"\1", text)))


def grades(text: str, names: dict[str, str], top: int) -> dict[str, int]:
  """{name: grade} of all `names`, {name: pattern}: whole numbers from 0 to `top`.

  Of each name the last line that is an answer counts. Without names, three lone grades do.
  """
  text, whole = plain(text), f"the grades are whole numbers from 0 to {top}"
  for scale in _SCALE.finditer(text):
    number = scale[1] or scale[2]
    if not number[0].isdigit() or float(number) > top:
      raise NoAnswer(f"out of range: {scale[0]!r}, but {whole}")
  pattern, found, wrong = "|".join(f"(?:{p})" for p in names.values()), {}, ""
  if not re.search(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE):
    lone = [m[1] for m in map(_LONE.fullmatch, text.splitlines()) if m]
    found = dict(zip(names, map(int, lone))) if len(lone) == len(names) else {}
  line = re.compile(
      rf"[\W_]*+(?:[0-9a-z]{{1,2}}[.):]\s+[\W_]*+)?(?:final\s+)?({pattern})\s*"
      rf"(?:score|grade|rating)?[\"'”]?\s*(?:\(([^()]*)\))?\s*"
      rf"([:=]+>?|->|→|is\b|-(?=\s)|–|—|)\s*[\"'“(\[<]*"
      rf"([+-]?{_NUMBER})(?!\w)[\"'”)\]>]*(.*)", re.IGNORECASE)
  cut = re.compile(rf"(?:[,;|]|\band\b|(?<=[0-9.])\s)(?=[\s\"'_]*(?:{pattern})(?![^\W_]))",
                   re.IGNORECASE)
  for said in _graded_lines(text, pattern):
    for part in cut.split(said):
      if (match := line.fullmatch(part)) and (grade := _grade(match, top)) is not None:
        found[next(n for n, p in names.items() if re.fullmatch(p, match[1], re.I))] = grade
        wrong = short(part, 60) if grade < 0 else wrong
  if bad := [n for n, grade in found.items() if not 0 <= grade <= top]:
    raise NoAnswer(f"out of range: {wrong or found[bad[0]]!r}, but {whole}")
  if missing := [n for n in names if n not in found]:
    raise NoAnswer(f"no score for {' and '.join(missing)}")
  return {name: found[name] for name in names}


def yes_no(text: str) -> str:
  """"yes" or "no": what a line consists of or begins with; NoAnswer where lines contradict."""
  text = plain(text)
  keyed = [k.lower() for k in _KEYED.findall(text)]
  lines = [line for line in text.splitlines() if line.strip()]
  strong, weak = [*map({"true": "yes", "false": "no"}.get, keyed, keyed)], []
  for line in [] if keyed else lines:
    match = _AT_LAST.fullmatch(line) or _SAYS.fullmatch(line)
    if match and not _EITHER.match(match[2]):
      word, rest = match[1].lower(), match[2]
      turned = any(o.lower() != word for o in _OTHERWISE.findall(rest))
      if turned or _STRONG.match(rest):
        strong.append("both" if turned else word)
      elif line is lines[0] and (_NO_BECAUSE.match(rest) if word == "no" else rest[0] == " "):
        weak.append(word)
  said = strong or weak
  alone = lines and re.fullmatch(rf"[\W_]*(?:{_LABEL})?(?:yes|no)[\W_]*", lines[-1], re.IGNORECASE)
  if not said:
    raise NoAnswer("neither yes nor no")
  if said[-1] == "both" or len(set(said)) > 1 and not alone:
    raise NoAnswer("both yes and no")
  return said[-1]


def yes_nos(text: str, count: int) -> list[str]:
  """"yes" or "no" for each of `count` questions, from a list in any of the usual forms.

  NoAnswer unless there are as many as questions, and every form that fits says the same.
  """
  text = plain(text)
  lines = _by_line(text)
  true = {"true": "yes", "false": "no"}
  readings = [lines, [true.get(k.lower(), k.lower()) for k in _KEYED.findall(text)],
              max(_numbered(text, _AT_START), _numbered(text, _INSIDE), key=len), _by_row(text),
              *map(_in_line, text.splitlines())]
  fit = [r for r in readings if r and len(r) == count]
  if not fit:
    raise NoAnswer(f"{len(lines)} lines begin with yes or no, for {count} questions")
  if any(r != fit[0] for r in fit):
    raise NoAnswer("can be read in two ways")
  return fit[0]


def yes_probability(choice: dict) -> float:
  """The probability that the first token is a "yes", in any case and with blanks or not.

  NoAnswer where the endpoint does not tell it, or where the first token is mostly neither yes nor
  no, as of a judge that thinks.
  """
  try:
    listed = choice["logprobs"]["content"][0]["top_logprobs"]
    pairs = [(entry["token"].strip(" \t\n\"'*`.,!▁Ġ").casefold(), math.exp(entry["logprob"]))
             for entry in listed]
  except (LookupError, TypeError, AttributeError, OverflowError):
    pairs = []
  total = math.fsum(p for _, p in pairs)
  if not pairs or not math.isfinite(total) or total > 1.01:
    raise NoAnswer("the endpoint does not tell the probability of Yes")
  share = lambda *words: math.fsum(p for token, p in pairs if token in words)
  if share("yes", "no") < _SUBSTANTIAL * (max(total, 1.0) - share("")):
    raise NoAnswer(f"the judge does not begin with yes or no, but with {listed[0]['token']!r}")
  if not share("yes") and min([1 - total, *(p for _, p in pairs)]) >= _UNLISTED:
    raise NoAnswer("the endpoint does not tell the probability of Yes")
  return min(1.0, share("yes"))


def _grade(match, top):
  """The grade in a line, -1 for a wrong one, None where the line is no answer."""
  _, scale, sign, number, rest = match.groups()
  if over := re.match(rf"\s*(?:/|(?:out )?of)\s*({_NUMBER})", rest, re.IGNORECASE):
    if float(over[1]) != top:
      return None if float(over[1]) < top else -1
    rest = rest[over.end() :]
  if _LIST_GOES_ON.match(rest):
    return None
  if not (_EXPLAINED.match(rest) if sign else _ENDED.fullmatch(rest)):
    return None if re.match(r"\s+\w", rest) or not sign else -1
  if scale and (numbers := re.findall(_NUMBER, scale)) and float(numbers[-1]) != top:
    return -1
  whole = re.fullmatch(r"([0-9])(?:\.0+)?", number)
  return int(whole[1]) if whole and int(whole[1]) <= top else -1


def _graded_lines(text, pattern):
  """Lines of the text with those of JSON and tables as "name: grade"."""
  try:
    start = min(i for i in map(text.find, "{[") if i >= 0)
    value = json.JSONDecoder().raw_decode(text[start:])[0]
    if lines := list(_json_lines(value, re.compile(pattern, re.IGNORECASE))):
      return lines
  except (ValueError, RecursionError):
    pass
  lines, head = [], None
  name = re.compile(rf"({pattern})\s*(?:score|grade)?\s*(?:\([^()]*\))?", re.IGNORECASE)
  for line in text.splitlines():
    cells = [c.strip() for c in line.strip().strip("|").split("|")]
    named = [i for i, c in enumerate(cells) if name.fullmatch(c)]
    if len(cells) < 2 or all(re.fullmatch(r"[:-]*", c) for c in cells):
      lines += [line] * (len(cells) < 2)
    elif len(named) > 1:
      head = cells
    elif head and len(cells) == len(head) and not named:
      lines += [f"{h}: {c}" for h, c in zip(head, cells) if name.fullmatch(h)]
    elif named:
      numbers = [c for c in cells[named[0] + 1 :] if re.match(_NUMBER, c)]
      lines.append(f"{cells[named[0]]}: {numbers[0] if len(numbers) == 1 else '-1'}")
    else:
      lines.append(line)
  return lines


def _json_lines(value, name):
  """Yields "name: grade" of grades in a JSON value."""
  grade_in = lambda entry: next((entry[k] for k in _GRADE_KEYS if k in entry), None)
  if isinstance(value, list):
    for entry in value:
      yield from _json_lines(entry, name)
  elif isinstance(value, dict):
    for key, entry in value.items():
      if name.fullmatch(key):
        grade = grade_in(entry) if isinstance(entry, dict) else entry
        yield f"{key}: {-1 if isinstance(grade, bool) or grade is None else grade}"
      elif isinstance(entry, str) and name.fullmatch(entry.strip()):
        yield f"{entry.strip()}: {grade_in(value)}"
      else:
        yield from _json_lines(entry, name)


def _said(line):
  """"yes" or "no" where the line begins with it, or has it after a question; or None."""
  match = _SAYS.fullmatch(line) or _AFTER_QUESTION.fullmatch(line)
  return match[1].lower() if match and not _EITHER.match(match[2]) else None


def _by_line(text):
  """Answers of lines that have no number; none where numbered ones answer, too."""
  lines = [x for x in text.splitlines() if "|" not in x and _said(x) and not _in_line(x)]
  return [] if any(map(_AT_START.match, lines)) else list(map(_said, lines))


def _numbered(text, item):
  """Answers of items numbered 1, 2, ...: of the last such list; none if one is not clear."""
  marks, run = list(item.finditer(text)), []  # [(number, text)]
  for mark, after in zip(marks, [*marks[1:], None]):
    number, part = int(mark[1]), text[mark.end() : after.start() if after else len(text)]
    if run and number == run[-1][0]:
      run[-1] = number, f"{run[-1][1]}\n{part}"
    else:
      run = [*run, (number, part)] if run and number == run[-1][0] + 1 else (
          [(1, part)] if number == 1 else [])
  found = [set(filter(None, map(_said, part.splitlines()))) for _, part in run]
  return [said.pop() for said in found] if all(len(said) == 1 for said in found) else []


def _by_row(text):
  """Answers of the rows of a table, one a row."""
  found = []
  for line in text.splitlines():
    said = [m[1].lower() for cell in line.split("|")[1:]
            if (m := re.fullmatch(r"[\W_]*(yes|no)(?:[\W_]*|[.,;:].*)", cell, re.IGNORECASE))]
    if len(said) > 1:
      return []
    found += said
  return found


def _in_line(line):
  """Answers of a line of nothing but several of them."""
  words = re.findall(r"\w+", re.sub(r"^[\W_]*answers?\s*:", "", line, flags=re.IGNORECASE).lower())
  either = re.search(r"yes\s*/\s*no", line, re.IGNORECASE)
  return words if len(words) > 1 and set(words) <= {"yes", "no"} and not either else []
