"""From what a job says of its data to micro-batches: stores checked, made, packed, shared out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from chat_cases import deepseek_tokenizer
from small_job import CONVERSATIONS, write_chats, write_job
from store_cases import RECIPE, write_store

from megatron_dsv3.commands import feed as feed_module
from megatron_dsv3.commands.feed import data_problems, open_feed
from megatron_dsv3.commands.resume import Progress
from megatron_dsv3.config.job import Job, load_job
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import TemplateName
from megatron_dsv3.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from megatron_dsv3.data.manifest import read_manifest
from megatron_dsv3.data.own_template import OWN
from megatron_dsv3.data.templates import TEMPLATES
from megatron_dsv3.model.groups import SharedError

HF_DIR = Path("/models/tiny")
SAMPLES = [([i + 2] * (3 + 2 * i), [[1, 3]]) for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


@pytest.fixture
def recipe(tokenizer):
    template = TEMPLATES["deepseek_r1"]
    return RECIPE.model_copy(
        update={
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template_fingerprint": template_fingerprint(template),
        }
    )


def make_job(directory: Path, *overrides: str, store: Path | None = None) -> Job:
    chats = directory / "chats.jsonl"
    if not chats.exists():
        write_chats(chats)
    path = write_job(directory, HF_DIR, chats)
    if store is not None:
        overrides = (f"data.store={store}", "data.paths=[]", "data.template=null", *overrides)
    return load_job(path, overrides)


# ---- Checks -------------------------------------------------------------------------------------


def test_a_store_of_this_tokenizer_and_template_has_no_problem(tmp_path, tokenizer, recipe):
    store = write_store(tmp_path / "store", SAMPLES, recipe)
    assert data_problems(make_job(tmp_path, store=store), tokenizer) == []
    job = make_job(tmp_path, "data.template=deepseek_r1", store=store)
    assert data_problems(job, tokenizer) == []


def test_another_tokenizer_and_template_are_named_all_at_once(tmp_path, tokenizer, recipe):
    store = write_store(tmp_path / "store", SAMPLES, RECIPE)
    other = write_store(tmp_path / "other", SAMPLES, recipe.model_copy(update={"template": OWN}))
    job = make_job(
        tmp_path, "data.template=deepseek_v3_1", f"validation.store={other}", store=store
    )
    ours = tokenizer_fingerprint(tokenizer)[:12]
    assert data_problems(job, tokenizer) == [
        f"data.store {store}: made with the tokenizer tttttttttttt, but that of {HF_DIR} is "
        f"{ours}; prepare it again with --model {HF_DIR}",
        f"data.store {store}: made with the template deepseek_r1, but data.template is "
        "deepseek_v3_1; prepare it again, or leave data.template out",
        f"validation.store {other}: made with the template tokenizer, but data.template is "
        "deepseek_v3_1; prepare it again, or leave data.template out",
    ]


def test_a_template_that_has_changed_since_is_named(tmp_path, tokenizer, recipe):
    changed = recipe.model_copy(update={"template_fingerprint": "f" * 64})
    store = write_store(tmp_path / "store", SAMPLES, changed)
    [problem] = data_problems(make_job(tmp_path, store=store), tokenizer)
    ours = template_fingerprint(TEMPLATES["deepseek_r1"])[:12]
    assert problem == (
        f"data.store {store}: made with the template deepseek_r1 as it was (ffffffffffff), but it "
        f"has changed since ({ours}); prepare it again"
    )


def test_another_treatment_of_earlier_reasoning_is_named(tmp_path, tokenizer, recipe):
    store = write_store(tmp_path / "store", SAMPLES, recipe)
    for wanted in ("null", "strip"):
        job = make_job(tmp_path, f"data.history_reasoning={wanted}", store=store)
        assert data_problems(job, tokenizer) == []
    [problem] = data_problems(
        make_job(tmp_path, "data.history_reasoning=keep", store=store), tokenizer
    )
    assert problem == (
        f"data.store {store}: made with --history-reasoning strip, but data.history_reasoning is "
        "keep; prepare it again, or leave data.history_reasoning out"
    )


def test_a_store_that_is_short_of_long_samples_is_told(tmp_path, tokenizer, groups, recipe):
    for length, lines in ((40, 0), (39, 1)):
        made = recipe.model_copy(update={"options": {"seq_length": length}})
        store = write_store(tmp_path / str(length), SAMPLES, made)
        told: list[str] = []
        job = make_job(tmp_path, "data.seq_length=40", store=store)
        open_feed(job, tokenizer, groups, told.append, num_mtp=1)
        assert len(told) == lines
    assert told[0].startswith(f"data: {store} was prepared with --seq-length 39, so it holds none")


def test_what_is_not_there_is_named(tmp_path, tokenizer):
    unfinished = write_store(tmp_path / "store", SAMPLES)
    (unfinished / "manifest.json").unlink()
    job = make_job(tmp_path, f"validation.paths=[{tmp_path}/nowhere.jsonl]", store=unfinished)
    assert data_problems(job, tokenizer) == [
        f"data: {unfinished}: no complete store there; write one with `megatron-dsv3 prepare`, or "
        "give the chat files as paths",
        f"validation: {tmp_path}/nowhere.jsonl: no such file",
    ]


def test_a_job_knows_all_templates():
    assert set(get_args(TemplateName)) == {*TEMPLATES, OWN}


# ---- Preparing ----------------------------------------------------------------------------------


def test_chat_files_are_prepared_once_and_again_when_they_change(tmp_path, tokenizer, groups):
    told: list[str] = []
    job = make_job(tmp_path)

    def read() -> list[int]:
        feed = open_feed(job, tokenizer, groups, told.append, num_mtp=1)
        assert feed.train.store.directory == tmp_path / "log" / "data" / "train"
        return feed.train.store.lengths.tolist()

    first = read()
    assert len(first) == len(CONVERSATIONS)
    assert re.match(rf"data: preparing 1 files of 0\.\d MB as {tmp_path}/log/data/train", told[-2])
    assert re.match(r"data: 6 rows into 6 samples, 0 dropped, 0 truncated; report in ", told[-1])
    assert read() == first
    assert told[-1] == f"data: {tmp_path / 'log' / 'data' / 'train'} is prepared already"
    write_chats(tmp_path / "chats.jsonl", CONVERSATIONS[:4])
    assert read() == first[:4]
    job = make_job(tmp_path, "data.template=deepseek_v3_1")
    assert read() != first[:4]
    assert read_manifest(tmp_path / "log/data/train").recipe.template == "deepseek_v3_1"


def test_a_damaged_store_of_chat_files_is_prepared_anew(tmp_path, tokenizer, groups):
    told: list[str] = []
    job = make_job(tmp_path)
    feed = open_feed(job, tokenizer, groups, told.append, num_mtp=1)
    path = feed.train.store.directory / "tokens.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    told.clear()
    open_feed(job, tokenizer, groups, told.append, num_mtp=1)
    assert re.match(
        r"data: prepared anew: .*train: manifest\.json gives tokens\.bin the h", told[0]
    )
    assert path.read_bytes() == whole


def test_a_long_preparation_says_how_far_it_is(tmp_path, tokenizer, groups, monkeypatch):
    monkeypatch.setattr(feed_module, "_SECONDS_BETWEEN_LINES", 0)
    told: list[str] = []
    open_feed(make_job(tmp_path), tokenizer, groups, told.append, num_mtp=1)
    assert re.fullmatch(r"data: 100% read, 6 rows, [\d,]+ rows/s, 0 s left", told[1])


def test_turns_are_expanded_into_samples_where_the_job_says_so(tmp_path, tokenizer, groups):
    turns = [turn for chat in CONVERSATIONS[:3] for turn in chat["messages"]]
    write_chats(tmp_path / "chats.jsonl", [{"messages": turns}])
    job = make_job(tmp_path, "data.history_reasoning=expand", "data.seq_length=120")
    feed = open_feed(job, tokenizer, groups, lambda _: None, num_mtp=1)
    ids = [feed.train.store.id(i) for i in range(len(feed.train.store))]
    assert [name.rpartition("#")[2] for name in ids] == ["1", "3", "5"]


def test_a_bad_row_is_every_ranks_error_and_leaves_nothing(tmp_path, tokenizer, groups):
    write_chats(tmp_path / "chats.jsonl", [CONVERSATIONS[0], {"messages": []}])
    job = make_job(tmp_path, f"data.cache_dir={tmp_path / 'cache'}")
    with pytest.raises(SharedError, match=r"chats\.jsonl:2 .*empty conversation"):
        open_feed(job, tokenizer, groups, lambda _: None, num_mtp=1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_with_a_changed_byte_is_refused(tmp_path, tokenizer, groups, recipe):
    store = write_store(tmp_path / "store", SAMPLES, recipe)
    content = bytearray((store / "tokens.bin").read_bytes())
    content[5] ^= 1
    (store / "tokens.bin").write_bytes(content)
    job = make_job(tmp_path, store=store)
    with pytest.raises(SharedError, match=r"gives tokens\.bin the hash .*, but it has"):
        open_feed(job, tokenizer, groups, lambda _: None, num_mtp=1)


# ---- Micro-batches ------------------------------------------------------------------------------


@pytest.fixture
def feed(tmp_path, tokenizer, groups, recipe):
    store = write_store(tmp_path / "store", SAMPLES, recipe)

    def make(*overrides: str):
        job = make_job(tmp_path, *overrides, store=store)
        return open_feed(job, tokenizer, groups, lambda _: None, num_mtp=1)

    return make


def ids_of(steps) -> list[list[tuple[str, ...]]]:
    return [[batch.sample_ids for batch in step.micro_batches] for step in steps]


def test_packed_rows_are_of_one_length_and_hold_every_sample_once_an_epoch(feed, groups):
    opened = feed("data.document_multiple=4", "train.num_epochs=3", "data.seq_length=32")
    steps = list(opened.batches(groups, Progress()))
    # 9 documents of 4 to 20 tokens: 4 + 8 + 20, 8 + 12 + 12, 16 + 16, 20
    assert len(opened.train) == 4
    assert opened.num_steps == len(steps) == 6
    batches = [batch for step in steps for batch in step.micro_batches]
    assert {tuple(batch.tokens.shape) for batch in batches} == {(1, 32)}
    seen = sorted(name for batch in batches for name in batch.sample_ids)
    assert seen == sorted(f"s:{i}" for i in range(9) for _ in range(3))
    assert all((batch.bounds % 4 == 0).all() for batch in batches)
    assert [step.epoch for step in steps] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_the_last_step_is_filled_with_empty_rows(feed, groups):
    opened = feed("train.global_batch_size=3", "data.document_multiple=4", "data.seq_length=32")
    last = list(opened.batches(groups, Progress()))[-1]
    assert [len(batch.sample_ids) > 0 for batch in last.micro_batches] == [True, False, False]
    assert last.micro_batches[-1].tokens.shape == (1, 32)
    assert last.micro_batches[-1].padding.all()


def test_unpacked_rows_are_padded_to_the_longest_of_them(feed, groups):
    overrides = ("data.packed=false", "train.micro_batch_size=2", "train.global_batch_size=2")
    batches = [b for s in feed(*overrides).batches(groups, Progress()) for b in s.micro_batches]
    assert len(batches) == 5
    for batch in batches:
        assert batch.tokens.shape == (2, int(batch.lengths.max()))
    staged = feed(*overrides)
    staged = replace(staged, job=staged.job.model_copy(update={"parallel": Parallel(pp_size=2)}))
    for together in (staged, feed(*overrides, "experts.dispatcher=allgather")):
        for step in together.batches(groups, Progress()):
            assert step.micro_batches[0].tokens.shape == (2, 40)


@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_run_goes_on_exactly_at_another_number_of_ranks(feed, groups, packed):
    opened = feed(
        f"data.packed={packed}",
        "data.seq_length=22",
        "train.global_batch_size=4",
        "train.num_epochs=5",
    )
    whole = list(opened.batches(groups, Progress()))
    for done in (1, 4):
        progress = Progress(done, whole[done - 1].after)
        ranks = [
            list(opened.batches(replace(groups, dp_rank=rank, dp_size=2), progress))
            for rank in range(2)
        ]
        dealt = [
            [batch for pair in zip(*steps, strict=True) for batch in pair]
            for steps in zip(*map(ids_of, ranks), strict=True)
        ]
        assert dealt == ids_of(whole[done:])
        assert [step.after for step in ranks[0]] == [step.after for step in whole[done:]]


def test_validation_is_one_batch_of_all_rows(feed, groups, tmp_path):
    opened = feed(f"validation.store={tmp_path / 'store'}", "data.seq_length=22")
    two = [replace(groups, dp_rank=rank, dp_size=2) for rank in range(2)]
    shares = [opened.validation_batches(rank) for rank in two]
    assert len(shares[0]) == len(shares[1])
    names = [name for share in shares for batch in share for name in batch.sample_ids]
    assert sorted(names) == [f"s:{i}" for i in range(9)]
    assert feed().validation_batches(groups) == []
    for vpp_size, number in ((1, 5), (2, 8)):
        parallel = Parallel(pp_size=4, vpp_size=vpp_size)
        staged = replace(opened, job=opened.job.model_copy(update={"parallel": parallel}))
        batches = staged.validation_batches(groups)
        assert len(batches) == number, "virtual stages take four at a time"
        assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(names)


def test_the_identity_follows_the_content_not_the_place(feed, tmp_path, tokenizer, groups, recipe):
    moved = write_store(tmp_path / "moved", SAMPLES, recipe)
    elsewhere = make_job(tmp_path, store=moved)
    same = open_feed(elsewhere, tokenizer, groups, lambda _: None, num_mtp=1).identity
    assert feed().identity == same
    assert same["samples"] == 9
    changed = feed("data.document_multiple=4").identity
    assert {key for key in same if same[key] != changed[key]} == {"document_multiple", "rows"}
