"""What a user writes becomes one checked record, or lines that say what is wrong with it."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.job import Job, load_job, to_yaml
from megatron_dsv3.config.section import Section, setting_names
from megatron_dsv3.config.yaml_file import with_overrides

MINIMAL = {
    "model": {"hf_dir": "model"},
    "data": {"paths": ["a.jsonl", "b.json"]},
    "train": {"global_batch_size": 64},
    "output": {"dir": "runs/out"},
}


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def problems_of(path, *overrides):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the lines are the caller's to check
        load_job(path, overrides)
    assert not isinstance(error.value, ValidationError)
    return str(error.value).splitlines()


def test_defaults_are_what_users_of_v3_know(job_file):
    job = load_job(job_file)
    assert job.model.hf_dir == Path("model")
    assert job.data.paths == (Path("a.jsonl"), Path("b.json"))
    assert job.data.seq_length == 32768
    optimizer = job.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (2e-7, 0.9, 0.999)
    assert (optimizer.eps, optimizer.weight_decay, optimizer.clip_grad) == (1e-8, 0.0, 1.0)
    schedule = job.schedule
    assert (schedule.decay, schedule.warmup_fraction, schedule.min_lr) == ("cosine", 0.03, 0.0)
    assert (job.train.num_epochs, job.train.num_steps) == (1, None)
    assert (job.experts.aux_loss_coefficient, job.experts.bias) == (1e-4, "freeze")
    assert job.mtp.loss_weight == 0.1
    assert job.parallel.tp_size == 1


def test_overrides_replace_add_and_reach_into_empty_sections(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({**MINIMAL, "optimizer": {"lr": 1e-5, "eps": 1e-6}, "mtp": None})
    )
    overrides = ["optimizer.lr=3e-5", "mtp.loss_weight=0.3", "parallel.tp_size=2"]
    overrides += ["data.paths=[c.jsonl]", "log.dir=a=b", "train.num_steps=null"]
    job = load_job(path, overrides)
    assert (job.optimizer.lr, job.optimizer.eps) == (3e-5, 1e-6)
    assert (job.mtp.loss_weight, job.parallel.tp_size) == (0.3, 2)
    assert job.data.paths == (Path("c.jsonl"),)
    assert job.log.dir == Path("a=b")
    assert job.train.num_steps is None


def test_the_last_of_two_overrides_holds(job_file):
    assert load_job(job_file, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "+.1e-4", "0.00001", "1.0e-05"])
def test_numbers_with_an_exponent_are_numbers_in_files_and_overrides(text, tmp_path, job_file):
    assert load_job(job_file, [f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(1e-5)
    path = tmp_path / "other.yaml"
    path.write_text(f"{job_file.read_text()}\noptimizer: {{lr: {text}}}\n")
    assert load_job(path).optimizer.lr == pytest.approx(1e-5)


def test_a_home_directory_is_found(job_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    assert load_job(job_file, ["output.dir=~/out"]).output.dir == Path("/home/user/out")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.warmup_steps=10"],
        ["optimizer.lr=1e-5", "schedule.min_lr=1e-7", "log.dir=logs", "train.num_steps=60"],
        ["output.dir='1e-5'", "model.hf_dir='007'", "data.paths=['null', '\u00e9: x', '# y']"],
        ["parallel.tp_size=2", "parallel.ep_size=4", "data.too_long=error"],
    ],
)
def test_the_job_as_yaml_loads_as_an_equal_one(overrides, job_file, tmp_path):
    job = load_job(job_file, overrides)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(job), encoding="utf-8")
    assert load_job(path) == job
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(written) == set(Job.model_fields)


def test_an_unknown_setting_fails_and_suggests_the_nearest(job_file):
    lines = problems_of(
        job_file,
        "optimizer.learning_rat=1",
        "optimizer.betas1=0.9",
        "optimiser.lr=1",
        "train.lr=1e-5",
        "parallel.tp=2",
        "zzz=1",
    )
    ends = {line.split(": ")[1]: line.split(": ", 2)[2] for line in lines}
    assert ends["optimizer.betas1"] == "unknown setting; did you mean optimizer.beta1?"
    assert ends["optimiser"] == "unknown setting; did you mean optimizer?"
    assert ends["train.lr"] == "unknown setting; did you mean optimizer.lr?"
    assert ends["parallel.tp"] == "unknown setting; did you mean parallel.tp_size?"
    assert ends["optimizer.learning_rat"].startswith("unknown setting; known here are lr, beta1")
    assert ends["zzz"].startswith("unknown setting; known here are model, data, parallel")
    assert len(lines) == 6


def test_each_line_says_where_the_setting_was_written(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "mtp": {"loss_weigth": 1.0}}))
    lines = problems_of(path, "optimizer.l=1", "parallel={tp_size: 0}")
    assert lines == [
        "override: parallel.tp_size: must be greater than or equal to 1, got 0",
        "override: optimizer.l: unknown setting; did you mean optimizer.lr?",
        f"{path}: mtp.loss_weigth: unknown setting; did you mean mtp.loss_weight?",
    ]


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("")
    missing = [line.split(": ")[1] for line in problems_of(path)]
    assert missing == ["model.hf_dir", "data", "train.global_batch_size", "output.dir"]


EXCHANGE = ("experts.overlap_all_to_all=true", "parallel.ep_size=2")
VALUES = {
    "optimizer.lr=fast": "optimizer.lr: must be a valid number, got 'fast'",
    "optimizer.lr=0": "optimizer.lr: must be greater than 0, got 0",
    "optimizer.lr=.nan": "optimizer.lr: must be a finite number, got nan",
    "optimizer.beta2=1.0": "optimizer.beta2: must be less than 1, got 1.0",
    "optimizer.clip_grad=-1": "optimizer.clip_grad: must be greater than or equal to 0, got -1",
    "optimizer.overlap_grad_reduce=1": "overlap_grad_reduce: must be a valid boolean, got 1",
    "train.seed=1.5": "train.seed: must be a valid integer, got 1.5",
    "train.num_epochs='1'": "train.num_epochs: must be a valid integer, got '1'",
    "train.num_steps=0": "train.num_steps: must be greater than or equal to 1, got 0",
    "train.device=gpu": "train.device: must be 'auto', 'cpu' or 'cuda', got 'gpu'",
    "schedule.decay=cosin": "schedule.decay: must be 'cosine', 'linear' or 'constant', got 'cosin'",
    "data.too_long=cut": "data.too_long: must be 'drop', 'truncate' or 'error', got 'cut'",
    "data.paths=a.jsonl": "data.paths: must be a list, as in [a, b], got 'a.jsonl'",
    "data.paths=[3]": "data.paths.0: must be a path, got 3",
    "output.dir=2020-01-01": "output.dir: must be a path, got datetime.date(2020, 1, 1)",
    "output.shard_size_gb=0": "output.shard_size_gb: must be greater than 0, got 0",
    "parallel=2": "parallel: must be a section of settings, got 2",
    "mtp={1: 2}": "mtp.1: must be the name of a setting, got 1",
    "experts.aux_loss_coefficient=null": "aux_loss_coefficient: must be a valid number, got None",
}


@pytest.mark.parametrize("override", VALUES)
def test_a_wrong_value_is_named_with_what_was_expected_and_given(override, job_file):
    [line] = problems_of(job_file, override)
    assert line.startswith("override: ")
    assert VALUES[override] in line


PAIRS = {
    ("data.paths=[]",): (
        "data: give one of store (what `megatron-dsv3 prepare` wrote) and paths (chat files), "
        "got neither"
    ),
    ("data.store=tokens",): (
        "data: give one of store (what `megatron-dsv3 prepare` wrote) and paths (chat files), "
        "got both"
    ),
    ("validation.store=tokens", "validation.paths=[b.jsonl]"): (
        "validation: give one of store and paths, got both"
    ),
    ("data.document_multiple=2", "parallel.cp_size=4", "data.seq_length=64"): (
        "data.document_multiple 2 is not divisible by 2 * cp_size(4); use 8"
    ),
    ("data.document_multiple=12", "data.seq_length=64"): (
        "data.seq_length 64 is not divisible by data.document_multiple 12; use a power of two"
    ),
    ("schedule.warmup_steps=10", "schedule.warmup_fraction=0.1"): (
        "schedule: give one of warmup_fraction and warmup_steps, got 0.1 and 10"
    ),
    (
        "schedule.warmup_fraction=null",
    ): "give one of warmup_fraction and warmup_steps, got None and",
    ("optimizer.overlap_param_gather=true",): "overlap_param_gather needs overlap_grad_reduce",
    (
        "optimizer.moments=bf16",
        "optimizer.offload_fraction=0.5",
    ): "moments=bf16 and offload_fraction exclude each other",
    (
        "optimizer.gradients=bf16",
        "precision.compute=fp32",
    ): "optimizer.gradients=bf16 needs precision.compute=bf16",
    (
        "train.verify_first=true",
        "precision.fp8=blockwise",
        "precision.fp8_params=true",
    ): "train.verify_first cannot tell a mistake from what precision.fp8_params has rounded",
    (
        "optimizer.offload_fraction=0.5",
        "precision.fp8=blockwise",
        "precision.fp8_params=true",
    ): "precision.fp8_params and optimizer.offload_fraction exclude each other",
    ("memory.offload_activations=[attn_proj]",): "attn_proj needs core_attn",
    ("experts.overlap_all_to_all=true", "parallel.ep_size=1"): (
        "experts.overlap_all_to_all needs parallel.ep_size > 1: one rank with all experts sends "
        "nothing; change that, or set it to false"
    ),
    (*EXCHANGE, "parallel.pp_size=2"): "needs parallel.vpp_size > 1 with pp_size(2);",
    (*EXCHANGE, "experts.dispatcher=allgather"): "needs experts.dispatcher=alltoall;",
    (*EXCHANGE, "precision.compute=fp32"): "overlap_all_to_all needs precision.compute=bf16;",
    (*EXCHANGE, "memory.recompute=full"): "needs memory.recompute=selective or none;",
    (
        *EXCHANGE,
        "memory.recompute=selective",
        "memory.recompute_modules=[moe]",
    ): "needs memory.recompute_modules without moe;",
    (*EXCHANGE, "memory.offload_activations=[core_attn]"): "memory.offload_activations=[];",
    (
        "memory.offload_activations=[moe_act]",
        "memory.recompute=full",
    ): "has nothing to offload where recompute is full; use selective",
    (
        "memory.offload_activations=[moe_act,expert_fc1]",
        "memory.recompute=selective",
        "memory.recompute_modules=[moe]",
    ): "expert_fc1, moe_act would be computed again with recompute_modules: moe",
    ("schedule.min_lr=1e-6",): "schedule.min_lr 1e-06 exceeds optimizer.lr 2e-07",
    (
        "train.micro_batch_size=3",
    ): "train.global_batch_size 64 is not divisible by micro_batch_size(3)",
    ("data.seq_length=1002", "parallel.cp_size=4", "parallel.tp_size=2"): (
        "data.seq_length 1002 is not divisible by 8, as tp_size(2), cp_size(4) and fp8(off) ask; "
        "use 1008"
    ),
}


@pytest.mark.parametrize("overrides", PAIRS)
def test_settings_that_do_not_go_together_are_named(overrides, job_file):
    [line] = problems_of(job_file, *overrides)
    assert PAIRS[overrides] in line


def test_all_pairs_come_in_one_error_a_line_each(job_file):
    lines = problems_of(job_file, "schedule.min_lr=1", "train.micro_batch_size=3")
    assert len(lines) == 2
    assert all(line.startswith(f"{job_file}: ") for line in lines)


def test_warmup_steps_take_the_place_of_the_default_fraction(job_file):
    schedule = load_job(job_file, ["schedule.warmup_steps=10"]).schedule
    assert (schedule.warmup_fraction, schedule.warmup_steps) == (None, 10)
    assert load_job(job_file, ["schedule.warmup_steps=0"]).schedule.warmup_steps == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", r"job\.yaml line 2, column 2: not valid YAML: "),
        ("a: 1\nb: 2\na: 3\n", r"job\.yaml line 3, column 1: not valid YAML: a is given twice$"),
        ("a:\n  b: 1\n  b: 1\n", r"line 3, column 3: not valid YAML: b is given twice$"),
        ("a: !!python/name:os.system x", r"job\.yaml line 1, column 4: not valid YAML"),
        ("a: \x07", r"job\.yaml: not valid YAML: "),
        ("? [a, b]\n: c\n", r"job\.yaml line 1, column 3: not valid YAML: found unhashable key"),
        ("- a\n- b\n", r"job\.yaml: expected sections of settings \(name: value\), got list$"),
        ("text", r"job\.yaml: expected sections of settings \(name: value\), got str$"),
        (b"a: \xff", r"job\.yaml: not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_yaml_of_settings_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_job(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nope\.yaml: no such file; expected a YAML file"):
        load_job(tmp_path / "nope.yaml")
    with pytest.raises(ValueError, match="no such file"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr",
            r"override 'optimizer\.lr': expected name=value, as in optimizer\.lr=1e-5",
        ),
        ("optimizer.lr=[1", r"override 'optimizer\.lr=\[1' line 1, column 3: not valid YAML"),
        (
            "train.global_batch_size.x=1",
            r"override 'train\.global_batch_size\.x=1': train\.global_batch_size is the value 64",
        ),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(override, message, job_file):
    with pytest.raises(ValueError, match=message) as error:
        load_job(job_file, [override])
    assert "\n" not in str(error.value)


def job(**sections):
    merged = {
        name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in Job.model_fields
    }
    return Job.model_validate(merged)


def test_a_job_that_fits_has_no_problems_and_its_micro_batches():
    fits = job(parallel={"tp_size": 2, "pp_size": 4, "ep_size": 8}, train={"micro_batch_size": 2})
    assert fits.problems(DEEPSEEK_V3, 64) == []
    assert fits.num_micro_batches(64) == 4


def test_a_batch_that_does_not_divide_is_named_with_all_factors():
    [problem] = job(train={"micro_batch_size": 2}).problems(DEEPSEEK_V3, 24)
    assert problem == (
        "train.global_batch_size 64 is not micro_batch_size(2) * dp_size(24) * micro-batches; "
        "use a multiple of 48"
    )


def test_chunked_pipelines_need_rounds_of_micro_batches():
    chunked = job(parallel={"pp_size": 4, "vpp_size": 2}, train={"global_batch_size": 6})
    [problem] = chunked.problems(DEEPSEEK_V3, 4)
    assert (
        "with vpp_size(2), the 6 micro-batches of a step must be a multiple of pp_size(4)"
        in problem
    )
    plain = job(parallel={"pp_size": 4}, train={"global_batch_size": 6})
    assert plain.problems(DEEPSEEK_V3, 4) == []


def test_layers_out_of_fp8_are_as_many_as_megatron_core_takes():
    def fp8(first: int, last: int) -> Job:
        precision = {"fp8": "blockwise", "bf16_first_layers": first, "bf16_last_layers": last}
        return job(precision=precision, parallel={"pp_size": 8})

    assert fp8(8, 9).problems(DEEPSEEK_V3, 8) == [
        f"precision.{name} {number} exceeds num_hidden_layers(61) // pp_size(8) = 7; use at most "
        "that"
        for name, number in (("bf16_first_layers", 8), ("bf16_last_layers", 9))
    ]
    assert fp8(7, 7).problems(DEEPSEEK_V3, 8) == []


def test_problems_with_model_and_world_come_together():
    wrong = job(parallel={"tp_size": 3}, data={"seq_length": 3 * 2**14})
    arch = replace(DEEPSEEK_V3, max_position_embeddings=4096)
    problems = wrong.problems(arch, 4)
    assert problems[0].startswith("world size 4 is not tp_size(3)")
    assert problems[-1].startswith(
        "data.seq_length 49152 exceeds the model's max_position_embeddings"
    )
    assert len(problems) == len(set(problems)) == 5


@pytest.mark.parametrize(
    ("stages", "num_mtp_layers", "fits"),
    [
        ("E|t*2|t*2|t*2|t|t|-|mL", 1, True),
        ("E|t*2|t*2|t*2|t|t|-|mmL", 2, False),
        ("E|t*2|t*2|t*2|t|t|m|L", 1, False),
    ],
)
def test_overlapped_all_to_alls_take_one_mtp_layer_beside_the_loss(stages, num_mtp_layers, fits):
    arch = replace(DEEPSEEK_V3, num_layers=8, num_mtp_layers=num_mtp_layers)
    parallel = {"pp_size": 4, "vpp_size": 2, "ep_size": 2, "stages": stages}
    problems = job(parallel=parallel, experts={"overlap_all_to_all": True}).problems(arch, 8)
    told = [p for p in problems if p.startswith("experts.overlap_all_to_all needs at most one MTP")]
    assert problems == told
    assert len(told) == (not fits)
    assert job(parallel=parallel).problems(arch, 8) == []


CPU_CANNOT = {
    "optimizer": ({"moments": "bf16"}, "optimizer.moments=bf16 needs Transformer", "use fp32"),
    "host": ({"offload_fraction": 0.5}, "optimizer.offload_fraction needs a GPU", "use 0"),
    "memory": (
        {"offload_activations": ["core_attn"]}, "memory.offload_activations needs a GPU", "use []",
    ),
    "parallel": (
        {"etp_size": 2}, "parallel.etp_size(2) with experts.dispatcher=alltoall",
        "use experts.dispatcher=allgather or etp_size 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CPU_CANNOT)
def test_what_a_cpu_cannot_do_is_named_with_the_nearest_that_it_can(name):
    settings, reason, way_out = CPU_CANNOT[name]
    section = "optimizer" if name == "host" else name
    [problem] = job(**{section: settings}).backend_problems("cpu")
    assert problem.startswith(reason)
    assert problem.endswith(way_out)
    assert job(**{section: settings}).backend_problems("cuda") == []


def test_the_nearest_that_a_cpu_can_do_is_no_problem():
    nearest = {"parallel": {"etp_size": 2}, "experts": {"dispatcher": "allgather"}}
    assert job(**nearest).backend_problems("cpu") == job().backend_problems("cpu") == []


def test_a_gpu_has_no_fp32_attention_over_packed_rows():
    fp32 = job(precision={"compute": "fp32"})
    [problem] = fp32.backend_problems("cuda")
    assert problem.startswith("precision.compute=fp32: ")
    assert problem.endswith("use bf16, or train.device=cpu")
    assert fp32.backend_problems("cpu") == []


def test_a_problem_with_the_world_does_not_hide_one_with_the_batch():
    problems = job(parallel={"ep_size": 5}, train={"global_batch_size": 63}).problems(
        DEEPSEEK_V3, 8
    )
    assert [p.split(" is not")[0] for p in problems] == [
        "world size 8",
        "n_routed_experts 256",
        "train.global_batch_size 63",
    ]


@pytest.mark.parametrize(
    ("tp_size", "cp_size", "multiple"), [(1, 1, 1), (4, 1, 4), (1, 4, 8), (2, 2, 4), (3, 2, 12)]
)
def test_rows_divide_among_context_and_sequence_parallel_ranks(tp_size, cp_size, multiple):
    parallel = {"tp_size": tp_size, "cp_size": cp_size}
    assert job(parallel=parallel, data={"seq_length": 24 * 4}).row_multiple == multiple


def test_logs_go_beside_the_output_unless_told():
    assert job().log_dir == Path("runs/out-log")
    assert job(log={"dir": "logs"}).log_dir == Path("logs")


def test_the_record_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        job().optimizer.lr = 1.0


def test_every_setting_has_a_description():
    for name in setting_names(Job):
        section, info = Job, None
        for part in name.split("."):
            info = section.model_fields[part]
            section = info.annotation
        is_section = isinstance(section, type) and issubclass(section, Section)
        assert section.__doc__ if is_section else info.description, name
    assert len(setting_names(Job)) > 40


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("no", "no"), ("On", "On"), ("true", True), ("False", False), ("n", "n")],
)
def test_only_true_and_false_are_booleans(text, value):
    assert with_overrides({}, [f"mtp.mode={text}"]) == {"mtp": {"mode": value}}
