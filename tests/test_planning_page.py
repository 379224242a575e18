"""The table of recommended layouts, in both languages, is what the search says now."""

import runpy
from pathlib import Path

import pytest
from documents import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_planning.py"))
QUESTIONS = {question.command: question for question in SCRIPT["QUESTIONS"]}
ENGLISH, CHINESE = ROOT / "docs" / "planning.md", ROOT / "docs" / "zh" / "planning.md"


def rows(page: Path) -> list[str]:
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("| `--") and "--seq-length " in line]


def test_the_table_has_a_row_for_every_question():
    assert [row.split("`")[1] for row in rows(ENGLISH)] == list(QUESTIONS)


def test_the_chinese_rows_are_the_english_ones_in_other_words():
    assert rows(CHINESE) == [SCRIPT["in_chinese"](row) for row in rows(ENGLISH)]
    words = {
        word for row in rows(ENGLISH) for word in row.split(" | ")[2].split(", ") if " " in word
    }
    assert words <= SCRIPT["CHINESE"].keys(), "add them to planning_zh.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("seq_length", [4096, 131072])
def test_rows_are_what_the_search_finds(seq_length):
    command = next(text for text in QUESTIONS if f"8 --seq-length {seq_length} " in text)
    assert SCRIPT["row"](QUESTIONS[command]) in rows(ENGLISH), "run write_planning.py"
