"""The readers of judges' answers: forms that are read, forms that are none, and made-up ones.

The generators know the truth of every text that they make, so that no reader is its own measure.
"""

import math
import random
import re

import pytest

from irg_jax.evaluate import answers
from irg_jax.evaluate import endpoint
from irg_jax.evaluate import oneig
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise
from irg_jax.evaluate.answers import NoAnswer

NAMES = ("Consistency", "Realism", "Aesthetic Quality")
THOUGHTS = ("<think>\n{}\n</think>\n", "{}\n</think>\n\n", "<Thinking>{}</Thinking>",
    "[THINK]{}[/THINK]",
            "◁think▷{}◁/think▷", "<think>a</think>b <think> {} </think>",
            "<reasoning>{}</reasoning>",
            "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>")


def grades(text):
  """The three grades, or None."""
  try:
    return tuple(wise.FORM.lenient(text).values())
  except NoAnswer:
    return None


def read(reader, *args):
  try:
    return reader(*args)
  except NoAnswer:
    return None


def lines(*values):
  return "\n".join(f"{name}: {value}" for name, value in zip(NAMES, values))


@pytest.mark.parametrize("text", [
    lines(2, 1, 0), "**Consistency:** 2\n**Realism:** 1\n**Aesthetic Quality:** 0",
    "Consistency：２\nRealism： 1\nAesthetic Quality ：0", lines("2.0", "1.0", "0.00"),
    lines("2/2", "1 out of 2", "0 of 2"), "1. Consistency - 2\n2. Realism - 1\n3. Aesthetics - 0",
    '```json\n{"consistency": 2, "realism": 1, "aesthetic_quality": 0}\n```',
    '[{"name": "Consistency", "score": 2}, {"name": "Realism", "score": 1}, '
    '{"name": "Aesthetic Quality", "score": 0}]',
    "| Scale | Grade |\n|--|--|\n|Consistency|2|\n| **Realism** | 1 |\n| Aesthetic Quality | 0 |",
    "|Consistency|Realism|Aesthetic Quality|\n|:-:|:-:|:-:|\n|2|1|0|", "2\n1\n0",
    "Consistency: 2, Realism: 1 and Aesthetic Quality: 0.",
    "Consistency: 2 Realism: 1 Aesthetic Quality: 0",
    "<answer>" + lines(2, 1, 0) + "</answer>",
    "Consistency (0-2): 2\nRealism (0-2): 1\nAesthetic (0-2): 0",
    lines(0, 0, 0) + "\nOn second thoughts:\n" + lines(2, 1, 0), lines(2, 1,
    0) + "\nconsistency 0 faults",
    lines("0, 1 or 2", "0, 1 or 2", "0, 1 or 2") + "\n" + lines(2, 1, 0),
    "### Consistency\n2\n### Realism\n1\n### Aesthetic Quality\n0", lines(2, 1, 0) + "<|im_end|>",
    "**Consistency**\n- Score: 2\n**Realism**\n- Score: 1\n**Aesthetics**\n- Score: 0",
    lines("2 (max 2)", "1 (all 3 dogs)", "0 (no 3 dogs are there)") + "\nA five-pointed star.",
    lines(2, 1, 0) + "\n" + lines("0, 1 or 2", "0, 1 or 2", "0, 1 or 2"),
    lines("<2>", "<1>", "<0>"),
    "|Scale|Grade|Why|\n|--|--|--|\n|Consistency|2|3 dogs|\n|Realism|1|2 tails\n|Aesthetics|0|bad|"])
def test_grades_are_read_in_every_usual_form(text):
  assert grades(text) == (2, 1, 0)


@pytest.mark.parametrize("text", [
    lines("8/10", "7/10", "9/10"), lines("1/10", 1, 1), lines(10, 1, 1), lines("1.5", 1, 1),
    lines("0, 1 or 2", "0, 1 or 2", "0, 1 or 2"), lines("0-2", "0-2", "0-2"), lines("0|1|2", 1, 1),
    lines("½", 1, 1), lines("1½", 1, 1), lines("-1", 1, 1), lines("two", 1, 1), lines("1%", 1, 1),
    lines("<1", 1, 1), lines("< 2", 1, 1), "| Consistency | 8/10 | 3 dogs |\n" + lines("", 1, 1),
    lines(3, 1, 1), lines("2", "1"), lines("1 or 2", 1, 1), lines("2, 1", 1, 1), lines("1+", 1, 1),
    "Grades out of 10\n" + lines(2, 1, 1),
    "Consistency (1-5): 2\nRealism (1-5): 1\nAesthetics (1-5): 1",
    lines("2 (on a scale of 1 to 5)", 1, 1), lines("2 (max 5)", 1, 1), lines("2 - no, 1", 1, 1),
    "On a five-point scale:\n" + lines(2, 1, 1), "Scale 0 … 10\n" + lines(2, 1, 1),
    '{"consistency": {"score": 2, "max": 5}, "realism": 1, "aesthetic_quality": 1}',
    lines("0 (bad), 1 (fair), 2 (good)", 1, 1), lines("2. Actually 1.", 1, 1),
    "I am sorry, I cannot see any image. I would say:\n" + lines(0, 0, 0),
    "No image was attached.\n" + lines(0, 0, 0),
    lines(2, 1, 1) + "\nConsistency: 5", "2\n1\n0\n1", "0, 1, 2", "", "I cannot say.",
    '{"consistency": true, "realism": 1, "aesthetic_quality": 1}', "<think>\n" + lines(2, 1, 1),
    '{"consistency": {"score": 9}, "realism": 1, "aesthetic_quality": 1}',
    "| Consistency | 2 | 1 |\n| Realism | 1 | 1 |\n| Aesthetic Quality | 1 | 1 |"])
def test_what_is_no_whole_number_of_the_scale_is_no_grade(text):
  assert grades(text) is None


def made_grades(dice):
  """(text, grades or None): an answer in some form, or one with a fault."""
  truth = [dice.randrange(3) for _ in NAMES]
  wrong = ["3", "10", "1.5", "8/10", "0.5", "-1", "½", "two", "0, 1 or 2", "0-2", "1 or 2", "50%",
      "n/a"]
  values, fault = list(map(str, truth)), dice.random() < 0.4
  if fault:
    values[dice.randrange(3)] = dice.choice(wrong)
  else:
    values = [dice.choice((v, v, f"{v}.0", f"{v}/2", f"**{v}**", f"{v}.", f"{v} - fair",
        f"{v} (ok)"))
              for v in values]
  name = dice.choice((str, str.upper, str.lower, "**{}**".format, "*{}*".format, "- {}".format))
  colon = dice.choice((": ", "：", " : ", ":** ", " = ", ":\t"))
  rows = [f"{name(n)}{colon}{v}" for n, v in zip(NAMES, values)]
  if dice.random() < 0.2:
    rows = ["| Scale | Grade |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in zip(NAMES,
        values))]
  elif dice.random() < 0.2:
    rows = [f"{i}. {row}" for i, row in enumerate(rows, 1)]
  text = dice.choice(("\n", "\n\n", "\r\n")).join(rows)
  text = dice.choice((str, "```\n{}\n```".format, "<answer>{}</answer>".format, "Here:\n{}".format,
                      "{}\nI saw consistency 0 faults.".format))(text)
  echo = lines(*[dice.randrange(3) for _ in NAMES])
  return dice.choice(("", *THOUGHTS)).format(echo) + text, None if fault else tuple(truth)


@pytest.mark.parametrize("seed", range(4))
def test_200_made_up_grades_are_read_as_they_were_made_or_not_at_all(seed):
  dice = random.Random(seed)
  for _ in range(200):
    text, truth = made_grades(dice)
    assert grades(text) == truth, text


@pytest.mark.parametrize("text, said", [
    ("Yes", "yes"), ("Yes.", "yes"), ("**Yes**", "yes"), (" yes\n", "yes"), ("Ｎｏ", "no"),
    ("No, it is blue", "no"), ("Answer: Yes", "yes"), ('{"answer": "No"}', "no"), ("\\boxed{Yes}",
    "yes"),
    ("<|begin_of_box|>No<|end_of_box|>", "no"), ("It is a fox. The answer is yes.", "yes"),
    ("No dog at first.\nFinal answer: **Yes**", "yes"), ("Yes\nNo other animals are there", "yes"),
    ("<b>Yes</b>", "yes"), ("Yes<|im_end|>", "yes"), ("No</s>\n", "no"), ("Is it red? Yes", "yes"),
    ('{"result": "no"}', "no"), ("a) Yes", "yes"), ("No (0.3) / Yes (0.7)", None),
    ("Yes, if it is a cat; otherwise no.", None), ("Yes is the wrong answer", None),
    ("I cannot see the image. No.", None), ('["yes", "no"]', None), ("Yes there is", "yes"), ("No, there is no fox.", "no"),
    ("Yes/No", None), ("yes or no", None), ("Yes and no", None), ("The fox may be there", None),
    ("No doubt there is", None), ("No, wait, yes.", None), ("Yes.\nNo, it is blue.", None),
    ("Yes\n\nActually, no.", None), ("No.\n\nLet me look again. Yes.", None),
    ("Yes.\nThere is no dog. So no.", None), ("I look. It is a fox. Yes.", "yes"),
    ("Yes for the cat; no for the dog.", None), ("Yes 0.3 No 0.7", None), ("Yes (20%)", None),
    ("yes: 10 %", None), ("Yes (90%)", "yes"), ("Yes - 0.2", None), ("yes vs no", None),
    ('{"yes": 0.3, "no": 0.7}', None), ('{"no": true}', None), ("Yes: false", None),
    ('"yes": "no"', None), ("No.1", None), ("Yes, there are 2 foxes", "yes"),
    ("Not at all", None), ("No-one", None), ("Yesterday", None), ("<think>Yes", None), ("Yes?",
    None)])
def test_yes_and_no_are_read_or_are_no_answer(text, said):
  assert read(answers.yes_no, text) == said


@pytest.mark.parametrize("mark", [
    "<|im_end|>\n<|im_start|>user\n", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n", "</s>\n",
    "<end_of_turn>\n<start_of_turn>user\n", "<|endoftext|>", "\n[INST] ", "\n\nUser: and this?\n",
    "\n### Human: and this?\n"])
def test_turns_that_a_judge_makes_up_after_its_own_are_not_read(mark):
  assert grades(lines(2, 1, 0) + mark + lines(0, 0, 0)) == (2, 1, 0)
  assert grades(f"{mark.lstrip()}{lines(2, 1, 0)}") in ((2, 1, 0), None)
  assert read(answers.yes_no, f"Yes{mark}No") == "yes"
  assert read(answers.yes_nos, f"yes\nno{mark}no\nno", 2) == ["yes", "no"]


def made_yes_no(dice):
  truth = dice.choice(("yes", "no"))
  word = dice.choice((str, str.title, str.upper))(truth)
  text = dice.choice(("{}", "{}.", "**{}**", " {}\n", "{}!", '"{}"', "Answer: {}", "{}, as asked.",
                      "<answer>{}</answer>", "I look.\n{}", '{{"answer": "{}"}}', "*{}* - clearly",
                      "The answer is {}.", "1. {}", "{} (see the left)", "`{}`")).format(word)
  if dice.random() < 0.3:
    text, truth = dice.choice(("{} or not", "I think {}", "{}/{}", "maybe", "<think>{}", "{}?",
                               "cannot tell, {} perhaps")).format(word, "Yes"), None
  return dice.choice(("", *THOUGHTS)).format("Yes.\nNo.") + text, truth


def test_200_made_up_yes_and_no_are_read_as_they_were_made_or_not_at_all():
  dice = random.Random(1)
  for _ in range(400):
    text, truth = made_yes_no(dice)
    assert read(answers.yes_no, text) == truth, text


def made_list(dice):
  """(text, number of questions, answers or None)."""
  truth = [dice.choice(("yes", "no")) for _ in range(dice.randint(2, 6))]
  count = len(truth) + dice.choice((0, 0, 0, 1, -1))
  words = [dice.choice((str, str.title, str.upper, "**{}**".format))(w) for w in truth]
  ends = ("", ", a cup", ". It is", " because of it", ": seen")
  told = [f"{w}{dice.choice(ends)}" for w in words]
  each = dice.choice(("{0}. {1}", "{0}) {1}", "- {1}", "{1}", "* {1}", "**{0}.** {1}", "Q{0}: {1}",
      "{0}：{1}",
                      "{0}. Is there a cup? {1}", "{0}. Is it red?\n   {1}", "Answer {0}: {1}"))
  text = "\n".join(each.format(i, w) for i, w in enumerate(told, 1))
  form = dice.random()
  if form < 0.15:
    text = str(list(truth)).replace("'", '"')
  elif form < 0.3:
    text = "|#|Question|Answer|\n|-|-|-|\n" + "\n".join(
        f"| {i} | Is it? | {w} |" for i, w in enumerate(words, 1))
  elif form < 0.4:
    text = " ".join(f"{i}. {w}" for i, w in enumerate(told, 1))
  elif form < 0.5:
    text = dice.choice((", ", "; ", " ")).join(words)
  text = dice.choice(("", *THOUGHTS)).format("No cup\nNo red\nYes") + text
  return text, count, truth if count == len(truth) else None


@pytest.mark.parametrize("seed", range(3))
def test_200_made_up_lists_are_read_as_they_were_made_or_not_at_all(seed):
  dice = random.Random(seed)
  for _ in range(200):
    text, count, truth = made_list(dice)
    assert read(answers.yes_nos, text, count) == truth, text


@pytest.mark.parametrize("text, count", [
    ("yes/no", 2), ("yes or no\nyes or no", 2), ("nothing\nyes", 2), ("1. yes\n3. no", 2),
    ("<think>yes\nno", 2),
    ("1. No cup is missing: yes\n2. no", 2), ("No dog? yes\nno", 2), ('{"a": "yes", "b": 3}', 2),
    ("1. yes\n   no blue one\n2. no", 2), ("No cup\nNo red\n1. yes\n2. maybe", 2), ("", 1),
    ("| a | yes | no |\n| b | no | no |", 2), ("yes\nno\nIn short: no, no", 2)])
def test_lists_that_are_not_clear_are_no_answer(text, count):
  assert read(answers.yes_nos, text, count) is None


@pytest.mark.parametrize("text", [
    "Sure, in this order: yes, no, yes", "yes\nno\nyes\n\nIn short: yes, no, yes",
    '{"answers": ["yes", "no", "yes"]}', '{"Is it?": "yes", "No cup?": "no", "A dog?": "yes"}',
    '{"q1": true, "q2": false, "q3": true}', "a) yes\nb) no\nc) yes", "i. yes\nii. no\niii. yes",
    "Is there a cup: yes\nIs it red: no\nA dog: yes", "yes\nno\nyes<|endoftext|>",
    '```json\n{\n  "Is it?": "yes",\n  "Red?": "no",\n  "A dog?": "yes"\n}\n```'])
def test_lists_of_other_usual_forms_are_read(text):
  assert read(answers.yes_nos, text, 3) == ["yes", "no", "yes"]


def test_200_made_up_transcriptions_lose_their_thoughts_alone():
  dice = random.Random(2)
  for _ in range(200):
    words = "".join(dice.choice("aB é：*1.\n日<>") for _ in range(dice.randint(1, 40))).strip() or "x"
    said = dice.choice(("", *THOUGHTS)).format("The sign reads Hello")
    assert read(oneig.WORDS.lenient, said + words).strip().removeprefix("b").strip() == words
    assert read(oneig.WORDS.lenient, f"{words}<think>{words}") is None
    assert oneig.WORDS.official(said + words) == said + words
  assert oneig.WORDS.lenient("Hello</s>\n") == "Hello"


WORDS = (
    *NAMES, "\n", "\n",
    *"yes no Yes. No, 0 1 2 3 10 1.5 8/10 : ： - | / or , . ? ** ( ) [ ] { }".split(),
    *"\" ' 1. 2. Answer think <think> </think> <answer> </answer> ½ ² \\boxed{ é 日".split(), "\n",
    "\r\n", "\u202e", "\u2028", "\x00")


def test_200_texts_of_loose_words_give_no_traceback_and_no_grade_that_is_not_there():
  dice = random.Random(3)
  for _ in range(1000):
    text = " ".join(dice.choice(WORDS) for _ in range(dice.randint(0, 40)))
    found = read(wise.FORM.lenient, text)
    assert found is None or all(0 <= g <= 2 and str(g) in text for g in found.values())
    assert read(answers.yes_no, text) in ("yes", "no", None)
    for count in (1, 2, 3):
      listed = read(answers.yes_nos, text, count)
      assert listed is None or len(listed) == count and set(listed) <= {"yes", "no"}
      assert all(len(re.findall(w, text, re.I)) >= listed.count(w) for w in listed or ())


@pytest.mark.parametrize("text", ["<think>" * 200_000, "[" * 900_000, "1. " * 300_000,
    " " * 900_000, "*" * 900_000,
                                  "yes " * 12_000, "Consistency: " * 4_000, "| " * 24_000,
                                  "<answer>" * 100_000,
                                  "\n" * 49_000, "1. yes\n" * 7_000, "a" * 49_000, "?" * 49_000,
                                  '{"a":' * 9_000, "\\text{" * 8_000, "consistency (" * 3_800,
                                  "_" * 49_000, "consistency\n\n\n" * 3_800, "</s>" * 12_000,
                                  "max " * 12_000, "cannot see the " * 3_300, "a, " * 16_000, "so " * 16_000, "or, " * 12_000, "**" + "\n" * 40_000,
                                  "* " * 20_000 + "scale", "\r$" * 20_000 + "x",
                                  "x</s>" * 9_000, "\n user" * 8_000])
def test_a_long_answer_is_refused_or_read_at_once(text):
  for reader in (wise.FORM.lenient, answers.yes_no, lambda t: answers.yes_nos(t, 3)):
    assert read(reader, text) is None or "yes" in text


def test_answers_in_the_official_form_are_what_the_published_scripts_read():
  dice = random.Random(4)
  for _ in range(200):
    text = lines(*[dice.randrange(3) for _ in NAMES])
    assert wise.FORM.lenient(text) == wise.parse(text)
    said = "\n".join(f"{dice.choice(('yes', 'No', 'YES'))}, since it is" for _ in range(4))
    assert answers.yes_nos(said, 4) == tiif.parse(said, 4)


def choice(*pairs):
  top = [{"token": t, "logprob": math.log(p) if p else -9999.0} for t, p in pairs]
  return {"logprobs": {"content": [{"top_logprobs": top}]}}


@pytest.mark.parametrize("pairs, value", [
    ([("Yes", 0.6), (" yes", 0.1), ("No", 0.3)], 0.7), ([("**Yes", 0.9), ("No.", 0.1)], 0.9),
    ([("▁No", 0.999)], 0.0), ([("Ġyes", 0.5), ("no", 0.5)], 0.5), ([(" ", 0.5), ("yes", 0.4)], 0.4),
    ([("So", 0.56), ("Got", 0.44)], None), ([("<think>", 0.99), ("Yes", 0.01)], None),
    ([("Yes", 0.1), ("Well", 0.8)], None), ([("No", 0.5), ("Maybe", 0.4)], None),
    ([("Yes", 0.9), ("No", 0.9)], None), ([], None)])
def test_a_probability_is_a_score_if_yes_and_no_are_most_of_it(pairs, value):
  found = read(endpoint.yes_probability, choice(*pairs))
  assert found == (None if value is None else pytest.approx(value))


def test_200_made_up_first_tokens_give_the_share_of_yes_or_nothing():
  dice = random.Random(5)
  for _ in range(400):
    tokens = dice.sample(["Yes", "yes", " Yes", "No", "no", "NO", "So", "The", "<think>", "Well",
        " "], 6)
    weights = [dice.random() ** 4 for _ in tokens]
    weights = [w / sum(weights) for w in weights]
    share = lambda *words: sum(w for t, w in zip(tokens, weights) if t.strip().lower() in words)
    want = share("yes") if share("yes", "no") >= 0.5 * (1 - share("")) else None
    if want == 0:  # that nothing of yes is listed means 0 only if next to nothing is not listed
      want = 0.0 if min(0.0, *weights) < 0.005 else None
    found = read(endpoint.yes_probability, choice(*zip(tokens, weights)))
    assert found == (None if want is None else pytest.approx(want, abs=1e-9)), (tokens, weights)


@pytest.mark.parametrize("made", [None, {}, {"logprobs": None}, {"logprobs": {"content": []}},
    choice(("Yes", 1e9)),
                                  {"logprobs": {"content": [{"top_logprobs": [{"token": 3,
                                  "logprob": 0}]}]}},
                                  {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes",
                                  "logprob": "x"}]}]}},
                                  {"logprobs": {"content": [{"top_logprobs": [
                                      {"token": "Yes", "logprob": float("nan")}]}]}}])
def test_an_endpoint_that_tells_no_probabilities_gives_no_score(made):
  with pytest.raises(NoAnswer, match="does not tell"):
    endpoint.yes_probability(made)
