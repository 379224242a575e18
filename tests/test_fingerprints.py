import json
from dataclasses import replace

import pytest
from chat_cases import deepseek_tokenizer
from transformers import AutoTokenizer

from megatron_dsv3.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from megatron_dsv3.data.own_template import OwnTemplate
from megatron_dsv3.data.templates import TEMPLATES


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """DeepSeek's tokenizer, loaded and saved again by this version of transformers."""
    directory = tmp_path_factory.mktemp("tokenizer")
    deepseek_tokenizer().save_pretrained(directory)
    return directory


def test_a_tokenizer_saved_again_keeps_its_fingerprint(saved):
    again = AutoTokenizer.from_pretrained(saved)
    again.backend_tokenizer.enable_truncation(8)
    again.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(deepseek_tokenizer())


def test_one_other_token_or_eos_changes_the_fingerprint(saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text())
    content["model"]["vocab"]["Ġthe"], content["model"]["vocab"]["Ġof"] = (
        content["model"]["vocab"]["Ġof"],
        content["model"]["vocab"]["Ġthe"],
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((saved / "tokenizer_config.json").read_bytes())
    other = AutoTokenizer.from_pretrained(tmp_path)
    eos = AutoTokenizer.from_pretrained(saved)
    eos.eos_token = "<｜User｜>"
    prints = {tokenizer_fingerprint(t) for t in (deepseek_tokenizer(), other, eos)}
    assert len(prints) == 3


def test_every_template_has_its_own_fingerprint():
    prints = {template_fingerprint(template) for template in TEMPLATES.values()}
    assert len(prints) == len(TEMPLATES)
    one = TEMPLATES["deepseek_r1"]
    assert template_fingerprint(replace(one, calls_end=())) != template_fingerprint(one)
    own = [OwnTemplate(text, {}, {}) for text in ("{{ a }}", "{{ b }}")]
    assert template_fingerprint(own[0]) != template_fingerprint(own[1])
