"""The attention of the last position is recorded without changing the forward pass."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dwakd.errors import UserError
from dwakd.models.attention import last_layer
from dwakd.models.rows import final_hidden, final_states, response_side, response_states
from tests.builders import FAMILIES, tiny_model
from tests.models.test_rows import LENGTHS, VOCAB, batch, lora, tokens_of


def expected(model, input_ids, mask):
    """Return the attention that the model reports for its last layer, for each example alone."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows = []
    for ids, length in zip(input_ids, mask.sum(1).tolist(), strict=True):
        attentions = model(input_ids=ids[None, :length], output_attentions=True).attentions
        rows.append(attentions[-1][0, :, -1].sum(0))
    model.set_attn_implementation(usual)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eager", [False, True])
def test_it_is_the_attention_that_the_model_reports(family, eager):
    """Families differ in groups of heads, scales, soft caps and windows. The recorded row must not be padding."""
    model = tiny_model(family, VOCAB, **({"attn_logit_softcapping": 0.5} if family == "gemma2" else {}))
    if eager:
        model.set_attn_implementation("eager")
    input_ids, mask = batch()
    plain = final_hidden(model, input_ids, mask)
    hidden, attention = final_states(model, input_ids, mask, attention=True)
    assert torch.equal(hidden, plain)
    assert not attention.requires_grad
    for row, wanted in enumerate(expected(model, input_ids, mask)):
        torch.testing.assert_close(attention[row, : LENGTHS[row]], wanted, atol=2e-6, rtol=1e-4)
        assert not attention[row, LENGTHS[row] :].any()


def test_a_window_without_a_mask_counts():
    """Flash attention receives a window size instead of a mask."""
    model = tiny_model("mistral", VOCAB)
    input_ids, mask = batch()
    with last_layer(model.config) as noted:
        final_hidden(model, input_ids, mask)
    whole = noted.row(mask.sum(1) - 1)
    queries, keys, _, options = noted.call
    noted.call = queries, keys, None, options
    torch.testing.assert_close(noted.row(mask.sum(1) - 1), whole)
    assert not whole[0, :24].any()


def test_rows_of_an_adapted_model_carry_it_and_the_registry_is_left_alone():
    """The recording function is removed afterwards; otherwise it would also record later models."""
    before = dict(ALL_ATTENTION_FUNCTIONS)
    model = lora(tiny_model("llama", VOCAB), target_modules=["q_proj", "v_proj"])
    input_ids, mask = batch()
    tokens = tokens_of(input_ids, mask, 4)
    side = response_side(model, tokens, attention=True)
    wanted = torch.cat([row[4:] for row in expected(model.get_base_model(), input_ids, mask)])
    torch.testing.assert_close(side.attention, wanted.detach(), atol=2e-6, rtol=1e-4)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    without = response_side(model, tokens)
    assert without.attention is None
    assert torch.equal(side.hidden, without.hidden)


def test_sequences_of_a_group_have_their_own_last_position():
    """Short sequences of a teacher run in groups and long ones alone; each has its own last position."""
    model = tiny_model("gemma2", VOCAB)
    input_ids, mask = batch()
    sequences = [ids[:length] for ids, length in zip(input_ids, LENGTHS, strict=True)]
    whole = response_states(model, sequences, [3, 3, 3], attention=True)
    for (_, weights), wanted in zip(whole, expected(model, input_ids, mask), strict=True):
        torch.testing.assert_close(weights, wanted[-3:].detach(), atol=2e-6, rtol=1e-4)
    alone = response_states(model, sequences[2:], [3], attention=True)
    assert torch.equal(alone[0][1], whole[2][1])


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)),
        GptOssForCausalLM(
            GptOssConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
    ],
    ids=lambda model: model.config.model_type,
)
def test_models_that_attend_in_another_way_are_refused(model):
    """ALiBi and attention sinks are not supported; without an error, the weights would be wrong."""
    input_ids, mask = batch()
    with pytest.raises(UserError, match=r"set loss\.span_weights=uniform"):
        final_states(model.eval(), input_ids, mask, attention=True)
