"""Test that losses read the response positions exactly as the model computes them, for all model families."""

import dataclasses
import sys
import types
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dwakd.batch import TokenBatch
from dwakd.errors import UserError
from dwakd.models.head import embedding_table, output_head, table_and_head
from dwakd.models.rows import check_head, final_hidden, final_states, last_layer, response_side, response_states
from tests.builders import FAMILIES, tiny_model

VOCAB = 300
LENGTHS = (40, 25, 7)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        input_ids[row, length:] = 0
    return input_ids, mask


def tokens_of(input_ids: torch.Tensor, mask: torch.Tensor, num_prompt: int) -> TokenBatch:
    """Return a batch whose responses begin after a prompt. Byte ends are numbered over all positions."""
    response = mask.bool() & (torch.arange(input_ids.shape[1]) >= num_prompt)
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=mask,
        target_ids=input_ids.roll(-1, dims=1),
        response_mask=response,
        byte_ends=torch.arange(input_ids.numel()).view_as(input_ids),
        num_tokens=tuple(mask.sum(1).tolist()),
        num_rows=tuple(response.sum(1).tolist()),
    )


def lora(model, **options):
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_final_hidden_gives_the_models_logits(family):
    """The head applied to the final hidden states gives the model's own logits."""
    model = tiny_model(family, VOCAB)
    check_head(model)
    input_ids, mask = batch()
    hidden = final_hidden(model, input_ids, mask)
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    seen = mask.bool()  # values at padding are arbitrary
    torch.testing.assert_close(output_head(model).logits(hidden[seen]), expected[seen])


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_changes_no_hidden_state(family):
    """Padding on the right does not change the hidden states of an example."""
    model = tiny_model(family, VOCAB)
    input_ids, mask = batch()
    padded = final_hidden(model, input_ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = final_hidden(model, input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(family):
    """A packed batch gives the same response positions and gradients, and no row depends on another one."""
    model = tiny_model(family, VOCAB).double()
    input_ids, mask = batch()
    tokens = tokens_of(input_ids, mask, num_prompt=3)
    grads, sides = [], []
    for packed in (False, True):
        model.zero_grad()
        sides.append(response_side(model, tokens, packed=packed))
        (sides[-1].hidden.square().sum() + sides[-1].target_embeddings.sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(sides[1].hidden, sides[0].hidden, atol=1e-12, rtol=0)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)  # norms of Gemma run in float32
    with torch.no_grad():
        changed = input_ids.clone()
        changed[1, : LENGTHS[1]] = (changed[1, : LENGTHS[1]] + 1) % VOCAB
        states = [final_hidden(model, ids, mask, packed=True) for ids in (input_ids, changed)]
    for row in (0, 2):
        assert torch.equal(states[0][row], states[1][row])
    assert not torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "opt_projected", "qwen2"])
def test_rows_are_selected_in_batch_order_with_embeddings_of_the_table(family):
    """Response positions are in the order of the batch. Embeddings are table entries without scale (Gemma) or offset (OPT)."""
    model = tiny_model(family, VOCAB)
    input_ids, mask = batch()
    tokens = tokens_of(input_ids, mask, 4)
    target_ids, byte_ends = tokens.target_ids, tokens.byte_ends
    side = response_side(model, tokens)
    assert side.lengths.tolist() == [length - 4 for length in LENGTHS]
    places = [(row, column) for row, length in enumerate(LENGTHS) for column in range(4, length)]
    hidden, table = final_hidden(model, input_ids, mask), model.get_input_embeddings().weight
    for index in (0, 5, 36, 50, len(places) - 1):
        row, column = places[index]
        torch.testing.assert_close(side.hidden[index], hidden[row, column])
        assert side.target_ids[index] == target_ids[row, column]
        assert torch.equal(side.target_embeddings[index], table[target_ids[row, column]])
        assert torch.equal(side.input_embeddings[index], table[input_ids[row, column]])
        assert side.byte_ends[index] == byte_ends[row, column]
    assert side.counts == tuple(side.lengths.tolist())


def test_gradient_reaches_backbone_and_table_but_not_through_the_tokens_read():
    """Input embeddings are constants; target embeddings carry gradient to the student's table."""
    model = tiny_model("llama", VOCAB)
    input_ids = torch.tensor([[5, 6, 7]])
    tokens = tokens_of(input_ids, torch.ones_like(input_ids), 1)
    side = response_side(model, dataclasses.replace(tokens, target_ids=input_ids + 50))
    assert not side.input_embeddings.requires_grad
    side.target_embeddings.sum().backward()
    touched = model.get_input_embeddings().weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert touched.tolist() == [56, 57]
    final_hidden(model, input_ids, torch.ones_like(input_ids)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt_projected"])
def test_lora_stays_active_in_the_backbone(family):
    """LoRA adapters are active in the forward pass and get gradient."""
    plain = tiny_model(family, VOCAB)
    input_ids, mask = batch()
    before = final_hidden(plain, input_ids, mask).detach().clone()
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    model = lora(plain, target_modules=targets)
    check_head(model)
    hidden = final_hidden(model, input_ids, mask)
    assert (hidden - before).abs().max() > 1e-2
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    seen = mask.bool()  # values at padding are arbitrary
    torch.testing.assert_close(output_head(model).logits(hidden[seen]), expected[seen])
    hidden.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


def test_trained_copies_of_head_and_embeddings_are_the_ones_in_use():
    """With modules_to_save, the trained copies of head and embeddings are used, not the frozen originals."""
    model = lora(tiny_model("llama", VOCAB), target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    check_head(model)
    assert output_head(model).weight.requires_grad
    assert embedding_table(model).requires_grad


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_on_a_vocabulary_matrix_is_refused(module):
    """LoRA on the head or the embeddings is refused, because it does not change the matrix that the losses read."""
    model = get_peft_model(tiny_model("llama", VOCAB), LoraConfig(r=4, target_modules=["q_proj", module]))
    function = output_head if module == "lm_head" else embedding_table
    with pytest.raises(UserError, match="modules_to_save"):
        function(model)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_are_refused(config):
    """PEFT methods with learned prompts are refused, because the backbone alone does not read them."""
    model = get_peft_model(tiny_model("llama", VOCAB), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="LoRA"):
        final_hidden(model, *batch())


def test_head_wider_than_the_tokenizer_keeps_its_padding_rows():
    """Head entries without a token, which Qwen's heads have, are part of the softmax."""
    assert output_head(tiny_model("qwen2", 384)).vocab_size == 384


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
def test_recorded_attention_is_that_of_the_model(family, eager):
    """The recorded attention of the last position equals the attention that the model reports, for every family."""
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


def test_a_window_without_a_mask_is_applied():
    """A window size that is passed without a mask, as for flash attention, limits the recorded attention."""
    model = tiny_model("mistral", VOCAB)
    input_ids, mask = batch()
    with last_layer(model.config) as noted:
        final_hidden(model, input_ids, mask)
    whole = noted.row(mask.sum(1) - 1)
    queries, keys, _, options = noted.call
    noted.call = queries, keys, None, options
    torch.testing.assert_close(noted.row(mask.sum(1) - 1), whole)
    assert not whole[0, :24].any()


def test_recording_works_with_peft_and_restores_the_registry():
    """Recording works for a PEFT model, and the attention function of transformers is restored afterwards."""
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
    """For each sequence, the attention is that of its last position, and the same whether it runs in a group or alone."""
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
    """Models with ALiBi or attention sinks are refused, because their attention cannot be computed from queries and keys."""
    input_ids, mask = batch()
    with pytest.raises(UserError, match=r"set loss\.span_weights=uniform"):
        final_states(model.eval(), input_ids, mask, attention=True)


class FakeGather:
    """Do to parameters what `deepspeed.zero.GatheredParameters` does: fill them inside a `with` block, then empty them."""

    calls: ClassVar[list[int]] = []

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        self.calls.append(len(self.parameters))
        assert all(parameter.numel() == 0 for parameter in self.parameters)
        for parameter in self.parameters:
            parameter.data = parameter.stored.clone()

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("family", ["qwen2", "phi"])  # tied; two matrices and a bias
def test_parameters_partitioned_by_zero3_are_gathered(family, monkeypatch):
    """Each parameter is gathered once in the forward and once in the backward pass, because DeepSpeed frees it in between."""
    zero = types.SimpleNamespace(GatheredParameters=FakeGather)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    monkeypatch.setattr(FakeGather, "calls", [])
    model, plain = tiny_model(family, VOCAB), tiny_model(family, VOCAB)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.stored = number, parameter.shape, parameter.data
        parameter.data = torch.empty(0)
    hidden, ids = torch.randn(5, 32), torch.arange(5)

    def loss(of):
        table, head = table_and_head(of)
        assert len(table) == head.vocab_size == VOCAB
        return torch.nn.functional.cross_entropy(head.logits(hidden), ids) + table[ids].square().sum()

    got, expected = loss(model), loss(plain)
    assert got == expected
    count = len(FakeGather.calls)
    assert count == (1 if family == "qwen2" else 3)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    got.backward()
    expected.backward()
    assert len(FakeGather.calls) == 2 * count
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert other.grad is None or torch.equal(parameter.grad, other.grad), name
