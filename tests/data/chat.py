"""Build two tokenizers whose chat templates differ in markers, role names, beginning and end token."""

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.builders import byte_bpe, unigram_byte_fallback

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def chatml() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Qwen's: byte-level BPE, no beginning-of-sequence token, and `<|im_end|>` after answers."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = _CHATML
    return tokenizer


def gemma_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Gemma's: SentencePiece, `<s>` before every text, and `<end_of_turn>` after answers."""
    tokenizer = with_bos(unigram_byte_fallback())
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = _GEMMA
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer add its beginning-of-sequence token to every text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer
