import pytest
from chat_cases import assistant, deepseek_tokenizer, user
from prepare_cases import run, write_rows
from rich.console import Console

from megatron_dsv3.data import report_files
from megatron_dsv3.data.show import show
from megatron_dsv3.data.store import Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(report_files, "PICTURES", {})
    path = write_rows(
        tmp_path / "a.jsonl",
        [user("[bold]q[/]"), assistant("a", loss=False), user("\x1b[2Jr\n"), assistant("b\u202e")],
        [user("s"), assistant("c")],
    )
    run(tmp_path / "store", path)
    return Store(tmp_path / "store")


def test_counted_tokens_are_marked_and_nothing_else(store):
    first, second = show(store, deepseek_tokenizer(), 5, color=False)
    head, text = first.plain.split("\n", 1)
    assert head.endswith("a.jsonl:1: 22 tokens, 4 counted ---")
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>[bold]q[/]<｜Assistant｜>a<｜end▁of▁sentence｜>"
        "<｜User｜>\\x1b[2Jr\n<｜Assistant｜>⟦b\\x202e<｜end▁of▁sentence｜>⟧"
    )
    assert second.plain.endswith("<｜User｜>s<｜Assistant｜>⟦c<｜end▁of▁sentence｜>⟧")


def test_colour_says_the_same(store):
    [text] = show(store, deepseek_tokenizer(), 1, color=True)
    green = [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)]
    assert green == ["b\\x202e<｜end▁of▁sentence｜>"]
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[32mb\\x202e" in captured.get()
    assert "\x1b[2J" not in captured.get()
