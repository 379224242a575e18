"""The page of settings in Chinese is the English one in other words, and knows when it is not."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_settings.py"))
CATALOGUE = yaml.safe_load(SCRIPT["CATALOGUE"].read_text(encoding="utf-8"))
SPANS = re.compile(r"`[^`]+`")


def problems(catalogue: dict) -> list[str]:
    language = SCRIPT["Chinese"](catalogue)
    SCRIPT["page"](language)
    return language.problems()


def changed(part: str, **entries: object) -> dict:
    """The catalogue with other entries; None takes one away."""
    merged = CATALOGUE[part] | entries
    return CATALOGUE | {part: {key: value for key, value in merged.items() if value is not None}}


def test_the_page_is_what_the_catalogue_says():
    language = SCRIPT["Chinese"](CATALOGUE)
    text = SCRIPT["page"](language)
    assert language.problems() == []
    written = (ROOT / "docs" / "zh" / "settings.md").read_text(encoding="utf-8")
    assert written == text, "run python scripts/write_settings.py"


@pytest.mark.parametrize(
    ("part", "key", "entry", "found"),
    [
        ("texts", "optimizer.lr", None, "texts.optimizer.lr: no translation of: Learning rate"),
        ("texts", "optimizer", {"en": "Adam.", "zh": "Adam."}, "texts.optimizer: translates an"),
        ("texts", "optimizer.rate", {"en": "a", "zh": "b"}, "texts.optimizer.rate: no longer"),
        ("words", "whole number", None, "words.whole number: no translation of: whole number"),
        ("words", "half number", "b", "words.half number: no longer asked for"),
    ],
)
def test_what_is_missing_changed_or_left_over_is_named(part, key, entry, found):
    [line] = problems(changed(part, **{key: entry}))
    assert line.startswith(f"settings_zh.yaml: {found}")


def test_translations_are_chinese_and_keep_numbers_and_names():
    for key, entry in CATALOGUE["texts"].items():
        assert re.search(r"[\u4e00-\u9fff]", entry["zh"]), key
        english, chinese = (set(SPANS.findall(entry[lang])) for lang in ("en", "zh"))
        assert english <= chinese, (key, english - chinese)
        numbers = [set(re.findall(r"\d+(?:\.\d+)*", entry[lang])) for lang in ("en", "zh")]
        assert numbers[0] == numbers[1], (key, numbers)


def test_check_names_the_key_and_fails(monkeypatch, tmp_path, capsys):
    entry = CATALOGUE["texts"]["optimizer.lr"] | {"en": "Another text."}
    catalogue = tmp_path / "settings_zh.yaml"
    text = yaml.safe_dump(changed("texts", **{"optimizer.lr": entry}), allow_unicode=True)
    catalogue.write_text(text, encoding="utf-8")
    monkeypatch.setitem(SCRIPT["main"].__globals__, "CATALOGUE", catalogue)
    monkeypatch.setattr("sys.argv", ["write_settings.py", "--check"])
    assert SCRIPT["main"]() == 1
    assert (
        "texts.optimizer.lr: translates another text than: Learning rate" in capsys.readouterr().out
    )
