"""Cards and networks: complete, believable, and what a user writes is read strictly."""

import re

import pytest
import yaml

from megatron_dsv3.config.devices import PEAK_BF16_TFLOPS
from megatron_dsv3.plan.cards import cluster_of, load_card, load_network, names

OWN = {
    "bf16_tflops": 500, "bf16_reached_tflops": 400, "memory_gib": 63.5, "hbm_gb_per_s": 1600,
    "hbm_reached": 0.8, "nvlink_gb_per_s": 196, "nvlink_reached": 0.7, "host_gb_per_s": 20,
    "network": "roce-100g", "sources": ["measured here"],
}  # fmt: skip


def write(directory, content):
    path = directory / "card.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_cards_asked_for_are_there_with_sources_and_a_known_network():
    assert names("cards") == [
        *("h100-80gb", "h800-80gb", "h200-141gb", "h20-96gb", "a100-80gb", "b200-192gb")
    ]
    for name in names("cards"):
        card = load_card(name)
        assert card.sources
        assert load_network(card.network).sources
        # A name with 80gb is a maker's 80 GB; CUDA gives 0.9 to 1.1 of 10^9-bytes GB in GiB terms.
        assert 0.9 < card.memory_gib * 2**30 / (int(re.search(r"(\d+)gb", name)[1]) * 1e9) < 1.08


def test_published_rates_are_what_the_makers_sheets_say():
    # NVIDIA's data sheets: dense bf16, dense fp8, GB/s of memory, NVLink both ways.
    sheet = {
        "h100-80gb": (989, 1979, 3350, 900), "h800-80gb": (989, 1979, 3350, 400),
        "h200-141gb": (989, 1979, 4800, 900), "h20-96gb": (148, 296, 4000, 900),
        "a100-80gb": (312, None, 2039, 600), "b200-192gb": (2250, 4500, 7672, 1800),
    }  # fmt: skip
    for name, (bf16, fp8, hbm, nvlink) in sheet.items():
        card = load_card(name)
        got = (card.paper_bf16_tflops, card.fp8_tflops, card.hbm_gb_per_s, 2 * card.nvlink_gb_per_s)
        assert got == (bf16, fp8, hbm, nvlink), name
    assert load_card("h100-80gb").paper_bf16_tflops is PEAK_BF16_TFLOPS["H100"]
    assert [name for name in names("cards") if load_card(name).measured] == ["h100-80gb"]


def test_a_users_own_card_and_what_differs_from_a_known_one_are_read(tmp_path):
    own = load_card(write(tmp_path, OWN))
    assert (own.paper_bf16_tflops, own.fp8_tflops, own.measured) == (500, None, False)
    changed = {"based_on": "h100-80gb", "memory_gib": 93.1, "sources": ["H100 NVL 94 GB"]}
    card = load_card(write(tmp_path, changed))
    assert (card.memory_gib, card.bf16_reached_tflops, card.measured) == (93.1, 781, False)
    slower = {"based_on": "h100-80gb", "bf16_tflops": 800.0, "sources": ["capped"]}
    assert load_card(write(tmp_path, slower)).paper_bf16_tflops == 800
    network = tmp_path / "net.yml"
    network.write_text("{gb_per_s: 12, reached: 0.5, latency_us: 30, sources: [here]}")
    assert load_network(str(network)).gb_per_s == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**OWN, "memory_gb": 64}, "card.yaml: memory_gb: unknown setting; did you mean"),
        ({k: v for k, v in OWN.items() if k != "memory_gib"}, "memory_gib: missing"),
        ({**OWN, "hbm_reached": 1.5}, "hbm_reached: must be less than or equal to 1, got 1.5"),
        ({**OWN, "device": "H100"}, "give one of device and bf16_tflops, got both"),
        ({k: v for k, v in OWN.items() if k != "bf16_tflops"}, "got neither"),
        ({**OWN, "bf16_reached_tflops": 600}, "600 exceeds the paper's 500"),
        ({**OWN, "fp8_tflops": 900}, "both of fp8_tflops and fp8_reached_tflops"),
        ({"based_on": "h1000"}, "based_on: no card 'h1000'; known are h100-80gb"),
        ({"based_on": "h100-80gb", "device": "H1000"}, "device 'H1000' is not in config/devices"),
    ],
)
def test_a_wrong_card_says_what_is_wrong(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_card(write(tmp_path, content))


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no card 'h100'; known are h100-80gb, .* or give a file"):
        load_card("h100")
    with pytest.raises(ValueError, match="no network 'ib'; known are ib-400g"):
        load_network("ib")
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such file"):
        load_card("nowhere.yaml")


def test_a_card_is_a_record_that_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_card("h100-80gb").memory_gib = 1.0


def test_the_planner_sees_what_links_reach_not_what_they_promise():
    cluster = cluster_of("h100-80gb", network="roce-100g", gpus_per_node=4)
    assert (cluster.card.network_gb_s, cluster.gpus_per_node) == (12.5 * 0.75, 4)
    assert cluster.card.nvlink_gb_s == 450 * 0.75
    assert cluster_of("a100-80gb").card.network_gb_s == 25 * 0.85
    assert "DGX A100" in cluster_of("a100-80gb").card.sources["network"]
