"""docs/troubleshooting.md and its Chinese page list every message, and none that is gone."""

import re
from functools import cache
from pathlib import Path

import pytest
from source_messages import FILLED, advised, found, raised, said_by_scripts, texts

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_dsv3"
ENGLISH = ROOT / "docs" / "troubleshooting.md"
CHINESE = ROOT / "docs" / "zh" / "troubleshooting.md"
MESSAGES = re.compile("^## (?:Messages|\u6d88\u606f)$", re.MULTILINE)
OUR_MISTAKE = re.compile("^### .*(?:our mistake|\u6211\u4eec\u7684\u9519)$", re.MULTILINE)
ROW = re.compile(r"^\| (`+) ?(.+?) ?\1 \|(?: (.+) \|)?$", re.MULTILINE)
SCRIPTS = said_by_scripts(ROOT / "examples")
in_package = cache(lambda find: find(PACKAGE))
pages = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["english", "chinese"])


def listed(text: str) -> dict[str, str]:
    """Message and cause of each row of the page's last part."""
    _, messages = MESSAGES.split(text)
    return {row[1].replace(r"\|", "|"): row[2] for row in ROW.findall(messages)}


@pages
def test_every_message_is_listed_with_its_cause(page):
    text = page.read_text(encoding="utf-8")
    rows = listed(text)
    messages = in_package(raised) | in_package(advised) | in_package(found) | SCRIPTS
    missing = {text: file for text, file in messages.items() if text.rstrip() not in rows}
    assert not missing, f"not in {page.relative_to(ROOT)}:\n" + "\n".join(
        f"  {file}: {text}" for text, file in missing.items()
    )
    _, ours = OUR_MISTAKE.split(text)
    without = [text for text, cause in rows.items() if not cause and f"`{text}`" not in ours]
    assert not without, f"no cause is given for {without}"


@pages
def test_no_message_is_listed_that_is_gone(page):
    known = {
        text.rstrip() for text in in_package(texts) | in_package(raised).keys() | SCRIPTS.keys()
    }
    gone = [text for text in listed(page.read_text(encoding="utf-8")) if text not in known]
    assert not gone, "no longer in the source:\n  " + "\n  ".join(gone)


def test_both_languages_list_the_same_messages_in_the_same_order():
    english, chinese = (listed(page.read_text(encoding="utf-8")) for page in (ENGLISH, CHINESE))
    assert [*english] == [*chinese]
    for text, cause in chinese.items():
        assert not cause or re.search(r"[\u4e00-\u9fff]", cause), text


def test_a_new_message_and_a_changed_one_are_found(tmp_path):
    (tmp_path / "a.py").write_text(
        'raise ValueError(f"{path}: expected a door, got {x!r}; " + f"open it {y}")\n'
        'raise RowError("kind", "no door in this house")\nraise ValueError(problem)\n'
    )
    first, second = raised(tmp_path)
    assert first == "*: expected a door, got *; open it *".replace("*", FILLED)
    assert second == "no door in this house"
    (tmp_path / "a.py").write_text(
        '''"""Help; use it."""\nproblems.append(f"{name} is odd; use {even}" "!")\n'''
        """way_out = "; use an even one"\ntyper.Option(help="Odd; use it.")\n"""
    )
    assert [*advised(tmp_path)] == [f"{FILLED} is odd; use {FILLED}!"]
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "a_check.py").write_text('what = listed("doors differ", doors)\n')
    assert [*found(tmp_path)] == ["doors differ"]
    (tmp_path / "a.sh").write_text('die "--${name//-/_}: no door; try $other"\necho "shut" >&2\n')
    assert [*said_by_scripts(tmp_path)] == [f"--{FILLED}: no door; try {FILLED}"]
    assert listed(f"## Messages\n| `{second}` | It is gone. |") == {second: "It is gone."}
    assert listed("## Messages\n| `` a `b` \\| c `` | d |") == {"a `b` | c": "d"}
