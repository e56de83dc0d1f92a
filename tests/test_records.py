"""Strict parsing of rows: usable rows exactly, unusable rows with their reason."""

import json
import pickle

import irgl_rows
import pytest
from irgl_rows import MODE, encoded, image_part, image, text, turns

from irg_jax.data.records import MODES, ImagePart, Record, Rejected, TextPart, parse_conversation


def parse(value, **options):
  return parse_conversation(irgl_rows.as_row(value), MODE, 7, **options)


def test_a_conversation_becomes_its_parts_in_order():
  data = image("JPEG")
  row = turns(text("plan"), image_part(data, need_vae=True, need_vit=True), text("better"),
              image_part(need_loss=True))
  assert parse(row) == Record(MODE, 7, (
      TextPart("a fox", False), TextPart("plan", True), ImagePart(data, False, True, True),
      TextPart("better", True), ImagePart(image(), True, False, False)))
  assert parse(json.dumps(row).encode()) == parse(row)


def test_images_and_texts_of_a_user_stand_in_their_order():
  shown = [image(seed=i) for i in range(3)]
  see = lambda data: image_part(data, need_vae=True, need_vit=True)
  row = [{"role": "user", "content": [see(shown[0]), text("put this"), see(shown[1]),
                                      text("into that", need_loss=True), see(shown[2])]},
         {"role": "assistant", "content": [image_part(need_loss=True)]}]
  seen = [ImagePart(data, False, True, True) for data in shown]
  assert parse(row).parts == (
      seen[0], TextPart("put this", False), seen[1], TextPart("into that", True), seen[2],
      ImagePart(image(), True, False, False))


def test_flags_that_are_written_out_win_over_the_defaults():
  row = [{"role": "user", "content": "x", "need_loss": True},
         {"role": "assistant", "content": [text("y", need_loss=False, need_vae=False)]}]
  assert parse(row).parts == (TextPart("x", True), TextPart("y", False))


def test_texts_are_kept_to_the_character():
  words = " <think>\n\té😀</think> \n"
  assert parse(turns(text(words))).parts[1].text == words


def test_line_breaks_in_base64_mean_nothing():
  broken = encoded(image()).replace("A", "A\r\n")
  assert parse(turns(image_part(need_loss=True) | {"content": broken})) == parse(
      turns(image_part(need_loss=True)))


@pytest.mark.parametrize("name", irgl_rows.BAD)
def test_one_unusable_part_rejects_the_row(name):
  row, reason, detail = irgl_rows.BAD[name]
  with pytest.raises(Rejected) as e:
    parse(row)
  assert e.value.reason == reason
  assert detail in e.value.detail
  assert str(e.value) == f"{reason}: {e.value.detail}"


def test_images_of_checked_rows_need_not_be_decoded_again():
  row = irgl_rows.BAD["truncated picture"][0]
  assert len(parse(row, decode=False).parts) == 2


def test_a_rejection_survives_the_way_between_processes():
  e = pickle.loads(pickle.dumps(Rejected("bad_json", "row 3")))
  assert (e.reason, e.detail, str(e)) == ("bad_json", "row 3", "bad_json: row 3")


def test_there_are_six_modes():
  assert len(set(MODES)) == 6 and MODE == MODES[5]
