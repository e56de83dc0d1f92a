"""Prompts of the mini worlds, in words, and the nouns that thoughts and faults use too."""

import itertools

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_LOUD = 50  # characters of a prompt in capitals, at most
_NUMBERS = ("no", "one", "two", "three", "four", "five")


def relations(include) -> list[tuple[int, str, int]]:
  """(clause, relation, other clause) of all clauses with a position, as indices."""
  return [(i, *clause["position"]) for i, clause in enumerate(include) if "position" in clause]


def noun(count: int, shape: str, color: str | None = None, article: bool = True,
         detail: str | None = None) -> str:
  """"a red circle", "two red circles"; with `article` false "one red circle"."""
  name = " ".join(filter(None, (detail, color, shape)))
  if count == 1:
    return f"{_article(name) if article else 'one'} {name}"
  return f"{_NUMBERS[count]} {_plural(name)}"


def nouns(include, article: bool = True) -> list[str]:
  """The noun of each clause, see `noun`."""
  return [noun(c["count"], c["class"], c.get("color"), article, c.get("detail")) for c in include]


def formal(include, wording: dict, rng) -> tuple[str, list]:
  """A prompt in one of few phrasings, in lower case, and its `relations`, one at most."""
  names = nouns(include)
  text = _joined(names, (", ", " and "))
  for i, relation, other in relations(include):
    text = f"{names[i]} {wording['relations'][relation][int(rng.integers(2))]} {names[other]}"
  frames = wording["frames"]
  return frames[int(rng.integers(len(frames)))].format(text), relations(include)


def typed(include, wording: dict, rng) -> tuple[str, list]:
  """A prompt as people type it, and its `relations` in the words of the prompt.

  What it asks for can be read back without doubt. "Left of" may be said as "right of", the other
  way round.

  It is a list of things, each with its relation where none stands in two; or a list, and then the
  relations; or one relation alone, as a sentence.
  """
  pick = lambda name: _pick(wording[name], rng)
  words = [{key: _pick(wording[key].get(value, [value]), rng) for key, value in clause.items()
            if key in ("class", "color", "detail")} for clause in include]
  style = {name: pick(name) for name in ("one", "numbers", "joined")}
  names = [_named(clause, said, style, wording, rng) for clause, said in zip(include, words)]
  placed = [(i, r, j) if rng.random() < 0.7 else (j, INVERSE[r], i)
            for i, r, j in relations(include)]
  said = [_pick(wording["relations"][r], rng) for _, r, _ in placed]
  ends = [i for first, _, last in placed for i in (first, last)]
  if not placed or len(ends) == len(set(ends)) and rng.random() < 0.6:
    verbs = [_verb(include[i]) if len(include) == 2 and rng.random() < 0.3 else ""
             for i, _, _ in placed]
    text = _joined([f"{names[i]}{verb} {way} {names[j]}"
                    for (i, _, j), way, verb in zip(placed, said, verbs)]
                   + [name for i, name in enumerate(names) if i not in ends],
                   pick("apart") if placed else style["joined"])
  else:
    the = [_referred(include, i, said) for i, said in enumerate(words)]
    where = [f"{the[i]}{_verb(include[i])} {way} {the[j]}" for (i, _, j), way in zip(placed, said)]
    text = pick("then").format(_joined(names, style["joined"]), _joined(where, pick("apart")))
  text = pick("frames").format(text)
  case = pick("cases")
  if case == "upper" and len(text) > _LOUD:  # capitals take many tokens
    case = "sentence"
  return {"lower": str, "sentence": lambda t: t[0].upper() + t[1:], "upper": str.upper}[
      case](text + pick("ends")), placed


def _named(clause, said, style, wording, rng):
  """"2 small red circles", "circle with stripes": a clause in the words `said`."""
  count, after = clause["count"], ""
  front = [said[key] for key in ("detail", "color") if key in said]
  if "detail" in said and clause["detail"] in wording["after"] and rng.random() < 0.2:
    after, front = f" {wording['after'][clause['detail']]}", front[1:]
  if len(front) == 2 and rng.random() < 0.15:
    front.reverse()
  name = " ".join([*front, said["class"]])
  number = str(count) if style["numbers"] == "digits" else _NUMBERS[count]
  if count > 1:
    return f"{number} {_plural(name)}{after}"
  one = {"a": _article(name), "": "", "one": number}
  return f"{one[style['one']]} {name}{after}".lstrip()


def _referred(include, i, said):
  """"the circles": a clause that was named before; with its colour where others are like it."""
  alike = sum(clause["class"] == include[i]["class"] for clause in include) > 1
  name = f"{said['color']} {said['class']}" if alike else said["class"]
  return f"the {name if include[i]['count'] == 1 else _plural(name)}"


def _joined(names, how):
  """Names in a list; `how` is what stands between, and before the last one."""
  between, last = how
  return last.join(filter(None, [between.join(names[:-1]), names[-1]]))


def _verb(clause):
  return " is" if clause["count"] == 1 else " are"


def _article(name):
  return "an" if name[0] in "aeiou" else "a"


def _plural(name):
  return f"{name}{'es' if name.endswith(('s', 'x')) else 's'}"


def _pick(options, rng):
  """One of a list, each as likely; or of a table of shares."""
  if isinstance(options, dict):
    shares = list(itertools.accumulate(options.values()))
    at = rng.random() * shares[-1]
    return next(name for name, high in zip(options, shares) if at < high)
  return options[int(rng.integers(len(options)))]
