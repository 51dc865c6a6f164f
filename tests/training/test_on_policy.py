"""On-policy training: who answers which prompt, what student and teacher read of the answer, and what is refused."""

import json

import pytest
import torch

from dwakd import METHODS, DistillConfig, DistillTrainer, UserError
from dwakd.data.encoding import TextEncoder
from dwakd.evaluation.generate import Generated
from dwakd.losses import method_options
from dwakd.training.on_policy import AnswerCounts, AnswerEncoder, answer_metrics
from dwakd.training.teacher import CachedTeacher
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model, wordpiece
from tests.command_line import one_sentence
from tests.command_line import run as command
from tests.training.builders import ROWS, assert_same, on_policy, trainer, weights

HALF = on_policy(0.5)
BYTES = {"alignment": "bytes", "values": "hidden"}
SUM = {"losses": [{"method": "dwa_kd", "variant": "recommended"}, {"method": "alm", "weight": 0.5}]}
OPTIONS = {"dskd": BYTES, "dwa_kd": BYTES, "sum": SUM}
CAPABLE = [name for name in METHODS if method_options(name, OPTIONS.get(name, {})).supports_sampled] + ["sum"]
ALL = {"method": "alm", **on_policy(1.0)}


def step_of(run, step=0):
    """The micro-batches of a step, with the batches that the data loader gave for them."""
    run.state.global_step = step
    given = list(run.get_train_dataloader())
    found, _ = run.get_batch_samples(iter(given), len(given), torch.device("cpu"))
    return given, [micro for item in found for micro in item]


def response(tokens, row):
    """Target ids and byte ends of the response of a row."""
    mask = tokens.response_mask[row]
    return tokens.target_ids[row][mask].tolist(), tokens.byte_ends[row][mask].tolist()


def test_the_student_keeps_its_tokens_and_the_teacher_reads_their_text(tmp_path):
    """If the student learned on another tokenisation of its answer, it would not learn where it goes."""
    run = trainer(tmp_path, **ALL)
    own, other = (TextEncoder(tokenizer, "plain") for tokenizer in (byte_bpe(), bpe_byte_fallback()))
    given, micro_batches = step_of(run)
    assert len(micro_batches) == 4
    num_canonical = 0
    for before, (batch, (side,), _) in zip(given, micro_batches, strict=True):
        assert batch.num_sampled == len(batch) == 4
        assert batch.example_ids == before.example_ids
        for row in range(4):
            ids, ends = response(batch.student, row)
            text = own.tokenizer.decode(ids)
            assert 6 <= len(ids) <= 9, "a random student does not end its answers, but some end inside a character"
            assert ends[-1] == len(text.encode())
            prompt = batch.student.input_ids[row, : batch.student.num_tokens[row] - len(ids) + 1].tolist()
            assert prompt == before.student.input_ids[row, : len(prompt)].tolist()
            assert response(batch.teachers[0], row) == other.response_ids(text)
            num_canonical += own.response_ids(text)[0] == ids
        assert len(side.hidden) == sum(batch.teachers[0].num_rows)
    assert num_canonical < 16, "the test must contain answers that the tokenizer would split otherwise"


def test_sampled_tokens_come_from_the_current_student(tmp_path):
    """Answers of the untrained student would make training off-policy again."""
    run = trainer(tmp_path, **{**ALL, "sampling_temperature": 1e-3})
    run.train()
    _, micro_batches = step_of(run)
    tokens = micro_batches[0].batch.student
    with torch.no_grad():
        likeliest = run.student.eval()(tokens.input_ids, tokens.attention_mask).logits.argmax(-1)
    assert torch.equal(likeliest[tokens.response_mask], tokens.target_ids[tokens.response_mask])


def test_the_share_of_answered_prompts(tmp_path):
    """Each prompt is chosen on its own: neither always the same rows, nor the same number in every step."""
    run = trainer(tmp_path, rows=ROWS * 3, method="alm", **on_policy(0.3) | {"max_new_tokens": 1})
    chosen = []
    for step in range(12):
        batches = [micro.batch for micro in step_of(run, step)[1]]
        assert {n for batch in batches for n in batch.example_ids} == set(range(48))
        chosen.append({n for batch in batches for n in batch.example_ids[len(batch) - batch.num_sampled :]})
    assert sum(map(len, chosen)) / (12 * 48) == pytest.approx(0.3, abs=0.08)  # four standard errors
    assert len({frozenset(rows) for rows in chosen}) == 12
    assert len(set.union(*chosen)) > 40


@pytest.mark.parametrize("method", CAPABLE)
def test_every_capable_method_trains_and_accumulation_changes_nothing(tmp_path, method):
    """Which prompts are answered, the answers, and the sums over tokens must not depend on the batch size."""
    options = {"method": method, "loss_options": OPTIONS.get(method, {}), "max_steps": 2, **HALF}
    whole = trainer(tmp_path / "whole", per_device_train_batch_size=4, **options)
    split = trainer(tmp_path / "split", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for run in (whole, split):
        run.train()
    for one, other in zip(whole.state.log_history, split.state.log_history, strict=True):
        for name in one.keys() - {"grad_norm", "epoch"}:
            if "per_second" not in name and "runtime" not in name:
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-6), name
    assert_same(weights(split), weights(whole), atol=2e-4)


def test_the_cross_entropy_does_not_reach_sampled_answers(tmp_path):
    """A student that learned its own answers as if they were right would repeat its mistakes."""
    silent = {"loss_options": {"alm_weight": 0.0}}
    with pytest.raises(UserError, match="every gradient of the student is zero"):
        trainer(tmp_path / "all", **silent, **ALL).train()
    run = trainer(tmp_path / "half", method="alm", max_steps=1, **silent, **HALF)
    run.train()
    (log,) = [entry for entry in run.state.log_history if "ce" in entry]
    assert log["ce"] == pytest.approx(log["loss"], rel=1e-5)


def test_a_resumed_run_gives_the_same_student(tmp_path):
    """The answers of a step must not depend on the steps that this process has taken."""
    options = {"method": "alm", "max_steps": 6, "save_strategy": "steps", "save_steps": 2, **HALF}
    options |= {"logging_steps": 4, "save_total_limit": None}
    whole = trainer(tmp_path / "run", **options)
    whole.train()
    resumed = trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(weights(resumed), weights(whole))
    assert not torch.equal(
        weights(trainer(tmp_path / "b", **options | {"seed": 4}))["student.lm_head.weight"],
        weights(whole)["student.lm_head.weight"],
    )


def row_of(student, ids, *teachers, ended=True, max_length=100):
    encoders = [TextEncoder(tokenizer, "plain") for tokenizer in (student, *teachers)]
    return AnswerEncoder(encoders, max_length, max_length).encode(
        0, [[5, 6] for _ in encoders], Generated("", ids, ended, 0.0)
    )


def targets(side):
    return [target for target, inside in zip(side["target_ids"], side["response_mask"], strict=True) if inside]


def test_an_answer_that_was_cut_has_no_end_token():
    """Otherwise the teacher would be asked to end in the middle of a sentence, and the student would learn it."""
    own, other = byte_bpe(), bpe_byte_fallback()
    ids = [own.convert_tokens_to_ids(letter) for letter in "red"]
    for ended in (True, False):
        features = row_of(own, ids, other, ended=ended).features
        (teacher,) = features["teachers"]
        assert targets(features["student"]) == [*ids, *([own.eos_token_id] if ended else [])]
        assert features["student"]["byte_ends"][1:] == [1, 2, 3, *([3] if ended else [])]
        assert features["student"]["input_ids"] == [5, 6, *ids[: 3 if ended else 2]]
        assert targets(teacher)[-1:] == [other.eos_token_id] or not ended
        assert teacher["byte_ends"][-1] == 3


def test_an_empty_answer_consists_of_its_end():
    """A side without any response position would raise an error in the middle of a run."""
    own, teacher = byte_bpe(), wordpiece()
    teacher.eos_token = "[SEP]"
    space = own.convert_tokens_to_ids("Ġ")
    for ids, ended in (([], True), ([space, space], True), ([space], False)):  # WordPiece drops white space
        features = row_of(own, ids, teacher, ended=ended).features
        for side, tokenizer in ((features["student"], own), (features["teachers"][0], teacher)):
            assert side["input_ids"] == [5, 6]
            assert targets(side) == [tokenizer.eos_token_id]
            assert side["byte_ends"][-1] == 0


def test_a_teacher_with_the_same_vocabulary_reads_the_sampled_tokens():
    """Methods for one tokenizer compare the models token by token, but text need not be split as it was sampled."""
    own = byte_bpe()
    ids = [own.convert_tokens_to_ids(letter) for letter in "The"]
    assert TextEncoder(own, "plain").response_ids("The")[0] != ids
    features = row_of(own, ids, byte_bpe()).features
    assert features["teachers"] == [features["student"]]


def test_an_answer_is_cut_before_a_token_that_the_tokenizer_does_not_have():
    """Heads may have more entries than the tokenizer has tokens; such a token has no text that a teacher could read."""
    own, other = byte_bpe(), bpe_byte_fallback()
    known = own.convert_tokens_to_ids("r")
    row = row_of(own, [known, len(own) + 3, known], other)
    assert (row.ids, row.ended, targets(row.features["student"])) == ([known], False, [known])


def test_a_cut_answer_does_not_end_inside_a_character():
    """The teacher would read "\ufffd" where the student wrote the correct first bytes of a character."""
    own, other = byte_bpe(), bpe_byte_fallback()
    ids, _ = TextEncoder(own, "plain").response_ids("red \U0001f680")
    for size in range(1, len(ids) + 1):
        row = row_of(own, ids[:size], other, ended=False)
        whole = [count for count in range(size + 1) if "\ufffd" not in own.decode(ids[:count])]
        text = own.decode(row.ids)
        assert row.ids == ids[: whole[-1]]
        assert targets(row.features["teachers"][0]) == TextEncoder(other, "plain").response_ids(text)[0]
    assert row.ids == ids
    invalid = ids[-1:] * 5  # bytes that no character begins with are kept, because they are not part of one
    assert row_of(own, invalid, other, ended=False).ids == invalid


def test_an_answer_that_is_too_long_for_a_teacher_is_cut_at_a_token_of_the_student():
    """The sides must contain the same text, and the teacher's may not exceed max_length."""
    own, other = byte_bpe(vocab_size=400), bpe_byte_fallback()
    ids, _ = TextEncoder(own, "plain").response_ids("The quick brown fox \U0001f680\U0001f680\U0001f680")
    for room in range(1, 30):
        row = row_of(own, ids, other, max_length=2 + room)
        teacher = row.features["teachers"][0]
        assert row.ids == ids[: len(row.ids)]
        assert len(teacher["input_ids"]) <= 1 + room
        assert teacher["byte_ends"][-1] == row.features["student"]["byte_ends"][-1]
        assert not row.ended or row.ids == ids


def test_what_is_logged_about_the_answers():
    """A user sees by these numbers that a student stopped ending its answers, or repeats itself."""
    own = byte_bpe()
    counts = AnswerCounts()
    a, b = (own.convert_tokens_to_ids(letter) for letter in "ab")
    counts.add([row_of(own, [a] * 8, ended=False), row_of(own, [a, b, a, b]), row_of(own, []), row_of(own, [])])
    assert answer_metrics(torch.tensor(counts.take())) == {
        "completions/mean_length": 3.0,
        "completions/clipped_ratio": 0.25,
        "completions/empty_ratio": 0.5,
        "completions/repetition": pytest.approx(4 / 6),
    }
    assert answer_metrics(torch.tensor(counts.take())) == {}


def test_encoded_prompts_without_room_for_an_answer_are_refused(tmp_path):
    """Rows that were encoded for a larger max_length would end in a traceback at their step."""
    rows = trainer(tmp_path / "long", method="alm").train_dataset
    with pytest.raises(UserError, match="prompts leave no room for the student's answers: raise max_length"):
        trainer(tmp_path / "run", rows=rows, **{**ALL, "max_length": 3, "max_prompt_length": 2})


def test_prompts_without_answers(tmp_path):
    """Only the prompts are needed if the student answers all of them."""
    bare = [{"prompt": row["prompt"]} for row in ROWS]
    runs = [trainer(tmp_path / str(len(rows[0])), rows=rows, **ALL) for rows in (ROWS, bare)]
    for run in runs:
        run.train()
        assert not any({"ce", "term_grad_norm/ce"} & entry.keys() for entry in run.state.log_history)
        assert all(entry["completions/mean_length"] > 5 for entry in run.state.log_history[:-1])
    assert_same(weights(runs[1]), weights(runs[0]))
    with pytest.raises(UserError, match="has no column with the response"):
        trainer(tmp_path / "half", rows=bare, method="alm", **HALF)
    long = [*bare, {"prompt": "word " * 60}]
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens for the student, above data.max_prompt_length=40"):
        trainer(tmp_path / "long", rows=long, **ALL)


def test_an_adapter_answers_and_learns(tmp_path):
    """The answers of the base model would not be those of the student that is trained."""
    run = trainer(tmp_path, lora=True, **ALL)
    before = weights(run)
    run.train()
    changed = {name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sft"}, "method sft cannot train on the student's own answers"),
        ({"method": "min_ed"}, "method min_ed cannot train"),
        ({"method": "dwa_kd"}, "method dwa_kd cannot train"),
        ({"method": "dskd", "loss_options": BYTES, "lmbda": 1.0}, "set training.lmbda below 1"),
        ({"method": "sum", "loss_options": SUM, "lmbda": 1.0}, "method dwa_kd needs some given responses"),
        (
            {"method": "sum", "loss_options": {"losses": [{"method": "sft"}, {"method": "min_ed"}]}},
            "method min_ed cannot",
        ),
        ({"method": "alm", "lmbda": 1.5}, "lmbda"),
        ({"method": "alm", "sampling_temperature": 0.0}, "sampling_temperature"),
    ],
)
def test_methods_and_values_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**{"lmbda": 0.5, "use_cpu": True, **options})


def test_teachers_that_are_refused(tmp_path, monkeypatch):
    """A teacher that writes another end token would teach the student never to end."""
    student, teacher = byte_bpe(), byte_bpe()
    teacher.eos_token = "a"
    options = {"method": "kd", "two_tokenizers": False, **HALF}
    monkeypatch.setattr("tests.training.builders.TOKENIZERS", (student, teacher))
    trainer(tmp_path / "same", **options)
    with pytest.raises(
        UserError, match=r"the teacher ends its answers with 'a' and the student with '<\|endoftext\|>'"
    ):
        trainer(tmp_path / "other", **{**options, "two_tokenizers": True})
    tiny_model("gemma2", len(teacher)).save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "teacher")
    cached = CachedTeacher(tmp_path / "cache", str(tmp_path / "teacher"))
    with pytest.raises(UserError, match="a teacher cache does not contain the student's answers"):
        trainer(tmp_path / "cached", teacher_model=cached, method="alm", **HALF)
    assert not (tmp_path / "cache").exists()


def test_a_student_that_is_sharded_is_refused(tmp_path):
    """A sharded student is refused, because its parameters are complete only during the forward pass of the wrapper."""
    run = trainer(tmp_path, method="alm", **HALF)
    run.is_fsdp_enabled = True
    with pytest.raises(UserError, match=r"training\.lmbda: a student sharded by FSDP or DeepSpeed"):
        run.train()


def test_several_teachers_read_the_answers(tmp_path):
    """Each teacher has its own tokens of the same answer."""
    tokenizers = [byte_bpe(), bpe_byte_fallback(), byte_bpe()]
    models = [
        tiny_model(family, len(tok), seed=n)
        for n, (family, tok) in enumerate(zip(("llama", "gpt2", "qwen2"), tokenizers, strict=True))
    ]
    args = DistillConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        template="plain",
        max_steps=2,
        disable_tqdm=True,
        **{**HALF, "method": "dskd_v2"},
    )
    run = DistillTrainer(models[0], models[1:], args, ROWS, None, tokenizers[0], tokenizers[1:])
    batch = step_of(run)[1][0].batch
    assert [tokens.num_rows[-1] for tokens in batch.teachers][1] == batch.student.num_rows[-1]
    run.train()
    logs = [entry for entry in run.state.log_history if "ce" in entry]
    assert len(logs) == 2
    assert all({"gate_1", "gate_2", "grad_norm", "completions/mean_length"} <= entry.keys() for entry in logs)


def test_a_recipe_with_prompts_alone_and_one_with_a_cache(workspace, tmp_path, monkeypatch, capsys):
    """The command line must find these mistakes before it loads a model, and must accept rows without a response."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    call = ["train", workspace / "recipe.yaml", "-o", tmp_path / "run", f"data.train={tmp_path / 'prompts.jsonl'}"]
    call += ["loss.method=alm", "training.lmbda=1", "training.max_new_tokens=4"]
    code, _, err = command(monkeypatch, capsys, *call, f"teacher.cache={tmp_path / 'cache'}")
    assert code == 2
    assert "a teacher cache does not contain the student's answers" in one_sentence(err)
    code, _, err = command(monkeypatch, capsys, *call, "loss.method=sft")
    assert code == 2
    assert "method sft cannot train on the student's own answers" in one_sentence(err)
    code, out, err = command(monkeypatch, capsys, *call)
    assert code == 0, err
    assert "after 2 steps" in out
