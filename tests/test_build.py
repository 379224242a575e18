"""What building a model says: nothing that its user could not change."""

import logging

import torch
from test_moe import ARCH

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model import build
from megatron_dsv3.model.config import mcore_config


def _build(groups):
    config = mcore_config(ARCH, Parallel(), dtype=torch.float32, device=groups.device)
    chunks = build.build_chunks(
        ARCH, Parallel(), groups, config, max_seq_length=64, transformer_engine=False
    )
    return build.wrap(chunks, config)


def test_megatron_cores_words_about_itself_are_left_out_and_its_loggers_stay(groups, caplog):
    loggers = [logging.getLogger(name) for name in build._TELLS_OF_ITSELF]
    loggers[0].setLevel(logging.INFO)
    try:
        _build(groups)
        assert not caplog.messages
        assert [logger.level for logger in loggers] == [logging.INFO, logging.NOTSET]
        loggers[0].warning("another one")
        assert caplog.messages == ["another one"]
    finally:
        loggers[0].setLevel(logging.NOTSET)


def test_each_of_these_loggers_would_speak(groups, caplog, monkeypatch):
    for index, name in enumerate(build._TELLS_OF_ITSELF):
        caplog.clear()
        others = [other for other in build._TELLS_OF_ITSELF if other != name]
        with monkeypatch.context() as patch:
            patch.setattr(build, "_TELLS_OF_ITSELF", tuple(others))
            _build(groups)
        assert {record.name for record in caplog.records} == {name}, index
