"""Answers survive a kill, a torn line and sealing; a question is asked again only if it or its inputs changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from eval.judging.answers import JOURNAL, SEALED, Answers

ROWS = [((f"{i:064x}", f"question {i} \u2028 é", "judge1"), {"answer": i}) for i in range(20)]


def written(folder, rows=ROWS):
    with Answers(folder, write=True) as answers:
        answers.add(rows)


def test_what_was_added_is_read_again(tmp_path):
    written(tmp_path)
    answers = Answers(tmp_path)
    assert len(answers) == 20 and all(answers[key] == value for key, value in ROWS)
    assert ("0" * 64, "another question", "judge1") not in answers


def test_a_torn_last_line_is_dropped_wherever_it_is_torn_and_everything_else_kept(tmp_path):
    written(tmp_path)
    data = (tmp_path / JOURNAL).read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(data)):
        (tmp_path / JOURNAL).write_bytes(data[:cut])
        assert len(Answers(tmp_path)) == 19
    with Answers(tmp_path, write=True) as answers:  # and what follows it is whole
        assert ROWS[-1][0] not in answers
        answers.add(ROWS[-1:])
    assert (tmp_path / JOURNAL).read_bytes() == data


def test_a_last_line_of_garbage_is_dropped(tmp_path):
    written(tmp_path)
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(b"\0\0\0\n")
    with Answers(tmp_path, write=True) as answers:
        assert len(answers) == 20
        answers.add([(("a", "b", "c"), 1)])
    assert len(Answers(tmp_path)) == 21


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    written(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().split(b"\n")
    lines[4] = lines[4][:10]
    (tmp_path / JOURNAL).write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"answers.jsonl, line 5 is damaged"):
        Answers(tmp_path)


def test_sealing_keeps_every_answer_and_its_bytes_do_not_depend_on_the_order(tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        with Answers(tmp_path / name, write=True) as answers:
            answers.add(rows)
            answers.seal()
        assert not (tmp_path / name / JOURNAL).exists()
        assert {key: Answers(tmp_path / name)[key] for key in Answers(tmp_path / name)} == dict(ROWS)
    assert (tmp_path / "a" / SEALED).read_bytes() == (tmp_path / "b" / SEALED).read_bytes()


def test_judging_goes_on_after_sealing(tmp_path):
    with Answers(tmp_path, write=True) as answers:
        answers.add(ROWS[:5])
        answers.seal()
    written(tmp_path, ROWS)
    with open(tmp_path / JOURNAL) as file:
        assert len(file.readlines()) == 15
    assert len(Answers(tmp_path)) == 20


def test_the_first_answer_to_a_question_stays(tmp_path):
    written(tmp_path, [(("i", "q", "j"), "yes"), (("i", "q", "j"), "no")])
    written(tmp_path, [(("i", "q", "j"), "maybe")])
    assert Answers(tmp_path)["i", "q", "j"] == "yes"


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    with Answers(tmp_path, write=True) as answers:
        answers.add(ROWS)
        assert len(Answers(tmp_path)) == 20
        with pytest.raises(ValueError, match="judged by another process"):
            Answers(tmp_path, write=True)


@pytest.mark.slow
def test_kills_at_random_points_lose_at_most_the_batch_under_way(tmp_path):
    def judge():
        with Answers(tmp_path, write=True) as answers:
            for i in range(0, 400, 4):
                answers.add([((str(k), "q", "j"), "x" * 500) for k in range(i, i + 4)])
            answers.seal()

    rng = random.Random(0)
    kept = 0
    for _ in range(20):
        child = multiprocessing.get_context("fork").Process(target=judge)
        child.start()
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert len(Answers(tmp_path)) >= kept
        kept = len(Answers(tmp_path))
    judge()
    assert {key[0] for key in Answers(tmp_path)} == {str(k) for k in range(400)}


def test_fifty_five_thousand_answers_are_read_in_a_second(tmp_path):
    with Answers(tmp_path, write=True) as answers:
        answers.add(
            [((f"{i // 13:064x}", f"is there a thing number {i % 13}?", "j" * 64), "yes") for i in range(55_000)]
        )
        answers.seal()
    begin = time.process_time()
    assert len(Answers(tmp_path)) == 55_000
    assert time.process_time() - begin < 1.5


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / SEALED).write_text(json.dumps([]))
    with pytest.raises(ValueError, match="answers.parquet is not a table of answers"):
        Answers(tmp_path)
