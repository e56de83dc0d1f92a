"""Prompts as people type them, brought into the form that a checkpoint was trained on.

A checkpoint may describe its training prompts by a grammar that translates (`PromptForm`, a field
of `generate.json`). `read` cleans a prompt (case, spaces, punctuation), derives it from the rule
`prompt`, and gives the text that the model reads, with a note on what the model cannot know of it.
A rule is a line of text:

    thing = a <noun> # 1 | the <noun> -> a <1> # 1 | big <noun> -> a <1> # 1 ! cannot read sizes

It has alternatives. Each is a pattern of words and <rules>; after `->` the text that the model
reads, with <1>, <2>, ... for what the rules of the pattern give (without it: the pattern); after
`#` the number of things that it asks for; after `!` the end of a sentence "this model ...", the
note. An alternative may be empty. Of several derivations the one with the fewest notes wins, then
the alternative that stands first. After `!!` is a note on a special case of another alternative:
such a derivation wins over all without it. The text that the model reads is derived once more, for
such notes: a rule on it needs only the plainest form, not every phrasing.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import unicodedata

from irg_jax.config import setting

_RULES, _LENGTH = 300, 100_000  # characters in all
_WORDS = 64  # of a prompt that is read
_STEPS, _DEPTH = 100_000, 150  # of one derivation
_CLOSE = 0.82  # likeness by which an unknown word passes for a known one


@dataclasses.dataclass(frozen=True)
class Reading:
  """A prompt as a model reads it."""

  text: str  # goes to the model
  changed: bool  # it is not the prompt as typed
  note: str | None  # what the model cannot know of the prompt, in a sentence or two

  @property
  def record(self) -> dict:
    """The fields of a trace: "read_as" and "note", where there is something to say."""
    found = {"read_as": self.text if self.changed else None, "note": self.note}
    return {name: value for name, value in found.items() if value}


@dataclasses.dataclass(frozen=True)
class PromptForm:
  """A checkpoint's own description of its training prompts and images."""

  rules: tuple[str, ...] = setting(
      (), "grammar of its prompts, see irg_jax/generate/prompts.py; empty: prompts stay as typed")
  most: int = setting(0, "things that a prompt may ask for in all; 0: any number", low=0)
  sure: int = setting(0, "things that it mostly draws right; more get a note; 0: any number", low=0)
  note: str = setting("", "what it knows, in a sentence that ends every note")
  sizes: tuple[str, ...] = setting((), "sizes of its images (\"64x64\"); empty: any size")
  editing: bool = setting(True, "it was trained to edit images")

  def faults(self):
    try:
      _grammar(self.rules)
    except ValueError as e:
      yield "rules", str(e)


def read(form: PromptForm, prompt: str, size: tuple[int, int] | None = None,
         edits: bool = False) -> Reading:
  """Reads a prompt for images of `size` (width, height), and with `edits` for an image to edit."""
  text, faults = _translated(form, prompt) if form.rules else (prompt, ())
  if edits and not form.editing:
    faults += ("was never trained to edit images",)
  if size and form.sizes and "{}x{}".format(*size) not in form.sizes:
    faults += (f"was trained on images of {', '.join(form.sizes)} only, not {size[0]}x{size[1]}",)
  note = None
  if faults:
    note = f"this model {'; it '.join(dict.fromkeys(faults))}. " + (
        f'It reads "{text}". ' if text != prompt else "") + form.note
  return Reading(text, text != prompt, note and note.strip())


def notes(form: PromptForm, typed, readings) -> list[str]:
  """Lines with the notes on the prompts of a command: each note once, what the model knows last."""
  found = {}
  for prompt, reading in zip(typed, readings):
    if reading.note:
      found.setdefault(reading.note.removesuffix(form.note).strip(), []).append(f'"{prompt}"')
  shown = lambda named: ", ".join(named[:3]) + (f" and {len(named) - 3} more" if named[3:] else "")
  lines = [f"note on {shown(named)}: {note}" for note, named in found.items()]
  return [*lines, form.note] if lines and form.note else lines


def renewed(fields: dict) -> dict:
  """The fields of `generate.json`; an older file had a list of words in place of a form."""
  if not isinstance(fields, dict) or not {"words", "note"} & set(fields):
    return fields
  words, note = fields.get("words") or [], fields.get("note", "")
  if not isinstance(words, list) or not all(re.fullmatch(r"\w+", str(w)) for w in words):
    raise ValueError("config field 'words' must be a list of words")
  rules = ["prompt = <word> | <word> <prompt>", f"word = {' | '.join([*words, ','])}"]
  rest = {name: value for name, value in fields.items() if name not in ("words", "note")}
  return {"prompts": {"rules": rules if words else [], "note": note}} | rest


@functools.lru_cache(4096)
def _translated(form, prompt):
  """(text for the model, ends of sentences on what it cannot know)."""
  words, known, faults = _words(prompt), _known(form.rules), []
  if len(words) > _WORDS:
    return prompt, (f"reads at most {_WORDS} words, and this prompt has {len(words)}",)
  slips = {word: _close(word, known) for word in words if word not in known}
  if strange := [f'"{word}"' for word, close in slips.items() if not close]:
    faults.append(f"does not know {', '.join(strange)}")
  faults += [f'takes "{word}" for "{close[0]}"' for word, close in slips.items() if close]
  kept = list(itertools.chain(*(slips.get(word, [word]) for word in words)))
  found = _derive(form.rules, tuple(kept))
  if found is None:
    return _joined(words) or prompt, tuple(faults) or ("was not trained on prompts of this form",)
  if form.most and found.count > form.most:
    faults.append(f"draws at most {form.most} things, and this prompt asks for {found.count}")
  elif form.sure and found.count > form.sure:
    faults.append(f"often draws more than {form.sure} things wrong")
  again = _derive(form.rules, found.text)
  return _joined(found.text), (*faults, *found.faults, *(again.faults if again else ()))


def _words(prompt):
  """Words in lower case, symbols, and a comma after each clause; no other punctuation."""
  text = unicodedata.normalize("NFKC", prompt).casefold().replace("\u2019", "'").replace("_", " ")
  words = []
  for word in re.findall(r"\w+(?:'\w+)*|[^\w\s]", re.sub(r"(?<!\w)-(?=\d)", "minus ", text)):
    if word in ",.;!?":
      words += [","] if words and words[-1] != "," else []
    elif word in "&+/" or unicodedata.category(word[0])[0] not in "PMC":
      words.append(word)
  return words[:-1] if words[-1:] == [","] else words


def _close(word, known):
  """The known word that an unknown one is a slip of, as a list; empty if there is none."""
  return difflib.get_close_matches(word, known, 1, _CLOSE) if 4 <= len(word) <= 20 else []


def _joined(words):
  return " ".join(words).replace(" ,", ",")


@dataclasses.dataclass(frozen=True)
class _Option:
  """One alternative of a rule."""

  symbols: tuple[str, ...]  # of the pattern: words and "<rule>"
  output: tuple[str | int, ...]  # words, and numbers of the pattern's rules from 0
  count: int
  faults: tuple[str, ...]
  cost: int


@dataclasses.dataclass(frozen=True)
class _Found:
  """The best derivation of some words."""

  text: tuple[str, ...] = ()
  count: int = 0
  faults: tuple[str, ...] = ()
  cost: int = 0  # the cheapest derivation wins
  parts: tuple = ()  # while an alternative is matched: what its rules found


@functools.lru_cache(16)
def _grammar(rules) -> dict[str, list[_Option]]:
  """{rule: alternatives}; ValueError names a rule that is wrong."""
  if len(rules) > _RULES or sum(map(len, rules)) > _LENGTH:
    raise ValueError(f"has {len(rules)} rules of {sum(map(len, rules))} characters, but may have "
                     f"{_RULES} of {_LENGTH}")
  grammar = {}
  for rule in rules:
    name, equals, options = rule.partition(" = ")
    if not equals or not re.fullmatch(r"[a-z_]+", name) or name in grammar:
      raise ValueError(f"has {rule[:60]!r}, but must have lines \"name = ...\", each name once")
    try:
      grammar[name] = [_option(text) for text in options.split("|")]
    except (ValueError, IndexError) as e:
      raise ValueError(f"has a wrong alternative in {name!r} ({e})") from e
  asked = {s[1:-1] for name in grammar for o in grammar[name] for s in o.symbols if s[0] == "<"}
  if rules and (lacking := sorted({"prompt", *asked} - {*grammar})):
    raise ValueError(f"has no rule {lacking[0][:60]!r}")
  return grammar


def _option(text):
  body, special, note = f" {text} ".partition(" !! ")
  if not special:
    body, _, note = body.partition(" ! ")
  body, _, count = f"{body} ".partition(" # ")
  pattern, arrow, output = f"{body} ".partition(" -> ")
  symbols = tuple(pattern.split())
  places = [i for i, s in enumerate(symbols) if s[0] == "<"]
  shown = output.split() if arrow else [
      f"<{places.index(i) + 1}>" if i in places else s for i, s in enumerate(symbols)]
  parts = tuple(int(s[1:-1]) - 1 if s[0] == "<" else s for s in shown)
  if any(part not in range(len(places)) for part in parts if isinstance(part, int)):
    raise IndexError(f"{text[:60]!r} has fewer rules than its output names")
  note = note.strip()
  return _Option(symbols, parts, int(count or 0), (note,) if note else (),
                 -_STEPS if special else bool(note))


@functools.lru_cache(16)
def _known(rules) -> frozenset[str]:
  """All words of the grammar's patterns."""
  return frozenset(s for options in _grammar(rules).values() for option in options
                   for s in option.symbols if s[0] != "<")


class _Endless(Exception):
  """A derivation that takes too many steps; only a grammar made for it can be so ambiguous."""


def _derive(rules, words) -> _Found | None:
  """The best derivation of all words from the rule "prompt"; None if there is none."""
  grammar, table, steps = _grammar(rules), {}, [0]

  def ends(name, start, depth):
    """{end: the best derivation of words[start:end] from a rule}."""
    if (name, start) in table:
      return table[name, start]
    best = table[name, start] = {}  # while it is made, a rule that begins with itself finds nothing
    for option in grammar[name]:
      states = {start: _Found()}
      for symbol in option.symbols:
        states, before = {}, states
        for at, found in before.items():
          follows = (ends(symbol[1:-1], at, depth + 1) if symbol[0] == "<" else
                     {at + 1: None} if words[at:at + 1] == (symbol,) else {})
          for end, part in follows.items():
            _keep(states, end, found if part is None else _Found(
                (), found.count + part.count, _joint(found.faults, part.faults),
                found.cost + part.cost, (*found.parts, part.text)))
          steps[0] += 1 + len(follows)
          if steps[0] > _STEPS or depth > _DEPTH:
            raise _Endless
      for end, found in states.items():
        parts = [found.parts[p] if isinstance(p, int) else (p,) for p in option.output]
        if sum(map(len, parts)) > 4 * _WORDS:
          raise _Endless
        _keep(best, end, _Found(tuple(itertools.chain(*parts)), found.count + option.count,
                                _joint(found.faults, option.faults), found.cost + option.cost))
    return best

  try:
    return ends("prompt", 0, 0).get(len(words))
  except _Endless:
    return None


def _keep(states, end, found):
  if end not in states or found.cost < states[end].cost:
    states[end] = found


def _joint(faults, more):
  return tuple(dict.fromkeys(faults + more)) if more else faults
