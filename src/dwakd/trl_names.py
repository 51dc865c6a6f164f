"""Names that users of TRL and of earlier transformers write, and what dwakd has instead."""

_TABLE = """
model_name_or_path model student student_model: pass model to DistillTrainer (recipe: student.model)
teacher_model_name_or_path teacher_model_path teacher_model: pass teacher_model to DistillTrainer (recipe: teacher.model)
model_revision: use model_init_kwargs={'revision': ...} (recipe: student.revision)
teacher_model_revision: use teacher_model_init_kwargs={'revision': ...} (recipe: teacher.revision)
dtype torch_dtype: use model_init_kwargs={'dtype': ...} (recipe: student.dtype, teacher.dtype)
tokenizer: use processing_class (in a recipe, the tokenizer is that of the model)
teacher_tokenizer_name_or_path: use teacher_processing_class (in a recipe, the tokenizer is that of the teacher)
chat_template_path: use student.chat_template_path and teacher.chat_template_path
callbacks: pass callbacks to DistillTrainer
model_init: pass model to DistillTrainer
eos_token pad_token: set it on the tokenizer that is passed as processing_class
attn_implementation quantization_config: use model_init_kwargs (recipe: student.NAME, teacher.NAME)
load_in_8bit load_in_4bit: use model_init_kwargs={'quantization_config': ...} (recipe: student.quantization_config)
device_map: use teacher_model_init_kwargs (recipe: teacher.device_map), and shard the student with FSDP
peft_config use_peft lora lora_r lora_alpha lora_dropout: use peft_config (recipe: student.peft)
lora_target_modules lora_modules_to_save: use peft_config (recipe: student.peft)
dataset_name dataset: pass train_dataset to DistillTrainer (recipe: data.train)
dataset_train_split: name the split in the data set, as in org/name@train (recipe: data.train, data.eval)
dataset_test_split: name the split in the data set, as in org/name@train (recipe: data.train, data.eval)
dataset_text_field: name the columns in prompt_column and response_column (recipe: data.prompt, data.response)
formatting_func: use template, which may be a format string (recipe: data.template)
max_seq_length: use max_length (recipe: data.max_length)
packing eval_packing packing_strategy: leave it out; max_tokens_per_batch and padding_free reduce padding
completion_only_loss assistant_only_loss: leave it out, only the response is trained on
truncation_mode: leave it out, a response that is too long is truncated at its end
shuffle_dataset: leave it out, rows are shuffled unless train_sampling_strategy is 'sequential'
dataset_kwargs dataset_num_proc dataset_batch_size pad_to_multiple_of activation_offloading: leave it out
uld_skip_student_eos uld_skip_teacher_eos overwrite_output_dir save_safetensors: leave it out
chat_template_kwargs: give it as a column of the rows
data_collator: leave it out, batches contain the tokens of both models
temperature: use loss_options={'temperature': ...} (recipe: loss.temperature), or sampling_temperature
alpha: use loss_options={'ce_weight': ..., 'kd_weight': ...} (recipe: loss.ce_weight, loss.kd_weight)
beta: use method='gold' with loss_options={'beta': ...} (recipe: loss.beta)
loss_type: use method (recipe: loss.method)
use_uld_loss: use method='uld' or method='gold' (recipe: loss.method)
use_extended_uld uld_use_hybrid_loss: use method='gold' (recipe: loss.method)
uld_token_merge_strategy: use method='gold' with loss_options={'merge': ...} (recipe: loss.merge)
uld_hybrid_matched_weight: use method='gold' with loss_options={'matched_weight': ...} (recipe: loss.matched_weight)
uld_hybrid_unmatched_weight: use method='gold' with loss_options={'unmatched_weight': ...} (recipe: loss.unmatched_weight)
uld_crossentropy_weight: use method='gold' with loss_options={'ce_weight': ...} (recipe: loss.ce_weight)
uld_distillation_weight: use method='gold' with loss_options={'kd_weight': ...} (recipe: loss.kd_weight)
uld_student_temperature: use method='gold' with loss_options={'temperature': ...} (recipe: loss.temperature)
uld_teacher_temperature: use method='gold' with loss_options={'temperature': ...} (recipe: loss.temperature)
compute_loss_func preprocess_logits_for_metrics optimizer_cls_and_kwargs: write your own loop with dwakd.paired_sides
seq_kd: let dwakd generate write the teacher's answers, and train on them (recipe: data.responses: teacher)
max_completion_length: use max_new_tokens (recipe: training.max_new_tokens)
top_p top_k min_p: leave it out, the student's answers are sampled at sampling_temperature from all tokens
repetition_penalty: leave it out, the student's answers are sampled at sampling_temperature from all tokens
generation_kwargs: leave it out, the student's answers are sampled at sampling_temperature from all tokens
cache_implementation: leave it out, the student's answers are sampled at sampling_temperature from all tokens
num_generations generation_batch_size: leave it out, the student answers a prompt once in each step
use_vllm steps_per_generation: leave it out, the student answers in this process
log_completions log_completions_steps: leave it out; dwakd eval writes the student's answers to test sets
num_completions_to_print log_unique_prompts: leave it out; dwakd eval writes the student's answers to test sets
wandb_log_unique_prompts: leave it out; dwakd eval writes the student's answers to test sets
include_tokens_per_second jit_mode_eval: leave it out (tokens_per_second is always logged)
epochs num_epochs: use num_train_epochs (recipe: training.num_train_epochs)
lr: use learning_rate (recipe: training.learning_rate)
evaluation_strategy: use eval_strategy (recipe: training.eval_strategy)
group_by_length: use train_sampling_strategy='group_by_length' (recipe: training.train_sampling_strategy)
no_cuda: use use_cpu (recipe: training.use_cpu)
logging_dir: set the environment variable TENSORBOARD_LOGGING_DIR
push_to_hub_model_id: use hub_model_id (recipe: training.hub_model_id)
push_to_hub_token: use hub_token
per_gpu_train_batch_size per_device_batch_size batch_size: use per_device_train_batch_size
"""

INSTEAD = {
    name: text for line in _TABLE.split("\n") for names, _, text in [line.partition(": ")] for name in names.split()
}
"""What to write instead of a name, as the second half of a sentence."""


def instead_of(name: str) -> str | None:
    """Return what to write instead of a name, or None if it is not one of TRL's."""
    return INSTEAD.get(name) or (INSTEAD["use_vllm"] if name.startswith("vllm_") else None)
