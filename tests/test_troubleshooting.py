"""docs/troubleshooting.md lists every message that users get, and none that is gone."""

import re
from pathlib import Path

from source_messages import FILLED, raised, texts

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_dsv3"
PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| (`+) ?(.+?) ?\1 \|(?: (.+) \|)?$", re.MULTILINE)


def listed(text: str) -> dict[str, str]:
    """Message and cause of each row of the page's last part."""
    messages = text.partition("## Messages")[2]
    return {row[1].replace(r"\|", "|"): row[2] for row in ROW.findall(messages)}


def test_every_message_is_listed_with_its_cause():
    rows = listed(PAGE.read_text(encoding="utf-8"))
    missing = {text: file for text, file in raised(PACKAGE).items() if text.rstrip() not in rows}
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(
        f"  {file}: {text}" for text, file in missing.items()
    )
    ours = PAGE.read_text(encoding="utf-8").partition("it is our mistake")[2]
    without = [text for text, cause in rows.items() if not cause and f"`{text}`" not in ours]
    assert not without, f"no cause is given for {without}"


def test_no_message_is_listed_that_is_gone():
    known = {text.rstrip() for text in texts(PACKAGE) | raised(PACKAGE).keys()}
    gone = [text for text in listed(PAGE.read_text(encoding="utf-8")) if text not in known]
    assert not gone, "no longer in the source:\n  " + "\n  ".join(gone)


def test_a_new_message_and_a_changed_one_are_found(tmp_path):
    (tmp_path / "a.py").write_text(
        'raise ValueError(f"{path}: expected a door, got {x!r}; " + f"open it {y}")\n'
        'raise RowError("kind", "no door in this house")\nraise ValueError(problem)\n'
    )
    first, second = raised(tmp_path)
    assert first == "*: expected a door, got *; open it *".replace("*", FILLED)
    assert second == "no door in this house"
    assert listed(f"## Messages\n| `{second}` | It is gone. |") == {second: "It is gone."}
    assert listed("## Messages\n| `` a `b` \\| c `` | d |") == {"a `b` | c": "d"}
