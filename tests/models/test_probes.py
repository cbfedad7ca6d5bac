from dataclasses import replace

import pytest
import torch
from runs import llama_folder
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from samestep.errors import ConfigError
from samestep.kernels import packed_attention
from samestep.models.probes import choose_padding
from samestep.utils import agreement


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("wanted", ["auto", "none", "right", "left"])
def test_a_llama_takes_every_layout(llama: LlamaForCausalLM, wanted: str) -> None:
    chosen = choose_padding(llama, wanted)
    assert chosen == ("none" if wanted == "auto" else wanted)
    expected = packed_attention.NAME if chosen == "none" else "sdpa"
    assert llama.config._attn_implementation == expected


def test_layouts_can_be_chosen_again(llama: LlamaForCausalLM) -> None:
    for wanted in ("none", "right", "none"):
        assert choose_padding(llama, wanted) == wanted


def test_a_model_that_mixes_neighbours_is_padded(mamba: MambaForCausalLM) -> None:
    assert choose_padding(mamba, "auto") == "right"
    with pytest.raises(ConfigError, match="beside a neighbour"):
        choose_padding(mamba, "none")


def test_the_reason_is_said(
    mamba: MambaForCausalLM,
    llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    choose_padding(mamba, "auto")
    assert "MambaForCausalLM cannot take packs (outputs change by" in caplog.text

    def fails(pack: object) -> None:
        raise TypeError("varlen_attn() got an unexpected keyword argument")

    monkeypatch.setattr(packed_attention, "_by_sequence", fails)
    assert choose_padding(llama, "auto") == "right"
    assert "LlamaForCausalLM cannot take packs (TypeError: varlen_attn() got an" in caplog.text


@pytest.mark.parametrize("kept", [True, False])
def test_the_probe_is_longer_than_a_sliding_window(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is lost in packs is noticed."""
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=9,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    real = packed_attention._by_sequence
    if not kept:
        monkeypatch.setattr(
            packed_attention, "_by_sequence", lambda pack: real(replace(pack, window=None))
        )
    assert choose_padding(model, "auto") == ("none" if kept else "right")


def test_a_leaking_attention_is_noticed(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface

    def leaking(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, **others):
        whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return packed_attention.packed_attention(
            module, query, key, value, mask, cu_seq_lens_q=whole, max_length_q=0, **others
        )

    monkeypatch.setattr(
        packed_attention,
        "register",
        lambda: AttentionInterface.register(packed_attention.NAME, leaking),
    )
    try:
        with pytest.raises(ConfigError, match="beside a neighbour"):
            choose_padding(llama, "none")
        assert choose_padding(llama, "auto") == "right"
    finally:
        monkeypatch.undo()
        packed_attention.register()


def test_the_mode_of_the_model_is_kept(llama: LlamaForCausalLM) -> None:
    for mode in (True, False):
        choose_padding(llama.train(mode), "auto")
        assert llama.training is mode


def test_no_layout_at_all_is_refused(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "FACTOR", -1.0)
    with pytest.raises(ConfigError, match="micro_batch 1"):
        choose_padding(llama, "auto")
