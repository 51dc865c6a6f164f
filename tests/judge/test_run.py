"""Test `dwakd judge` with a fake judge behind a real server: files, resuming, orders, costs and every sentence on an error."""

import json
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from rich.console import Console

from dwakd import UserError
from dwakd.answers.endpoint import KEY_VARIABLE
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import load_examples
from dwakd.evaluation.evaluate import evaluate_model
from dwakd.evaluation.options import EvalOptions
from dwakd.evaluation.report import write_evaluation
from dwakd.judge.options import JudgeOptions
from dwakd.judge.prompts import read_prompt
from dwakd.judge.run import Judge, judge_runs
from dwakd.recipe.sections import EndpointSection
from tests.answers.builders import read_rows
from tests.answers.server import llama_cpp, running
from tests.builders import byte_bpe, tiny_model
from tests.command_line import one_sentence, run
from tests.judge.server import JudgeServer, write_answers

pytest.importorskip("openai")
SHORT, LONG = "Yes.", "Yes, because it is so."
A = [LONG] * 12 + [SHORT] * 5 + ["Nope", "", SHORT]
B = [SHORT] * 12 + [LONG] * 5 + ["Fine", SHORT, SHORT]
"""By length: 12 wins, 5 losses and a tie of A; then an empty answer and equal answers."""


@pytest.fixture(scope="module")
def server():
    with running(JudgeServer) as one:
        yield one


@pytest.fixture
def judged(server, tmp_path):
    """Return a function that judges A against B into a folder and returns the content of judge.json and verdicts.jsonl."""
    server.requests.clear()
    server.times.clear()
    places = [tmp_path / "runs" / name for name in "ab"]
    for place, answers in zip(places, (A, B), strict=True):
        write_answers(place / "eval" / "set.answers.jsonl", answers)

    def judge(model="longer", *, places=places, output="out", overwrite=False, **options):
        section, folder = EndpointSection(base_url=server.url, model=model), tmp_path / output
        options = JudgeOptions(**options)
        judge_runs(places, section, options, output=folder, overwrite=overwrite)
        return json.loads((folder / "judge.json").read_text()), read_rows(folder / "verdicts.jsonl")

    return judge


def test_wins_ties_and_losses(judged, server, tmp_path):
    """A verdict on the answer that was read first must be credited to the run that wrote it, whatever the order."""
    about, lines = judged(length_control=True)
    result = about["results"]["set"]
    assert [result[key]["count"] for key in ("win", "tie", "loss")] == [12, 2, 6]
    assert (result["pairs"], result["without_verdict"], result["without_request"]) == (20, 0, 2)
    assert result["win_rate"]["percent"] == 65
    assert result["length_controlled_win_rate"]["low"] < 50
    assert len(lines) == len(server.requests) == 18
    assert {line["first"] for line in lines} == {"A", "B"}
    assert server.requests[0]["temperature"] == 0.1
    assert {line["model"] for line in lines} == {"longer-2026"}
    assert about["signature"]["judge"]["model"] == "longer"
    pytest.importorskip("altair")
    assert "A wins" in (tmp_path / "out" / "judge.svg").read_text()


def test_a_judge_with_a_bias_for_the_first_answer_is_exposed(judged):
    """In both orders, such a judge must give ties only, instead of wins for the run that came first by chance."""
    once = judged("first")[0]["results"]["set"]
    assert once["first_preferred"]["percent"] == 100
    assert once["win"]["count"] > 2
    both, lines = judged("first", both_orders=True, overwrite=True)
    both = both["results"]["set"]
    assert both["order_dependent"]["percent"] == both["first_preferred"]["percent"] == 100
    assert (both["win"]["count"], both["loss"]["count"]) == (0, 1), "the empty answer"
    assert len(lines) == 36, "the votes in the first order are used again"


@pytest.mark.parametrize(("model", "attempts", "without_verdict"), [("mute", 2, 18), ("late", 2, 0)])
def test_a_reply_without_a_verdict_is_asked_for_again_once(model, attempts, without_verdict, judged, server):
    """A pair without a verdict must not count as a tie, and must not be asked for forever."""
    about, lines = judged(model)
    assert about["results"]["set"]["without_verdict"] == without_verdict
    assert len(server.requests) == len(lines) == 18 * attempts
    judged(model)
    assert len(server.requests) == 18 * attempts


def test_a_killed_command_continues(judged, server, tmp_path):
    """A killed process must not cost the verdicts that were paid for, also if it died while it wrote one."""
    places = [tmp_path / "runs" / name for name in "ab"]
    command = [sys.executable, "-m", "dwakd", "judge", *map(str, places), "--base-url", server.url, "-m", "slow"]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "out"), "--batch-size", "2"], stdout=subprocess.DEVNULL)
    while len(server.requests) < 8 and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is writing to"):
        judged("slow")
    process.kill()
    process.wait()
    path = tmp_path / "out" / "verdicts.jsonl"
    stored = path.read_text().split("\n")[:-1]
    assert 0 < len(stored) < 18
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    _, lines = judged("slow")
    assert len(lines) == len({line["key"] for line in lines}) == 18
    assert [json.dumps(line) for line in lines][: len(stored)] == stored
    # The requests that were open at the kill may be repeated, those with a stored verdict may not.
    prompts = Counter(server.prompts())
    assert len(prompts) == 18
    repeated = [prompt for prompt, count in prompts.items() if count > 1]
    assert len(repeated) <= 2
    assert not [line for line in stored for prompt in repeated if json.loads(line)["question"] in prompt]
    before = len(server.requests)
    judged("slow")
    assert len(server.requests) == before


def test_a_larger_limit_keeps_the_verdicts(judged, server):
    """Most users start with few prompts; the others must not cost the first ones again."""
    judged(limit=7)
    first = server.prompts()
    judged(limit=20, overwrite=True)
    assert len(set(server.prompts())) == len(server.requests) == 18
    assert set(first) < set(server.prompts())


def test_results_with_other_options_are_kept(judged):
    """A judge.json must not be replaced by that of another judge without notice."""
    judged()
    with pytest.raises(UserError, match=r"holds other results \(judge model longer before, first now.*--overwrite"):
        judged("first")


def test_requests_per_minute(judged, server):
    """A limited key fails if the requests start faster."""
    judged(limit=6, requests_per_minute=600)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert sum(gaps) > 0.06 * len(gaps)


def test_nothing_is_sent_after_an_interruption(judged, server, tmp_path, monkeypatch):
    """Requests that wait for their time cost money; Ctrl-C must not wait for them."""
    asked, original = [], Judge.ask

    def ask(self, *arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Judge, "ask", ask)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judged(requests_per_minute=2, batch_size=8)
    assert time.monotonic() - started < 20, "the second request would be sent after 30 seconds"
    assert len(server.requests) <= 1


def test_sampled_answers_and_files(judged, server, tmp_path):
    """The pass is chosen by its seed, and files of other tools are read by their columns."""
    assert judged(answers_seed=10, output="sampled")[0]["results"]["set"]["without_request"] == 20, "equal answers"
    rows = [
        [{"instruction": "Count", "input": f"Q{n}", "output": text} for n in order]
        for text, order in ((SHORT, (1, 2)), (LONG, (2, 1)))
    ]
    for name, lines in zip("ab", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    about, lines = judged(places=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"], output="files")
    assert about["results"]["a"]["loss"]["count"] == 2
    assert {line["question"] for line in lines} == {"Count\nQ1", "Count\nQ2"}
    for name, temperature in (("a", 1.0), ("b", 0.7)):
        lines = [{"prompt": "Q", "answer": name, "seed": 10, "temperature": temperature}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"a\.jsonl was sampled at temperature 1\.0, but .*b\.jsonl at 0\.7"):
        judged(places=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"], output="other", answers_seed=10)


def test_several_sets(judged, tmp_path):
    """Each set has its own numbers, and all sets together a row."""
    for name in "ab":
        write_answers(tmp_path / "runs" / name / "eval" / "other.answers.jsonl", [name * 3, name], first=5)
    results = judged()[0]["results"]
    assert {name: result["pairs"] for name, result in results.items()} == {"other": 2, "set": 20, "all sets": 22}


def test_answers_of_an_evaluation(judged, server, tmp_path):
    """Two students with different templates answer the same test set; the judge must read the question alone."""
    rows = [{"instruction": f"Repeat {n}", "input": "a b c", "output": "a b c"} for n in range(3)]
    for name, template, seed in (("one", "alpaca", 0), ("two", "plain", 1)):
        encoder = TextEncoder(byte_bpe(), template)
        options = EvalOptions(max_new_tokens=8, seeds=1)
        model = tiny_model("llama", 400, seed=seed)
        evaluation = evaluate_model(model, encoder, load_examples(rows), options, progress=False)
        write_evaluation(evaluation, tmp_path / name / "eval" / "test.json")
    about, lines = judged(places=[tmp_path / "one", tmp_path / "two"], output="real", answers_seed=10)
    assert about["results"]["test"]["pairs"] == 3
    assert {line["question"] for line in lines} == {f"Repeat {n}\na b c" for n in range(3)}


def test_another_prompt_and_other_arguments(judged, server, tmp_path):
    """A newer model refuses max_tokens; and the paper's own prompt may be used."""
    (tmp_path / "prompt.txt").write_text(read_prompt(None).partition("\nDecide")[0])
    with pytest.raises(UserError, match=r"refuses the request \(.*; change it with --request"):
        judged("strict")
    arguments = ["max_tokens=null", "max_completion_tokens=9"]
    judged("strict", prompt=str(tmp_path / "prompt.txt"), request=arguments, limit=2)
    assert server.prompts()[-1].endswith("[Task]")
    assert (server.requests[-1]["max_completion_tokens"], "max_tokens" in server.requests[-1]) == (9, False)
    (tmp_path / "prompt.txt").write_text("{question} {first}")
    with pytest.raises(UserError, match=r"must contain \{question\}, \{first\}, \{second\}; add \{second\}"):
        judged(prompt=str(tmp_path / "prompt.txt"))


def test_a_single_refused_prompt(judged, tmp_path):
    """A content filter that refuses one prompt must not end the command, and must be counted."""
    answers = [LONG, LONG, "forbidden"]
    for name, own in (("a", answers), ("b", [SHORT] * 3)):
        write_answers(tmp_path / "runs" / name / "eval" / "set.answers.jsonl", own)
    about, lines = judged(batch_size=1)
    assert about["results"]["set"]["without_verdict"] == 1
    assert "400" in lines[-1]["refused"]


def test_a_refused_request_after_verdicts_of_another_judge(judged):
    """A model that refuses max_tokens would fill the results with votes without a verdict."""
    judged()
    with pytest.raises(UserError, match="refuses the request"):
        judged(overwrite=True, request=["user=2024-01-01"])


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ("a/eval/set", "c/eval/set", {}, "have no prompt in common: answer the same --data with dwakd eval"),
        ("two", "three", {}, "two has answers to the test sets x, y, but"),
        ("a", "empty", {}, "all answers in {0}/empty/eval/set.answers.jsonl are empty: check the template"),
        (
            "a",
            "b",
            {"answers_seed": 20},
            "has no answers sampled with seed 20: choose another seed with --answers-seed",
        ),
        ("a", "missing", {}, "missing does not exist: name a folder with results of dwakd eval"),
        ("a", "torn", {}, "torn/eval/set.answers.jsonl, line 2 is not a JSON object"),
        ("a", "textless", {}, "line 1 has no text in any column of question, prompt, instruction: add one of them"),
        ("a", "surrogate", {}, "surrogate/eval/set.answers.jsonl, line 1 is not valid Unicode text"),
        (
            "a",
            "b",
            {"request": "user=2024-01-01"},
            "refuses the request (it cannot be sent as JSON: Object of type date",
        ),
        ("a", "nested", {}, "line 1: seed and temperature must be numbers or null: correct or remove them"),
        (
            "a",
            "b",
            {"request": "max_tokens=[1]", "price_out": "1"},
            "--request max_tokens must be a whole number, or null for no limit, got [1]",
        ),
        (
            "a",
            "b",
            {"model": "unknown"},
            "does not know the model unknown or the address; correct --model or --base-url",
        ),
        ("a", "b", {"model": "locked"}, f"refuses the key; set the variable {KEY_VARIABLE}"),
        ("a", "b", {"base_url": "http://127.0.0.1:1/v1"}, "cannot be reached ([Errno 111] Connection refused)"),
    ],
)
def test_errors_are_one_sentence(a, b, options, message, judged, server, tmp_path, monkeypatch, capsys):
    """Each mistake must be explained by one sentence on the command line, without a traceback."""
    monkeypatch.setattr("dwakd.answers.endpoint._RETRIES", 0)
    folder = tmp_path / "runs"
    write_answers(folder / "c" / "eval" / "set.answers.jsonl", A, first=100)
    write_answers(folder / "empty" / "eval" / "set.answers.jsonl", [""] * 20)
    for name, sets in (("two", "xy"), ("three", "zw")):
        for one in sets:
            write_answers(folder / name / f"{one}.answers.jsonl", A)
    write_answers(folder / "torn" / "eval" / "set.answers.jsonl", A).write_text(
        '{"prompt": "a", "answer": "b"}\n{"prom'
    )
    write_answers(folder / "textless" / "eval" / "set.answers.jsonl", A).write_text('{"prompt": null, "answer": "b"}')
    write_answers(folder / "surrogate" / "eval" / "set.answers.jsonl", A).write_text(
        '{"prompt": "a", "answer": "\\udfff"}'
    )
    write_answers(folder / "nested" / "eval" / "set.answers.jsonl", A, seed=[1])
    places = [folder / (f"{one}.answers.jsonl" if "/" in one else one) for one in (a, b)]
    arguments = {"base-url": server.url, "model": "longer", "output": tmp_path / "out"}
    arguments |= {name.replace("_", "-"): value for name, value in options.items()}
    flat = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    code, _, err = run(monkeypatch, capsys, "judge", *places, *flat)
    assert code == 2
    assert message.format(folder) in one_sentence(err)


def test_the_command_shows_costs_and_needs_a_confirmation(judged, server, tmp_path, monkeypatch, capsys):
    """An expensive judge must not start by accident, and names that look like markup are printed as they are."""
    place = write_answers(tmp_path / "[bold]" / "eval" / "set.answers.jsonl", A).parents[1]
    monkeypatch.setattr("dwakd.cli.results.console", Console(width=200))
    command = ["judge", place, tmp_path / "runs" / "b", "--base-url", server.url, "--model", "longer", "--limit", 10]
    command += ["-o", tmp_path / "out", "--price-in", 2000, "--price-out", 8000]
    code, out, err = run(monkeypatch, capsys, *command)
    assert (code, len(server.requests)) == (2, 0)
    assert "is above 1: add --yes, or lower --limit" in one_sentence(err)
    assert re.search(
        r"^\d+ requests, about [\d,]+ prompt tokens and at most [\d,]+ reply tokens, which cost", err, re.MULTILINE
    )
    code, out, _ = run(monkeypatch, capsys, *command, "--yes")
    assert code == 0
    assert "[bold]" in out
    assert re.search(r"^ *A wins +\d", out, re.MULTILINE)


def test_without_altair_there_is_no_plot(judged, monkeypatch, caplog, tmp_path):
    """The verdicts must not be lost because a package for the plot is missing."""
    monkeypatch.setitem(sys.modules, "altair", None)
    judged()
    assert "no plot is written: install its packages with pip install 'dwakd[judge]'" in caplog.text
    assert not (tmp_path / "out" / "judge.svg").exists()


@pytest.mark.slow
def test_the_server_of_llama_cpp(tmp_path):
    """A real model behind a real server judges in both orders, and nothing is asked twice. A grammar allows verdicts only."""
    good, bad = ["Paris.", "An apple.", "Seven is 7."], ["Berlin is it.", "A stone is a fruit.", "No."]
    for name, own in (("a", good), ("b", bad)):
        write_answers(tmp_path / "runs" / name / "eval" / "set.answers.jsonl", own)
    places = [tmp_path / "runs" / name for name in "ab"]
    grammar = r'grammar="root ::= \"A\" | \"B\" | \"Tied\""'
    options = JudgeOptions(both_orders=True, request=["temperature=0", grammar], batch_size=2)
    with llama_cpp() as address:
        section = EndpointSection(base_url=f"{address}/v1", model="smollm2")
        judge_runs(places, section, options, output=tmp_path / "out")
        before = (tmp_path / "out" / "verdicts.jsonl").read_bytes()
        judge_runs(places, section, options, output=tmp_path / "out")
    assert (tmp_path / "out" / "verdicts.jsonl").read_bytes() == before
    lines = read_rows(tmp_path / "out" / "verdicts.jsonl")
    assert len(lines) == 6
    assert all(line["score_of_first"] is not None and line["prompt_tokens"] > 100 for line in lines)
    result = json.loads((tmp_path / "out" / "judge.json").read_text())["results"]["set"]
    assert (result["pairs"], result["without_verdict"]) == (3, 0)
    assert sum(result[key]["count"] for key in ("win", "tie", "loss")) == 3
