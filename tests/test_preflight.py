"""Which nodes a job is started on: what they report, what is wrong with one, what it will take."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_job import write_chats, write_job, write_model

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.job import load_job
from megatron_dsv3.launch.links import Floors, node_rates, slowest_groups
from megatron_dsv3.launch.needs import Needs, bytes_in, decimal, needs_of
from megatron_dsv3.launch.node_report import Device, Disk, NodeReport, read_report, write_report
from megatron_dsv3.launch.samples import WHOLE, model_files, sampled_hash
from megatron_dsv3.launch.verdict import Wanted, choose, judge

GIB = 1 << 30
NOTHING = Wanted(Needs(0, 0, 0, 0), {}, 1)


def _report(node: str, **changes) -> NodeReport:
    disk = Disk(folder="/ckpt", free=10**13, device=1, writable=True)
    values = {
        "node": node,
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "devices": [Device(name="H100", free=79 * GIB, total=80 * GIB)] * 8,
        "memory_free": 1900 * GIB,
        "memory_total": 2000 * GIB,
        "shm_free": 1000 * GIB,
        "disks": {"checkpoints": disk, "output": disk},
        "model": "m",
        "data": "d",
        "problems": [],
    }
    return NodeReport(**values | changes)


def _problems(*changed: NodeReport | None, wanted: Wanted = NOTHING) -> dict[str, list[str]]:
    """Of three sound nodes a, b, c, some of them replaced."""
    reports: dict[str, NodeReport | None] = {name: _report(name) for name in "abc"}
    reports |= {one.node: one for one in changed if one is not None}
    if None in changed:
        reports["b"] = None
    return judge(reports, wanted)


# ---- verdict ------------------------------------------------------------------------------------


def test_equal_and_sound_nodes_are_fit():
    assert _problems() == {"a": [], "b": [], "c": []}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"python": "3.12.1", "torch": "2.10.0"}}, "torch 2.10.0, but 2.11.0 on"),
        ({"versions": {"python": "3.12.1"}}, "torch not installed, but 2.11.0"),
        ({"devices": [Device(name="H100", free=79, total=80)] * 7}, "7 x H100, but 8 x H100"),
        ({"devices": []}, "GPUs: none, but 8 x H100"),
        (
            {"devices": [Device(name="H100", free=40 * GIB, total=80 * GIB)] * 8},
            "GPU 7: 40.0 of 80.0 GiB free; something else uses it",
        ),
        ({"model": "other"}, "model's hash is other, but m on other nodes"),
        ({"data": "other"}, "data's hash is other"),
        ({"shm_free": 1 << 26}, "/dev/shm: 0.06 GiB free"),
        ({"problems": ["data cannot be read: gone"], "data": ""}, "data cannot be read: gone"),
    ],
)
def test_the_node_that_differs_is_named(changes, said):
    found = _problems(_report("b", **changes))
    assert found["a"] == found["c"] == []
    assert said in "; ".join(found["b"])


def test_a_node_without_a_report_is_named():
    assert _problems(None)["b"] == ["reported nothing; see what it wrote to the log"]


def test_memory_of_the_host_is_asked_for_by_node():
    wanted = Wanted(Needs(0, 0, 0, host=2 * 1900 * GIB + 2), {}, 2)
    assert "1,900 GiB free, but the job takes 1,900 a node" in _problems(wanted=wanted)["a"][0]
    wanted = Wanted(Needs(0, 0, 0, host=2 * 1900 * GIB), {}, 2)
    assert _problems(wanted=wanted)["a"] == []


def test_disks_are_added_up_where_they_are_one():
    needs = Needs(checkpoint=0, checkpoints=6 * 10**12, output=5 * 10**12, host=0)
    one = _problems(wanted=Wanted(needs, {}, 3))["a"]
    assert "/ckpt, /ckpt: 10 TB free, but checkpoints and output will take 11 TB more" in one[0]
    other = Disk(folder="/out", free=10**13, device=2, writable=True)
    apart = _report("b", disks={"checkpoints": _report("b").disks["checkpoints"], "output": other})
    assert _problems(apart, wanted=Wanted(needs, {}, 3))["b"] == []
    there = Wanted(needs, {"checkpoints": 10**12}, 3)
    assert _problems(wanted=there)["a"] == []


def test_spares_take_the_place_of_nodes_that_are_not_fit():
    problems = {"a": [], "b": ["slow"], "c": [], "d": []}
    assert choose(problems, needed=2) == ["a", "c"]
    assert choose(problems, needed=3) == ["a", "c", "d"]
    with pytest.raises(ValueError, match=r"3 of 4 nodes are fit, 4 are needed.*\n  b: slow"):
        choose(problems, needed=4)
    with pytest.raises(ValueError, match="a, b: full"):
        choose({"a": ["full"], "b": ["full"], "c": []}, needed=2)


def test_reports_survive_their_file(tmp_path):
    report = _report("node7")
    write_report(report, tmp_path / "reports")
    assert read_report(tmp_path / "reports", "node7") == report
    assert read_report(tmp_path / "reports", "node8", patience_s=0.1) is None
    (tmp_path / "node9.json").write_text('{"node": 1}')
    with pytest.raises(ValueError, match=r"node9.json: not a node's report: node: "):
        read_report(tmp_path, "node9")


# ---- needs --------------------------------------------------------------------------------------


def _job(tmp_path: Path, **sections):
    path = write_job(tmp_path, tmp_path / "m", tmp_path / "c.jsonl", **sections)
    content = yaml.safe_load(path.read_text())
    content["precision"] = {"compute": "bf16", **sections.get("precision", {})}
    content["output"] |= {"dtype": "bf16"}
    path.write_text(yaml.safe_dump(content))
    return load_job(path)


def test_the_671b_takes_what_its_parameters_take(tmp_path):
    """682,636,472,320 parameters, of which MTP 11,610,067,968: the published numbers."""
    trained = 671_026_404_352 + 11_610_067_968
    job = _job(tmp_path, checkpoint={"keep_last": 2}, train={"num_steps": 1000})
    needs = needs_of(job, DEEPSEEK_V3)
    assert needs.checkpoint == trained * 14
    assert needs.checkpoints == trained * 14 * 3
    # MTP's copies of embedding and head, and the experts' biases in fp32, stand in the files too.
    exported = (trained + 2 * 129280 * 7168) * 2 + 59 * 256 * 4
    assert needs.output == exported
    # Copied to pinned memory: an expert's 2048 x 7168 numbers take 2^24, 8/7 of it.
    assert needs.host == trained * 16
    job = _job(
        tmp_path,
        checkpoint={"every_steps": 100, "keep_last": 1, "keep_weights_every": 250,
                    "export_hf_every_steps": 300, "asynchronous": False},
        train={"num_steps": 1000},
        optimizer={"offload_fraction": 0.5},
        mtp={"mode": "off"},
    )  # fmt: skip
    needs, without = needs_of(job, DEEPSEEK_V3), 671_026_404_352
    assert needs.checkpoints == without * 14 * 2 + without * 2 * 2  # at 500 and 1000
    assert needs.output == exported * 4
    # Half of the states are on the host (16 bytes with gradients); the rest is copied there.
    assert needs.host == pytest.approx(without * (8 + 8 * 8 / 7))
    job = _job(tmp_path, optimizer={"offload_fraction": 0.5})
    assert needs_of(job, DEEPSEEK_V3).host == pytest.approx(trained * (8 + 8 * 8 / 7 + 6))
    assert needs_of(_job(tmp_path, checkpoint={"every_steps": None}), DEEPSEEK_V3).checkpoints == 0


def test_sizes_are_told_in_decimal_units():
    sizes = {0: "0 B", 999: "999 B", 9_556_910_612_480: "9.557 TB", 10**15: "1,000 TB"}
    assert {size: decimal(size) for size in sizes} == sizes


# ---- hashes -------------------------------------------------------------------------------------


def test_files_of_a_model_are_told_apart_by_samples(tmp_path):
    big = tmp_path / "model.safetensors"
    content = bytearray(itertools.islice(itertools.cycle(range(251)), 3 * WHOLE))
    big.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.pdf").write_text("no part of it")
    assert [path.name for path in model_files(tmp_path)] == ["config.json", "model.safetensors"]
    first = sampled_hash(model_files(tmp_path))
    assert first == sampled_hash(model_files(tmp_path))
    for place in (0, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        big.write_bytes(changed)
        assert sampled_hash(model_files(tmp_path)) != first
    big.write_bytes(content[:-1])
    assert sampled_hash(model_files(tmp_path)) != first
    big.write_bytes(content)
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    assert sampled_hash(model_files(tmp_path)) != first
    with pytest.raises(FileNotFoundError, match="no such directory, or no model in it"):
        model_files(tmp_path / "elsewhere")


# ---- links --------------------------------------------------------------------------------------


def test_a_slow_node_is_told_from_its_neighbours():
    """Node 3 of 7 slows its partners in each round; only it is slow in both."""
    nodes = [f"n{i}" for i in range(7) for _ in range(2)]
    rounds = []
    for i in range(7):
        slowed = [3 in (i, (i + d) % 7, (i - d) % 7) for d in (1, 2)]
        rounds += [[1.0 if slow else 40.0 for slow in slowed]] * 2
    rates = node_rates(nodes, rounds)
    assert [node for node, rate in rates.items() if rate < 10] == ["n3"]
    assert node_rates(["a", "a"], [[], []]) == {}


def test_groups_that_are_too_slow_name_their_nodes():
    nodes, floors = ["a", "a", "b", "b", "c", "c"], Floors(across=10.0, inside=100.0)
    tp = [(300.0, [0, 1])] * 2 + [(50.0, [2, 3]), (200.0, [2, 3])] + [(300.0, [4, 5])] * 2
    groups, slow = slowest_groups(nodes, [{"tp": one} for one in tp], floors)
    assert groups == {"tp": (50.0, ("b",))}
    assert slow == {"b": "tp: 50.00 GB/s, expected 100 and more"}
    # b is fast together with a, so c is what holds up the other group
    dp = [
        (40.0, [0, 2]),
        (5.0, [3, 5]),
        (40.0, [0, 2]),
        (5.0, [3, 5]),
        (5.0, [3, 5]),
        (5.0, [3, 5]),
    ]
    groups, slow = slowest_groups(nodes, [{"dp": one} for one in dp], floors)
    assert groups == {"dp": (5.0, ("b", "c"))}
    assert slow == {"c": "dp: 5.00 GB/s, expected 10 and more"}


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    write_model(directory / "model")
    write_job(directory, directory / "model", write_chats(directory / "chats.jsonl"))
    return directory


def test_this_machine_alone_is_fit_for_a_small_job(small, run):
    code, out, err = run("preflight", small / "job.yaml")
    assert code == 0, err
    assert "fit" in out
    assert not (small / "out").exists()


def test_what_is_in_the_way_is_shown_and_ends_it(small, run, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    code, out, err = run("preflight", small / "job.yaml")
    assert code == 2
    assert err.startswith("error: pre-flight: ")
    assert err.endswith("nothing was started\n")
    assert "checkpoints and output will take" in err
    assert "Pre-flight" in out


def test_steps_leave_reports_and_a_choice(small, run, tmp_path):
    job = str(small / "job.yaml")
    for node in ("n1", "n2", "n3"):
        assert run("preflight", job, "--step", "report", "--dir", tmp_path, "--node", node)[0] == 0
    path = tmp_path / "n1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "0123"}))
    step = ("preflight", job, "--step", "choose", "--dir", tmp_path, "--nodes", "n1,n2,n3")
    assert run(*step, "--needed", 2)[0] == 0
    assert (tmp_path / "nodes").read_text() == "n2,n3\n"
    code, out, err = run(*step)
    assert code == 2
    assert "n1: model's hash is 0123" in err
    assert "n1" in out
    (tmp_path / "n2.slow").write_text("0.1 GB/s\n")
    assert "n2: 0.1 GB/s" in run(*step, "--needed", 2)[2]


def test_nodes_that_were_left_out_stay_in_the_table(small, run, tmp_path):
    job = str(small / "job.yaml")
    assert run("preflight", job, "--step", "report", "--dir", tmp_path, "--node", "n2")[0] == 0
    (tmp_path / "n3.slow").write_text("0.1 GB/s\n")
    for node in ("n1", "n3"):
        report = read_report(tmp_path, "n2").model_copy(update={"node": node})
        write_report(report, tmp_path)
    first = tmp_path / "n1.json"
    first.write_text(first.read_text().replace('"torch": "2.11.0', '"torch": "2.9'))
    step = ("preflight", job, "--dir", tmp_path, "--step")
    assert run(*step, "choose", "--nodes", "n1,n2,n3", "--needed", 1)[0] == 0
    code, out, err = run(*step, "links", "--nodes", "n2")
    assert code == 0, err
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("\u2502 n")}
    assert "torch 2.9, but 2.11.0" in rows["n1"]
    assert rows["n2"].split()[-2] == "fit"
    assert "0.1 GB/s" in rows["n3"]


def test_a_checkpoint_takes_what_was_said(small, run, tmp_path):
    """The bytes that a training really writes, but for its index and padding."""
    sections = {"checkpoint": {"every_steps": 1, "keep_last": 1}, "train": {"num_steps": 1,
                "global_batch_size": 2, "device": "cpu"}}  # fmt: skip
    path = write_job(tmp_path, small / "model", small / "chats.jsonl", **sections)
    assert run("train", path)[0] == 0
    needs = needs_of(load_job(path), Architecture.from_hf(small / "model"))
    written = bytes_in(tmp_path / "out-checkpoints" / "iter_0000001")
    assert written == pytest.approx(needs.checkpoint, rel=0.05)
    assert bytes_in(tmp_path / "out") == pytest.approx(needs.output + 10e6, rel=0.3)
    assert replace(needs, checkpoints=0).checkpoints == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected a job file, or --local"),
        (["{job}", "--local"], "expected a job file, or --local"),
        (["{job}", "--step", "report"], "--step report needs --dir"),
        (["{job}", "--step", "choose", "--dir", "d"], "--step choose needs --nodes"),
    ],
)
def test_words_that_do_not_fit_are_refused(small, run, words, said):
    words = [word.replace("{job}", str(small / "job.yaml")) for word in words]
    code, _, err = run("preflight", *words)
    assert code == 2
    assert said in err
