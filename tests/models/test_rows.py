"""Losses read the response positions exactly as the model computes them, for all model families."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from dwakd.batch import TokenBatch
from dwakd.errors import UserError
from dwakd.models.checks import check_head
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import final_hidden, response_side
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
    """A batch whose responses begin after a prompt; byte ends count all positions."""
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
    """Otherwise losses would use logits that the model does not produce."""
    model = tiny_model(family, VOCAB)
    check_head(model)
    input_ids, mask = batch()
    hidden = final_hidden(model, input_ids, mask)
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    seen = mask.bool()  # rows of padding are arbitrary
    torch.testing.assert_close(output_head(model).logits(hidden[seen]), expected[seen])


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_changes_no_hidden_state(family):
    """Otherwise the loss of an example would depend on the longest example of its batch."""
    model = tiny_model(family, VOCAB)
    input_ids, mask = batch()
    padded = final_hidden(model, input_ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = final_hidden(model, input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "opt_projected", "qwen2"])
def test_rows_are_selected_in_batch_order_with_embeddings_of_the_table(family):
    """Attention and Soft-DTW need the rows in order, and embeddings without scale (Gemma) or offset (OPT)."""
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
    """If the backbone ran without its adapters, nothing would be trained."""
    plain = tiny_model(family, VOCAB)
    input_ids, mask = batch()
    before = final_hidden(plain, input_ids, mask).detach().clone()
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    model = lora(plain, target_modules=targets)
    check_head(model)
    hidden = final_hidden(model, input_ids, mask)
    assert (hidden - before).abs().max() > 1e-2
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    seen = mask.bool()  # rows of padding are arbitrary
    torch.testing.assert_close(output_head(model).logits(hidden[seen]), expected[seen])
    hidden.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


def test_trained_copies_of_head_and_embeddings_are_the_ones_in_use():
    """With modules_to_save the frozen originals would be distilled instead of the trained matrices."""
    model = lora(tiny_model("llama", VOCAB), target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    check_head(model)
    assert output_head(model).weight.requires_grad
    assert embedding_table(model).requires_grad


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_on_a_vocabulary_matrix_is_refused(module):
    """LoRA stores its change outside the matrix that the losses read, and no other check finds it before training."""
    model = get_peft_model(tiny_model("llama", VOCAB), LoraConfig(r=4, target_modules=["q_proj", module]))
    function = output_head if module == "lm_head" else embedding_table
    with pytest.raises(UserError, match="modules_to_save"):
        function(model)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_are_refused(config):
    """The backbone alone does not read a learned prompt."""
    model = get_peft_model(tiny_model("llama", VOCAB), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="LoRA"):
        final_hidden(model, *batch())


def test_head_wider_than_the_tokenizer_keeps_its_padding_rows():
    """Qwen's heads have rows that no token uses, but they are part of the softmax."""
    assert output_head(tiny_model("qwen2", 384)).vocab_size == 384
