"""From files to a store: the same samples as one by one, every row accounted for."""

import gzip
import hashlib
import importlib.resources
import json
import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd_file
from chat_cases import (
    BOS,
    EOS,
    THINKING,
    TOOL_LOOP,
    assistant,
    deepseek_tokenizer,
    reference_ids,
    spell,
    user,
)
from prepare_cases import GOOD, run, samples_of, write_rows

from megatron_dsv3.data import pipeline, report_files
from megatron_dsv3.data.chat import Rendered
from megatron_dsv3.data.store import STORE_FILES, Store
from megatron_dsv3.data.templates import TEMPLATES
from megatron_dsv3.data.tokens import encode


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """They take longer than all the rest; tests/test_report_files.py looks at them."""
    monkeypatch.setattr(report_files, "PICTURES", {})


def champ():
    source = importlib.resources.files("champ_dataset") / "dataset_files" / "v0.json"
    problems = json.loads(source.read_text(encoding="utf-8"))["problems"]
    for problem in problems.values():
        steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
        yield problem["_text"], steps, f"The answer is {problem['_answer']}."


def test_champ_has_the_published_formats_token_for_token(tmp_path, tokenizer):
    """With reasoning the text of R1's format; without it the tokenizer's own template."""
    rows = list(champ())
    thinking = [[user(q), assistant(a, reasoning_content=r)] for q, r, a in rows]
    plain = [[user(q), assistant(a)] for q, _, a in rows]
    path = write_rows(tmp_path / "champ.jsonl", *thinking, *plain)
    run(tmp_path / "store", path)
    samples = samples_of(tmp_path / "store")
    assert len(samples) == 2 * len(rows) == 540
    for (question, steps, answer), sample in zip(rows, samples, strict=False):
        asked = f"{BOS}<｜User｜>{question}<｜Assistant｜>"
        learned = f"<think>\n{steps}\n</think>\n\n{answer}{EOS}"
        expected = tokenizer.encode(asked + learned, add_special_tokens=False)
        assert sample.tokens.tolist() == expected
        num_asked = len(tokenizer.encode(asked, add_special_tokens=False))
        assert sample.loss.tolist() == [i >= num_asked for i in range(len(expected))]
    for messages, sample in zip(plain, samples[270:], strict=True):
        assert sample.tokens.tolist() == reference_ids(tokenizer, messages)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The same conversations in files of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    conversations = [THINKING, TOOL_LOOP, *([user(f"q{i}"), GOOD[1]] for i in range(200))]
    rows = [{"messages": messages} for messages in conversations]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    (folder / "1.jsonl").write_bytes(lines)
    (folder / "2.json").write_bytes(array)
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "4.json.zst").write_bytes(zstd_file.compress(array))
    pq.write_table(pa.Table.from_pylist(rows), folder / "5.parquet", row_group_size=100)
    return folder, [row["messages"] for row in rows]


def hashes(store):
    return {name: hashlib.sha256((store / name).read_bytes()).hexdigest() for name in STORE_FILES}


def test_every_kind_of_file_gives_the_same_samples_and_any_number_of_workers(
    tmp_path, mixed, tokenizer
):
    folder, rows = mixed
    report = run(tmp_path / "one", folder)
    assert [file.kind for file in report.files] == [
        "jsonl", "json", "jsonl+gzip", "json+zstd", "parquet"
    ]  # fmt: skip
    assert report.rows.read == report.rows.kept == 5 * len(rows)
    samples = samples_of(tmp_path / "one")
    for k, sample in enumerate(samples):
        messages = rows[k % len(rows)]
        if k < 3 or k % 101 < 2:
            alone = encode(messages, tokenizer, TEMPLATES["deepseek_r1"])
            assert sample.tokens.tolist() == alone.tokens.tolist()
            assert sample.loss.tolist() == alone.loss.tolist()
        first = samples[k % len(rows)]
        assert sample.tokens.tolist() == first.tokens.tolist()
        assert sample.loss.tolist() == first.loss.tolist()
    assert samples[len(rows)].id == f"{folder / '2.json'}:1"
    again = run(tmp_path / "three", folder, num_workers=3)
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    assert again.lengths == report.lengths
    manifests = [Store(tmp_path / name).manifest.recipe for name in ("one", "three")]
    assert manifests[0] == manifests[1]


def test_the_manifest_tells_how_the_store_was_made(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    run(tmp_path / "store", path, seq_length=99, too_long="truncate")
    recipe = Store(tmp_path / "store").manifest.recipe
    assert recipe.template == "deepseek_r1"
    assert recipe.options["seq_length"] == 99
    assert recipe.options["too_long"] == "truncate"
    [source] = recipe.sources
    assert (source.path, source.size) == (str(path), path.stat().st_size)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# ---- Options ------------------------------------------------------------------------------------

TWO_TURNS = [
    user("q"),
    assistant("a", reasoning_content="r"),
    user("s"),
    assistant("b", reasoning_content="t"),
]


@pytest.mark.parametrize(
    ("history", "texts"),
    [
        (
            "strip",
            ["<bos><user>q<assistant>a<eos><user>s<assistant><think>\nt\n</think>\n\nb<eos>"],
        ),
        (
            "keep",
            [
                "<bos><user>q<assistant><think>\nr\n</think>\n\na<eos>"
                "<user>s<assistant><think>\nt\n</think>\n\nb<eos>"
            ],
        ),
        (
            "expand",
            [
                "<bos><user>q<assistant><think>\nr\n</think>\n\na<eos>",
                "<bos><user>q<assistant>a<eos><user>s<assistant><think>\nt\n</think>\n\nb<eos>",
            ],
        ),
    ],
)
def test_history_reasoning(tmp_path, tokenizer, history, texts):
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS)
    report = run(tmp_path / "store", path, history_reasoning=history)
    samples = samples_of(tmp_path / "store")
    assert [spell(tokenizer.decode(sample.tokens)) for sample in samples] == texts
    stripped = {"reasoning (counted): earlier turns' reasoning is stripped, as when served": 1}
    if history == "expand":
        # Of the second sample only its last turn counts, so nothing that would be learned is gone.
        stripped = {key.replace("counted", "not counted"): 1 for key in stripped}
        assert [sample.id for sample in samples] == [f"{path}:1#1", f"{path}:1#3"]
        assert spell(tokenizer.decode(samples[1].tokens[samples[1].loss])).startswith("<think>\nt")
    assert report.not_written == ({} if history == "keep" else stripped)
    assert report.rows.kept == 1


@pytest.mark.parametrize("history", ["strip", "expand"])
def test_samples_do_not_depend_on_how_many_are_tokenised_at_once(tmp_path, monkeypatch, history):
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS, TOOL_LOOP, [user("q")], TWO_TURNS)
    options = {"history_reasoning": history, "on_bad_row": "skip"}
    report = run(tmp_path / "many", path, **options)
    monkeypatch.setattr(pipeline, "_CHARACTERS_AT_A_TIME", 1)
    assert run(tmp_path / "one", path, **options).rows == report.rows
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")


def test_the_samples_of_a_long_row_are_not_held_all(tmp_path, tokenizer, monkeypatch):
    """Expanded, a row is as long as its own length times its turns."""
    monkeypatch.setattr(pipeline, "_CHARACTERS_AT_A_TIME", 3000)
    alive, most = weakref.WeakSet(), 0
    real = pipeline.render

    def counted(*args, **options):
        nonlocal most
        rendered = Text(real(*args, **options))
        alive.add(rendered)
        most = max(most, sum(map(pipeline._length, alive)))
        return rendered

    class Text(Rendered):
        __slots__ = ("__weakref__",)
        __hash__ = object.__hash__

        def __init__(self, rendered):
            super().__init__(rendered.spans, rendered.dropped)

    monkeypatch.setattr(pipeline, "render", counted)
    turns = [[user("w " * 50), assistant("a " * 50)][i % 2] for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", turns)
    report = run(tmp_path / "store", path, history_reasoning="expand")
    assert report.samples.kept == 30
    whole = sum(len(turn["content"]) for turn in turns)
    assert most <= 2 * 3000 + 2 * whole < 30 * whole / 4
    assert [len(sample.loss) for sample in samples_of(tmp_path / "store")] == sorted(
        len(sample.loss) for sample in samples_of(tmp_path / "store")
    )


LONG = [user("q"), assistant("word " * 50)]
LATE = [user("word " * 50), assistant("a")]


def test_samples_that_are_too_long_are_counted_and_listed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD, LONG, LATE)
    report = run(tmp_path / "drop", path, seq_length=20)
    assert report.samples.dropped == {"longer than the sequence length": 2}
    assert [name for name, _ in report.samples.longest] == [f"{path}:2", f"{path}:3"]
    assert report.tokens.lost == sum(length for _, length in report.samples.longest)
    assert (report.rows.read, report.rows.kept, report.rows.without_sample) == (3, 1, 2)
    report = run(tmp_path / "truncate", path, seq_length=20, too_long="truncate")
    assert report.samples.truncated == 1
    assert report.tokens.lost == sum(length for _, length in report.samples.longest) - 20
    assert report.samples.dropped == {"no counted token within the sequence length": 1}
    assert [len(sample.tokens) for sample in samples_of(tmp_path / "truncate")] == [6, 20]
    with pytest.raises(ValueError, match=rf"{path}:2: \d+ tokens, but the sequence length is 20"):
        run(tmp_path / "error", path, seq_length=20, too_long="error", on_bad_row="skip")
    assert not (tmp_path / "error").exists()


def test_skipped_rows_are_counted_with_their_reason_and_the_rest_is_kept(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD, [user("q")], GOOD)
    path.write_text(path.read_text() + 'no json\n{"text": 1}\n' + json.dumps({"messages": GOOD}))
    cut = tmp_path / "b.json"
    cut.write_text(json.dumps([{"messages": GOOD}] * 3)[:-40])
    report = run(tmp_path / "store", path, cut, on_bad_row="skip")
    assert report.faults.by_reason == {
        "bad conversation": 1,
        "not JSON": 1,
        "unknown schema": 1,
        "file cut off": 1,
    }
    rows = report.rows
    assert (rows.read, rows.kept, rows.faulty, rows.without_sample) == (8, 5, 3, 0)
    assert report.faults.files_given_up == 1
    ids = [sample.id for sample in samples_of(tmp_path / "store")]
    assert ids == [f"{path}:1", f"{path}:3", f"{path}:6", f"{cut}:1", f"{cut}:2"]
    assert "at row 3; is it cut off?" in report.faults.examples[3]


def test_the_counts_of_a_report_add_up(tmp_path, mixed):
    folder, _ = mixed
    bad = write_rows(tmp_path / "bad.jsonl", [user("q")], LONG, LATE, TWO_TURNS)
    report = run(
        tmp_path / "store", bad, folder, history_reasoning="expand", seq_length=40,
        on_bad_row="skip",
    )  # fmt: skip
    rows, samples = report.rows, samples_of(tmp_path / "store")
    assert rows.read == rows.kept + rows.faulty + rows.without_sample
    assert rows.faulty == sum(report.faults.by_reason.values()) == 1
    assert report.samples.kept == len(samples) == sum(report.lengths.counts)
    assert report.samples.kept == sum(report.counted_share.counts)
    assert report.packing.rows == sum(report.packing.fill_of_rows.counts)
    assert report.tokens.kept == sum(len(sample.tokens) for sample in samples)
    assert report.tokens.counted == sum(int(sample.loss.sum()) for sample in samples)
    assert sum(report.lengths_too_long.counts) == sum(report.samples.dropped.values())
    assert 0 < report.packing.fill <= 1
    assert report.packing.fill == report.tokens.kept / (report.packing.rows * 40)


def test_a_tokenizers_own_template_goes_through_workers(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *[TOOL_LOOP[:5]] * 3)
    run(tmp_path / "store", path, template="tokenizer", num_workers=2)
    for sample in samples_of(tmp_path / "store"):
        assert sample.tokens.tolist() == reference_ids(tokenizer, TOOL_LOOP[:5])
    assert Store(tmp_path / "store").manifest.recipe.template == "tokenizer"
