"""Answers of judges in words: grades, yes and no, transcriptions, and when a text is none of them.

  text -> spoken (without thoughts) -> plain (one form of signs) -> grades, yes_no or yes_nos

All readers raise `NoAnswer` rather than guess. docs/spec.md, section 9, compares them with the
published scripts.
"""

import contextlib
import html
import json
import re
import unicodedata

from irg_jax import storage
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
# Tokens that end a turn, which some endpoints leave in; what follows is a turn that is made up.
_ENDS = re.compile(r"</s>|<(?:end_of_turn|eos)>|\[INST\]|<\|(?:im_end|im_start|eot_id|eom_id|"
                   r"end_of_text|endoftext|end|return|start_header_id)\|>")
_NEXT_TURN = re.compile(r"(?<=\S)\n+[^\w\n]*(?:user|human)[^\w\n]*:.*", re.IGNORECASE | re.DOTALL)
_BLIND = re.compile(
    r"\b(?:can(?:no|['’])t|cannot|unable to|not able to)\s+(?:\w+ly\s+)?(?:see|view|access|open|"
    r"load|analy[sz]e|process)\s+(?:(?:the|any|an|this|that|your)\s+)?(?:\w+\s+)?"
    r"(?:image|picture|photo|attachment|file)s?\b|\bno (?:image|picture|photo|attachment)s?\s+"
    r"(?:\w+\s+){0,3}(?:attached|provided|uploaded|given|included|shared)\b", re.IGNORECASE)

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_LARGE = "three|four|five|seven|ten"
_RANGE = r"(?:-|–|—|~|\.{2,3}|to)"
_SCALE = re.compile(
    rf"(?:/|\bout of\b|\bscale (?:of|from)\b|\bmax(?:imum)?\b\W{{0,4}}(?:(?:score|grade|points?)\b"
    rf"\W{{0,3}})?(?:(?:is|of)\b)?)\s*(?:[01]\s*{_RANGE}\s*)?(?P<a>{_NUMBER}|{_LARGE}|a hundred)\b|"
    rf"(?<![\w.])[01]\s*{_RANGE}\s*(?P<b>{_NUMBER})\b|"
    rf"\b(?P<c>{_NUMBER}|{_LARGE})[\s-]point\s+(?:\w+\s+)?(?:scale|rating|system)\b", re.IGNORECASE)
_LIST_GOES_ON = re.compile(
    r"\s*(?:(?:or|to|and|[^\w\s(%+]+)\s*[0-9]|\([^()]*\)\s*(?:or|[^\w\s(]+)\s*[0-9]\s*[(=])",
    re.IGNORECASE)
_CORRECTED = re.compile(r"\b(?:actually|rather|instead|no|wait|sorry|correction|make (?:it|that))\b"
                        r"\W*(?:[a-z]+\s+){0,2}[0-9]\s*(?:[.,;:!)]|$)", re.IGNORECASE)
_ENDED = re.compile(r"[\s.,;:!|)\]}\"'”]*")
_EXPLAINED = re.compile(r"\s*(?:(?:points?|pts?)\b)?\s*(?:$|[.,;:!()\[\]{}|\"'”–—]|-\s)",
                        re.IGNORECASE)
_TOLD = re.compile(rf"{_NUMBER}\s+(?!(?:of|out|or|to|and|in|points?|pts)\b)[a-z]", re.IGNORECASE)
_GRADE_KEYS = ("score", "grade", "rating", "value", "points")
_LONE = re.compile(r"[\s(\[\"']*(?:[1-9][.)]\s+)?([0-9]+)[\s)\].,\"']*")

_LABEL = (r"(?:(?:so|thus|therefore|hence)[\s,]+)?(?:(?:the|my)\s+)?(?:final\s+)?"
          r"(?:answer|response|verdict|a)\b\s*[0-9]{0,3}\s*(?:is\b)?[\W_]*+")
_SAYS = re.compile(rf"[\W_]*+(?:(?:[0-9]{{1,3}}|[a-z]|[ivx]{{2,4}})[.):]\s*)?[\W_]*+(?:{_LABEL})?"
                   r"(yes|no)\b(.*)", re.IGNORECASE)
_AFTER_QUESTION = re.compile(rf"(?>.*[?？])[\W_]*+(?:{_LABEL})?(yes|no)\b(.*)", re.IGNORECASE)
_AT_END = re.compile(r"(?>.*[:–—-])[\W_]*+(yes|no)\b([\W_]*+)", re.IGNORECASE)
_AT_LAST = re.compile(r".*\b(?:answer|verdict)\s*(?:is|:)[\W_]*+(yes|no)([\W_]*+)", re.IGNORECASE)
# What follows a word that is no answer: one of two, a key, "yes = false", a small probability.
_EITHER = re.compile(
    r"\s*(?:[/|]|,?\s*(?:or|and|vs)\b)[\s\"'.]*(?:yes|not?)\b|[\"']\s*:|\W*(?:true|false)\b|"
    r"\W*(?:0?\.[0-4]\d*\b(?!\s*%)|[0-4]?[0-9](?:\.\d+)?\s?%)|\.[0-9]", re.IGNORECASE)
_STRONG = re.compile(r"[\s\"'”]*(?:$|[.,;:!)\]}(|–—]|-\s)")
_TURN = r"(?:(?:wait|actually|but|sorry|or|otherwise|else|so|thus|therefore|hence|then)[\s,]+){0,4}"
_CONCLUDES = re.compile(rf"(?:.*[.!?,;]\s+|\W*){_TURN}(yes|no)([\s.!)\"'”]*+)", re.IGNORECASE)
_OTHERWISE = re.compile(
    rf"[.,;:!/|(–—-]\s*{_TURN}(yes|no)\s*(?:[.,;:!/|()–—-]|$)", re.IGNORECASE)
_YES_IS = re.compile(r"\s+(?:is|isn|was|would|cannot)\b", re.IGNORECASE)
_NO_BECAUSE = re.compile(r"\s+(?:there|it|the|this|that|these|those|because|since|as)\b",
                         re.IGNORECASE)
_ITEM = (r"\(?\[?(?:q(?:uestion)?|a(?:nswer)?)?\s*#?[\"']?([0-9]{1,3})[\"']?\s*[.):\]-][\s)]*"
         r"(?![0-9])")
_AT_START = re.compile(rf"^[^\w\n(\[]*{_ITEM}", re.IGNORECASE | re.MULTILINE)
_INSIDE = re.compile(rf"(?:^|(?<=[\s,{{])){_ITEM}", re.IGNORECASE)
_KEYED = re.compile(r"[\"'](?:answer|response|verdict)[\"']\s*:\s*[\"']?(yes|no|true|false)\b",
                    re.IGNORECASE)
_WORDS = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}


class NoAnswer(ValueError):
  """A text that is no answer; the message says why."""


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
  end = next((m.start() for m in _ENDS.finditer(text) if text[: m.start()].strip()), None)
  text = _ENDS.sub("", text[:end])
  if not text.strip():
    raise NoAnswer("nothing follows the judge's thought")
  boxes = [a or b for a, b in _BOXES.findall(text)]
  return boxes[0] if len(boxes) == 1 else text


def plain(text: str) -> str:
  """`spoken` without emphasis, HTML, LaTeX and runs of blanks, with full-width signs as ASCII.

  NoAnswer, too, where the judge says that it sees no image: what it says of it then is a guess.
  """
  text = html.unescape(spoken(text).replace("\ufe0f", "").replace("\u20e3", "."))
  text = unicodedata.normalize("NFKC", _INLINE.sub("", _BLOCKS.sub("\n", text)))
  text = "".join(c for c in text if unicodedata.category(c) != "Cf").replace("\u2236", ":")
  text = _EMPHASIS.sub("", _LATEX.sub(r"\1", _LATEX.sub(r"\1", text)))
  text = re.sub(r" ?\n(?: ?\n)+", "\n\n", re.sub(r"[^\S\n]+", " ", text))
  text = _NEXT_TURN.sub("", text)
  if blind := _BLIND.search(text):
    raise NoAnswer(f"the judge says that it sees no image: {short(blind[0], 60)!r}")
  return text


def grades(text: str, names: dict[str, str], top: int) -> dict[str, int]:
  """{name: grade} of all `names`, {name: pattern}: whole numbers from 0 to `top`.

  Of each name the last line that is an answer counts. Without names, three lone grades do.
  """
  text, whole = plain(text), f"the grades are whole numbers from 0 to {top}"
  for scale in _SCALE.finditer(text):
    number = scale["a"] or scale["b"] or scale["c"]
    if not number[0].isdigit() or float(number) > top:
      raise NoAnswer(f"out of range: {scale[0]!r}, but {whole}")
  pattern, found, wrong = "|".join(f"(?:{p})" for p in names.values()), {}, ""
  text = re.sub(rf"(?im)^([^\w\n]*(?:[0-9a-z]{{1,2}}[.):]\s+)?(?:{pattern}))[^\w\n]*\n\s*[^\w\n]*+"
                r"(?:(?:score|grade|rating)\b[^\w\n]*)?(?=[0-9])", r"\1: ", text)  # headings
  if not re.search(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE):
    lone = [m[1] for m in map(_LONE.fullmatch, text.splitlines()) if m]
    found = dict(zip(names, map(int, lone))) if len(lone) == len(names) else {}
  line = re.compile(
      rf"[\W_]*+(?:[0-9a-z]{{1,2}}[.):]\s+[\W_]*+)?(?:final\s+)?({pattern})\s*"
      rf"(?:score|grade|rating)?[\"'”]?\s*(?:\(([^()]*)\))?\s*"
      rf"([:=]+>?|->|→|is\b|-(?=\s)|–|—|)\s*(?:<(?=[^<>\n]*>))?[\"'“(\[]*"
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
  lines = [line for line in text.splitlines() if line.strip()]
  strong, weak = _keyed(text) or _by_json(text), []
  for line in [] if strong else lines:
    matches = (p.fullmatch(line) for p in (_AT_LAST, _SAYS, _AFTER_QUESTION, _CONCLUDES))
    if (match := next(filter(None, matches), None)) and not _EITHER.match(match[2]):
      word, rest = match[1].lower(), match[2]
      turned = any(o.lower() != word for o in _OTHERWISE.findall(rest))
      if turned or _STRONG.match(rest):
        strong.append("both" if turned else word)
      elif line is lines[0] and not re.search({"yes": r"\bno\b", "no": r"\byes\b"}[word], rest,
                                              re.IGNORECASE) and (
          _NO_BECAUSE.match(rest) if word == "no" else rest[0] == " " and not _YES_IS.match(rest)):
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
  readings = [lines, _keyed(text), _by_json(text),
              max(_numbered(text, _AT_START), _numbered(text, _INSIDE), key=len), _by_row(text),
              *map(_in_line, text.splitlines())]
  fit = [r for r in readings if r and len(r) == count]
  if not fit:
    raise NoAnswer(f"{len(lines)} lines begin with yes or no, for {count} questions")
  if any(r != fit[0] for r in fit):
    raise NoAnswer("can be read in two ways")
  return fit[0]


def _grade(match, top):
  """The grade in a line, -1 for a wrong one, None where the line is no answer."""
  _, scale, sign, number, rest = match.groups()
  if over := re.match(rf"\s*(?:/|(?:out )?of)\s*({_NUMBER})", rest, re.IGNORECASE):
    if float(over[1]) != top:
      return None if float(over[1]) < top else -1
    rest = rest[over.end() :]
  if _LIST_GOES_ON.match(rest) or _CORRECTED.search(rest):
    return None
  if not (_EXPLAINED.match(rest) if sign else _ENDED.fullmatch(rest)):
    return None if re.match(r"\s+\w", rest) or not sign else -1
  if scale and (numbers := re.findall(_NUMBER, scale)) and float(numbers[-1]) != top:
    return -1
  whole = re.fullmatch(r"([0-9])(?:\.0+)?", number)
  return int(whole[1]) if whole and int(whole[1]) <= top else -1


def _graded_lines(text, pattern):
  """Lines of the text with those of JSON and tables as "name: grade"."""
  if lines := list(_json_lines(_json_in(text), re.compile(pattern, re.IGNORECASE))):
    return lines
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
      numbers = [c for c in cells[named[0] + 1 :] if re.match(_NUMBER, c) and not _TOLD.match(c)]
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
  """"yes" or "no" where a line begins or ends with it, or has it after a question; or None."""
  found = [p.fullmatch(line) for p in (_SAYS, _AFTER_QUESTION, _AT_END)]
  said = {match[1].lower() for match in found if match}
  either = any(_EITHER.match(match[2]) for match in found if match)
  return said.pop() if len(said) == 1 and not either else None


def _by_line(text):
  """Answers of unnumbered lines; empty where numbered lines answer as well."""
  lines = [x for x in text.splitlines() if "|" not in x and _said(x) and not _in_line(x)]
  return [] if any(map(_AT_START.match, lines)) else list(map(_said, lines))


def _numbered(text, item):
  """Answers of the last list numbered 1, 2, ...; empty if any of them is unclear."""
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


def _keyed(text):
  """Answers under keys such as "answer"."""
  return [_WORDS[said.lower()] for said in _KEYED.findall(text)]


def _by_json(text):
  """Answers of a JSON value that holds nothing else, whatever its keys but yes and no."""
  parts = lambda x: ([None] if any(k.lower() in _WORDS for k in x) else x.values()) if isinstance(
      x, dict) else x if isinstance(x, list) else [x]
  level = [_json_in(text)]
  while any(isinstance(value, dict | list) for value in level):
    level = [x for value in level for x in parts(value)]
  found = [_WORDS.get(str(value).strip(" .").lower()) for value in level]
  return [] if None in found else found


def _json_in(text):
  """The first JSON list or object of a text; None without one."""
  with contextlib.suppress(ValueError, RecursionError):
    start = min(i for i in map(text.find, "{[") if i >= 0)
    end = json.JSONDecoder().raw_decode(text, start)[1]
    return storage.parse_json(text[start:end])  # refuses deep ones


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
  """Answers of a line that holds only answers, two or more."""
  words = re.findall(r"\w+", line.rpartition(":")[2].lower())
  either = re.search(r"yes\s*/\s*no", line, re.IGNORECASE)
  return words if len(words) > 1 and set(words) <= {"yes", "no"} and not either else []
