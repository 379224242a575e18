"""`megatron-dsv3 prepare` from outside: table, samples, remarks, and what a user can do wrong."""

import io
import json
import re
import sys

import pytest
from chat_cases import HF_DIR, assistant, user
from prepare_cases import GOOD, write_rows
from rich.console import Console

from megatron_dsv3 import cli
from megatron_dsv3.commands import prepare as command
from megatron_dsv3.data import report_files, workers
from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(report_files, "PICTURES", {})
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["megatron-dsv3", "prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def cells(text):
    """The table as a dictionary."""
    rows = (re.fullmatch(r"\W*(\S.*?)\s*[│|]\s*(\S.*?)\s*\W*", line) for line in text.splitlines())
    return {row.group(1): row.group(2) for row in rows if row}


def test_a_run_says_what_it_kept_and_what_not_and_shows_samples(call, tmp_path):
    thought = assistant("b", reasoning_content="r")
    path = write_rows(
        tmp_path / "a.jsonl",
        [user("q"), thought, user("s"), thought],
        [user("q")],
        [user("q"), assistant("word " * 99)],
        [user("<｜User｜>?"), assistant("r\n</think>\n\na")],
    )
    target = tmp_path / "store"
    options = ("--model", HF_DIR, "--template", "deepseek_r1", "--workers", "1")
    code, out, err = call(
        path, "--out", target, *options, "--seq-length", "64", "--on-bad-row", "skip", "--show", 1
    )
    assert code == 0, err
    table = cells(out)
    assert table["rows read"] == "4"
    assert table["rows kept"] == "2"
    assert table["rows skipped"] == "2"
    assert table["bad conversation"] == "1"
    assert table["longer than the sequence length"] == "1"
    assert table["samples kept"] == "2"
    assert table["packs of 64 tokens"] == "1"
    assert f"skipped: {path}:2 (byte " in out
    assert re.search(rf"did not fit: {path}:3: 10\d tokens", out)
    assert "not written: reasoning (counted): earlier turns' reasoning is stripped" in out
    assert "kept as text: <｜User｜> in the words of 1 samples\n" in out
    assert "kept as text: </think> in the words of 1 samples; is it the end of reasoning" in out
    assert "<｜Assistant｜>⟦b<｜end▁of▁sentence｜>⟧<｜User｜>s<｜Assistant｜>⟦<think>" in out
    assert f"wrote {target}, report in {target / 'report'}" in out
    assert json.loads((target / "report" / "report.json").read_text())["rows"]["kept"] == 2

    code, out, _ = call("--out", target, "--model", HF_DIR, "--show", 9)
    assert code == 0
    assert out.count(" counted ---") == 2
    code, _, err = call(path, "--out", target, "--model", HF_DIR, "--workers", "1")
    assert (code, err) == (2, f"error: {target}: holds a complete store already; name another "
                           "directory\n")  # fmt: skip


def test_a_terminal_of_80_columns_shows_rows_a_second_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(report_files, "PICTURES", {})
    monkeypatch.setattr(workers, "_BLOCK_ITEMS", 1)
    drawn = io.StringIO()
    command.run(
        [write_rows(tmp_path / f"{i}.jsonl", *[GOOD] * 3) for i in range(3)],
        tmp_path / "store",
        PrepareOptions(template="deepseek_v3", samples=SampleOptions(seq_length=64), num_workers=1),
        Console(file=drawn, force_terminal=True, width=80),
        hf_dir=HF_DIR,
    )
    frames = re.sub(r"\x1b\[[\d;?]*\w", "", drawn.getvalue()).split("\r")
    [*_, last] = [frame for frame in frames if "rows/s" in frame]
    assert re.search(r" 9 rows [\d,]+ rows/s \d:\d\d:\d\d left", last.strip())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{file}", "--template", "chatml"], "error: template: expected one of deepseek_v3, "),
        (["{file}", "--too-long", "cut"], "Invalid value for '--too-long'"),
        (["{file}", "--seq-length", "0"], "error: seq_length: expected at least 1, got 0"),
        (["{file}", "--workers", "0"], "error: num_workers: expected at least 1, got 0"),
        (["{tmp}/none.jsonl"], "error: {tmp}/none.jsonl: no such file"),
        (["{file}", "--model", "{tmp}"], "tokenizer.json: not found; expected the tokenizer files"),
        ([], "error: no input: name chat files, or --show N to look into a store"),
        (["--show", "-1"], "Invalid value for '--show'"),
        (["--show", "1"], "store: no such directory (no manifest.json); write it with"),
        (["{file}", "--out", "{file}/store"], "a.jsonl/store.unfinished: Not a directory"),
        (["{bad}"], "bad.jsonl:1 (byte 0): messages: no assistant turn to learn from"),
    ],
)
def test_a_mistake_ends_with_one_message_and_nothing_written(call, tmp_path, arguments, problem):
    names = {
        "file": write_rows(tmp_path / "a.jsonl", GOOD),
        "bad": write_rows(tmp_path / "bad.jsonl", [user("q")]),
        "tmp": tmp_path,
    }
    arguments = [argument.format(**names) for argument in arguments]
    code, _, err = call(
        "--model", HF_DIR, "--out", tmp_path / "store", "--workers", "1", *arguments
    )
    assert code == 2
    assert problem.format(**names) in " ".join(err.split()).replace("│ ", "")
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "bad.jsonl"}


def test_a_tokenizers_own_code_runs_only_where_it_is_trusted(call, tmp_path, monkeypatch):
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((HF_DIR / name).read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    options = (path, "--model", model, "--out", tmp_path / "store", "--workers", "1")
    code, _, err = call(*options)
    assert code == 2
    assert f"error: {model}: the tokenizer does not load: " in err
    assert not (tmp_path / "ran").exists()
    code, _, err = call(*options, "--trust-remote-code")
    assert code == 0, err
    assert (tmp_path / "ran").exists()
