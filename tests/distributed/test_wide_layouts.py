"""More layouts than CI has time for: `make test-all`."""

import pytest
import torch
from distributed.launch import Results, launch_selected
from distributed.layouts import ALLGATHER, EXCHANGE, FULL, ONE, OVERLAP, SELECTIVE, case, check
from distributed.worker import Case
from hf_reference import build, read

pytestmark = [pytest.mark.slow, pytest.mark.wide]

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
TWO_INSTANCES = {"num_optimizer_instances": 2}
LAYOUTS: dict[int, list[Case]] = {
    1: [
        case(f"{name} computed again", memory=SELECTIVE | {"recompute_modules": (name,)})
        for name in MODULES
    ],
    2: [
        case("TP2 EP2"),
        case("CP2 packed", micro_batch_size=4),
        case("PP2 packed, full recompute", micro_batch_size=2, memory=FULL),
        case("PP2 VPP4"),
        case("TP2 ETP2 allgather, full recompute", memory=FULL, experts=ALLGATHER),
    ],
    4: [
        case("EP2 ETP2 allgather", experts=ALLGATHER),
        case("PP2 CP2 EP2 packed, full recompute", micro_batch_size=2, memory=FULL),
        case("TP2 PP2 packed, selective recompute", micro_batch_size=2, memory=SELECTIVE),
        case("PP2 overlapped", optimizer=OVERLAP),
        case("PP2 VPP2 overlapped", optimizer=OVERLAP),
        case("TP2 overlapped, two optimizer instances", optimizer=OVERLAP, parallel=TWO_INSTANCES),
        case("EP2 two optimizer instances", parallel=TWO_INSTANCES),
        case("TP2 EP4 overlapped", experts=EXCHANGE),
        case("CP2 EP4 overlapped, packed", experts=EXCHANGE, micro_batch_size=2),
        case("PP2 VPP4 EP2 overlapped", experts=EXCHANGE),
        # No more micro-batches than the schedule computes ahead.
        case("PP2 VPP2 EP2 overlapped, two", experts=EXCHANGE, micro_batch_size=2),
        case("CP2 EP2 overlapped, two instances", optimizer=OVERLAP, parallel=TWO_INSTANCES),
        case("PP4 VPP2"),
        case("PP2 VPP2, MTP apart from the loss", parallel={"stages": "Et*2|t*3|t*3|mL"}),
    ],
    8: [
        case("PP4 VPP2 uneven, MTP alone", parallel={"stages": "E|t*2|t*2|t*2|t|t|m|L"}),
        case("TP2 CP2 PP2 EP2"),
        case("TP2 CP2 PP2 EP2 packed, full recompute", micro_batch_size=4, memory=FULL),
        case("TP2 CP2 PP2 VPP2 EP2, full recompute", memory=FULL),
        case("EP4 ETP2 allgather", experts=ALLGATHER),
        case("TP4 EP8"),
        case("TP2 CP2 PP2 VPP2 EP4 overlapped", experts=EXCHANGE),
        case("TP4 CP2 EP8 packed", micro_batch_size=8),
        case("CP4 PP2 packed, full recompute", micro_batch_size=2, memory=FULL),
        case("PP8"),
        case("DP8 four optimizer instances", parallel={"num_optimizer_instances": 4}),
    ],
}
FROZEN = Case("one process, MTP frozen", mtp="freeze")
WITH_FROZEN_MTP: dict[int, list[Case]] = {
    2: [case("TP2 EP2, MTP frozen", mtp="freeze"), case("PP2, MTP frozen", mtp="freeze")],
    4: [case("PP4, MTP frozen apart", mtp="freeze", parallel={"stages": "Et*4|t*4|m|L"})],
}
ALL = [case for cases in LAYOUTS.values() for case in cases]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return build(num_hidden_layers=8).save(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def results(request, hf_dir, tmp_path_factory) -> Results:
    out, launches = tmp_path_factory.mktemp("out"), (LAYOUTS, WITH_FROZEN_MTP)
    return launch_selected(request, launches, references=[ONE, FROZEN], hf_dir=hf_dir, out=out)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_wide_layout_gives_the_numbers_of_one_process(results, hf_dir, case):
    check(results, case, ONE, read(hf_dir))


FROZEN_CASES = [case for cases in WITH_FROZEN_MTP.values() for case in cases]


@pytest.mark.parametrize("case", FROZEN_CASES, ids=str)
def test_mtp_that_is_frozen_stays_as_loaded_and_trains_the_rest_alike(results, hf_dir, case):
    before = read(hf_dir)
    check(results, case, FROZEN, before)
    after = results.tensors(case.name, "weights")
    prefix = "model.layers.8."
    copies = {f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight"}
    own = [name for name in before if name.startswith(prefix) and name not in copies]
    assert len(own) > 20
    assert all(torch.equal(after[name], before[name]) for name in own)
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
