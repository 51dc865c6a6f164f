"""Distil with DWA-KD in your own training loop: `python examples/own_loop.py [STUDENT TEACHER]`."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dwakd

COLOURS = {"door": "red", "cat": "black", "sea": "blue", "sky": "grey", "tree": "green", "lamp": "warm"}
ROWS = [{"prompt": f"Which colour has the {noun}?", "response": f"It is {colour}."} for noun, colour in COLOURS.items()]


def tiny(vocab_size: int, width: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build a random model and train a tokenizer for it, in place of models from the Hugging Face Hub."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["prompt"] + row["response"] for row in ROWS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **sizes)), fast


def main(names: list[str]) -> list[float]:
    """Train the student for some steps and return the losses."""
    torch.manual_seed(0)
    if names:
        (student, student_tokenizer), (teacher, teacher_tokenizer) = (
            (dwakd.load_causal_lm(name), dwakd.load_tokenizer(name)) for name in names
        )
    else:
        (student, student_tokenizer), (teacher, teacher_tokenizer) = tiny(280, 32), tiny(340, 48)

    pairs = dwakd.encode_rows(ROWS, student_tokenizer, teacher_tokenizer, template="plain")
    loader = DataLoader(pairs, batch_size=3, shuffle=True, collate_fn=dwakd.collate)
    loss_function = dwakd.DwaKdLoss(variant="recommended", widths=dwakd.model_widths(student, teacher))
    groups = [
        {"params": student.parameters(), "lr": 5e-4},
        {"params": loss_function.parameters(), "lr": 1e-3},  # the projectors between the two models
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for epoch in range(5):
        for batch in loader:
            student_side, teacher_side = dwakd.paired_sides(student, teacher, batch)
            output = loss_function(student_side, teacher_side)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, cross-entropy {output.terms['ce']:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
