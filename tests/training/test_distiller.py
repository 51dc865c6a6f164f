"""Test that student and loss are built for the given models, and are saved and loaded exactly."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dwakd import DistillConfig, DistillTrainer, UserError, load_causal_lm
from dwakd.models.saving import save_causal_lm
from dwakd.training.distiller import load_student
from tests.builders import byte_bpe, tiny_model
from tests.training.builders import ROWS, TOKENIZERS, trainer

ONE_TOKENIZER = [("kd", {}), ("dskd", {"alignment": "position"})]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(30).view(2, 15)).logits


def adapted(base, name: str):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"), name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_an_adapter_of_any_name_is_restored(tmp_path):
    """An adapter that is not called "default" is saved in the folder itself and can be loaded."""
    tiny_model("llama", 400).save_pretrained(tmp_path / "base")
    byte_bpe().save_pretrained(tmp_path / "base")
    student = adapted(tmp_path / "base", "colours")
    save_causal_lm(student, tmp_path / "out")
    assert not (tmp_path / "out" / "colours").exists()
    again = get_peft_model(tiny_model("llama", 400), LoraConfig(r=2, task_type="CAUSAL_LM"), "shapes")
    load_student(again, tmp_path / "out")
    assert torch.equal(logits(again), logits(student))
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "out"))), logits(student), atol=1e-4, rtol=1e-3)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(plain), logits(student))


def test_each_parameter_keeps_its_own_dtype(tmp_path):
    """Loading a checkpoint keeps the dtype of each parameter, for example a float32 head in a bfloat16 model."""
    student = tiny_model("llama").to(torch.bfloat16)
    student.model.norm.float()
    student.lm_head.float()
    torch.nn.init.normal_(student.lm_head.weight, generator=torch.Generator().manual_seed(1))
    saved = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    save_causal_lm(student, tmp_path)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    load_student(student, tmp_path)
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name


def test_the_tokenizer_and_weights_survive_settings_that_json_cannot_hold(tmp_path):
    """Weights and tokenizer are saved even if the generation settings contain values that JSON cannot represent."""
    run = trainer(tmp_path, method="sft", max_steps=1)
    run.student.generation_config.own = object()
    run.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(("method", "options"), ONE_TOKENIZER)
def test_two_tokenizers_are_refused(tmp_path, method, options):
    """Methods for one tokenizer refuse models with two, because equal ids would be unrelated tokens."""
    with pytest.raises(UserError, match=f"method {method} requires a teacher with the student's tokenizer"):
        trainer(tmp_path, method=method, loss_options=options, two_tokenizers=True)


@pytest.mark.parametrize(("method", "options"), ONE_TOKENIZER)
def test_one_tokenizer_and_heads_of_two_widths_train(tmp_path, method, options):
    """Models with one tokenizer are accepted if their heads are padded to different sizes."""
    tokenizer = TOKENIZERS[0]
    run = DistillTrainer(
        model=tiny_model("llama", len(tokenizer), seed=1),
        teacher_model=tiny_model("gemma2", len(tokenizer) + 3, seed=2),
        args=DistillConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            template="plain",
            use_cpu=True,
            method=method,
            loss_options=options,
        ),
        train_dataset=ROWS,
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    assert run.train().training_loss > 0


def test_a_term_without_weight_has_no_gradient_norm(tmp_path):
    """A logged 0 would say that the term trains nothing but the maps."""
    run = trainer(tmp_path, method="dwa_kd", loss_options={"dtw_width": 8})
    micro_batches, num_tokens = run.get_batch_samples(iter(run.get_train_dataloader()), 1, torch.device("cpu"))
    batch, sides, scales = micro_batches[0][0]
    output = run.model(batch.student, sides, scales, num_tokens, term_gradients=True)
    assert output["terms"].keys() - output["gradient_squares"].keys() == {"loss", "dtw_border"}


def test_the_gradient_of_each_term_at_the_hidden_states(tmp_path):
    """The norm is that of the term as it enters the loss: weighted, and divided by the tokens of the step."""
    run = trainer(tmp_path, method="kd", loss_options={"kd_rate": 0.25})
    micro_batches, num_tokens = run.get_batch_samples(iter(run.get_train_dataloader()), 1, torch.device("cpu"))
    batch, sides, scales = micro_batches[0][0]
    output = run.model(batch.student, sides, scales, num_tokens, term_gradients=True)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    hidden = run.student.model(batch.student.input_ids, batch.student.attention_mask).last_hidden_state
    hidden = hidden[batch.student.response_mask].detach().requires_grad_()
    logits = run.student.lm_head(hidden)
    targets = batch.student.target_ids[batch.student.response_mask]
    theirs = sides[0].head.logits(sides[0].hidden).div(2).softmax(-1)
    terms = {
        "ce": 0.75 * torch.nn.functional.cross_entropy(logits, targets),
        "kd": 0.25 * torch.nn.functional.cross_entropy(logits / 2, theirs),
    }
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, hidden, retain_graph=True)
        assert output["gradient_squares"][name].item() == pytest.approx(gradient.square().sum().item(), rel=1e-4)
