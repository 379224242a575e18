"""Two conversations by hand, from their JSON to the tensors that a training step takes."""

import json
from pathlib import Path

from chat_cases import assistant, deepseek_tokenizer, user
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_job import write_chats, write_job

from megatron_dsv3.commands.feed import open_feed
from megatron_dsv3.config.job import load_job
from megatron_dsv3.train.step import to_row

BOS, EOS, USER, ASSISTANT, THINK, THINK_END = 0, 1, 128803, 128804, 128798, 128799
SURE, QUESTION, YES, STOP, LINE, LINES, TWO, FOUR = 53624, 2755, 10240, 16, 201, 271, 20, 22

FIRST = [user("Sure?\n"), assistant("Yes.", reasoning_content="Yes")]
LEARNED = [THINK, LINE, YES, LINE, THINK_END, LINES, YES, STOP, EOS]
SECOND = [user("2"), assistant("4"), user("2"), assistant("4", loss=False)]
# The first takes 14 of 16 places, the second 11 of 12; 4 are left, all filled with EOS.
ROW = [
    *(BOS, USER, SURE, QUESTION, ASSISTANT, *LEARNED, EOS, EOS),
    *(BOS, USER, TWO, ASSISTANT, FOUR, EOS, USER, TWO, ASSISTANT, FOUR, EOS, EOS),
    *(EOS, EOS, EOS, EOS),
]


def targets(depth):
    """Labels and mask: what is learned stands 1 + depth places before where it is read."""
    labels, mask = [0] * 32, [0.0] * 32
    for start, learned in ((5, LEARNED), (16 + 4, [FOUR, EOS])):
        for place, token in enumerate(learned, start=start - 1 - depth):
            labels[place], mask[place] = token, 1.0
    return labels, mask


def test_two_conversations_by_hand(tmp_path, groups):
    chats = write_chats(tmp_path / "chats.jsonl", [{"messages": m} for m in (FIRST, SECOND)])
    overrides = ["data.seq_length=32", "data.document_multiple=4"]
    job = load_job(write_job(tmp_path, Path("/models/tiny"), chats), overrides)
    feed = open_feed(job, deepseek_tokenizer(), groups, lambda _: None, num_mtp=2)

    store = tmp_path / "log" / "data" / "train"
    stored = [document.tolist() for document in IndexedDataset(str(store / "tokens"))]
    assert stored == [ROW[:14], ROW[16:27]]
    spans = [document.tolist() for document in IndexedDataset(str(store / "spans"))]
    assert spans == [[5, 14], [4, 6]]
    report = json.loads((store / "report" / "report.json").read_text())
    assert (report["tokens"]["kept"], report["tokens"]["counted"]) == (25, 11)

    assert len(feed.train) == 1
    batch = feed.to_batch([feed.train[0]])
    assert batch.sample_ids == (f"{chats}:1", f"{chats}:2")
    assert batch.tokens.tolist() == [ROW]
    assert batch.position_ids.tolist() == [[*range(16), *range(12), *range(4)]]
    for depth in range(3):
        labels, mask = targets(depth)
        assert batch.labels[depth].tolist() == [labels]
        assert batch.loss_mask[depth].tolist() == [mask]

    row = to_row(batch, groups)
    assert row.packed.cu_seqlens_q.tolist() == [0, 16, 28, 32]
    # In the statistics of depth k a document has k tokens less: behind them there is nothing of it.
    for depth in range(3):
        sizes = ((0, 14 - depth), (-1, 2 + depth), (1, 11 - depth), (-1, 5 + depth))
        expected = [number for number, size in sizes for _ in range(size)]
        assert row.packed.documents[depth].tolist() == expected
