"""`trl-gopd preflight` prints the report of `preflight` and writes it as JSON; bad arguments load no model."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from trl_gopd import preflight
from trl_gopd.cli import main
from trl_gopd.cli.preflight import REWARDS, _reward, build_parser


QUICK = {"num_samples": 4, "max_completion_length": 6, "lambdas": (0.5, 1.25)}
FLAGS = ["--device", "cpu", "--num-samples", "4", "--max-completion-length", "6", "--lambdas", "0.5", "1.25"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?", "solution": str(i)}) + "\n" for i in range(5)))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))


def command(models, prompts, *more):
    return ["preflight", *map(str, (prompts, "--teacher", models / "teacher", "--student", models / "base", *more))]


def numbers(report):
    return {key: value for key, value in report.items() if key not in ("seconds", "settings")}


def test_is_the_report_of_the_function(models, prompts, tmp_path, capsys):
    json_path = tmp_path / "out.json"
    assert main(command(models, prompts, *FLAGS, "--json", json_path)) == 0
    report = json.loads(json_path.read_text())
    own = preflight(teacher_model=models / "teacher", model=models / "base", prompts=prompts, **QUICK).to_dict()
    assert numbers(report) == json.loads(json.dumps(numbers(own)))
    assert report["settings"]["command"].startswith(f"trl-gopd preflight {prompts} --teacher")
    out = capsys.readouterr().out
    assert f"recommended: λ = {report['recommended_lambda']:g}" in out
    assert all(reason in out for reason in report["reasons"])
    for effect in report["effects"]:
        assert f"{effect['renyi']:.4f}" in out and f"{effect['off_teacher_mass']:.3%}" in out


def test_says_that_nothing_can_be_learned(models, prompts, capsys):
    """With one model as teacher and student, which is then the reference too."""
    arguments = ["preflight", str(prompts), "--teacher", str(models / "base"), "--student", str(models / "base")]
    assert main([*arguments, *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "recommended: λ = 1\n- There is nothing to learn: student, teacher and reference agree" in out


def test_rewards_and_figure(models, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "chat.json"
    prompts.write_text(json.dumps([{"prompt": [{"role": "user", "content": f"{i}?"}], "solution": ""} for i in "abc"]))
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, solution, **kwargs):\n"
        "    return [float(len(text[0]['content'])) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    names = ["think_format_reward", "my_rewards.length"]
    assert main(command(models, prompts, *FLAGS, "--reward-funcs", *names, "--figure", "out.png")) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "reward  tokens" in out and "has the best mean reward" in out


def test_all_options_arrive(models, prompts, tmp_path):
    json_path = tmp_path / "out.json"
    more = {
        "--reference": models / "student",
        "--sample-from": "student",
        "--temperature": 0.5,
        "--seed": 3,
        "--batch-size": 3,
        "--chunk-size": 5,
        "--max-off-teacher-mass": 0.5,
        "--max-deterministic-flips": 0.25,
        "--dtype": "float32",
        "--json": json_path,
    }
    assert main(command(models, prompts, *FLAGS, *(part for pair in more.items() for part in pair))) == 0
    settings = json.loads(json_path.read_text())["settings"]
    expected = {
        "model": str(models / "base"),
        "teacher_model": str(models / "teacher"),
        "ref_model": str(models / "student"),
        "lambdas": [0.5, 1.0, 1.25],
        "sample_from": "student",
        "num_samples": 4,
        "max_completion_length": 6,
        "temperature": 0.5,
        "seed": 3,
        "batch_size": 3,
        "max_off_teacher_mass": 0.5,
        "max_deterministic_flips": 0.25,
    }
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("name", REWARDS)
def test_names_of_trl_are_functions(name):
    assert callable(_reward(build_parser(), name))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lambdas", "-1"], "expected at least one argument|λ must be a finite number"),
        (["--lambdas", "nan"], "λ must be a finite number of at least 0, got 'nan'; try 1.25"),
        (["--num-samples", "1"], "must be a whole number of at least 2, got '1'"),
        (["--temperature", "0"], "must be a finite number above 0, got '0'; try 1.0"),
        (["--temperature", "inf"], "must be a finite number above 0, got 'inf'"),
        (["--max-off-teacher-mass", "2"], "must be a number between 0 and 1, got '2'"),
        (["--max-deterministic-flips", "some"], "must be a number between 0 and 1, got 'some'"),
        (["--sample-from", "both"], "invalid choice: 'both'"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: the folder /nowhere does not exist; make it"),
        (["--figure", "/nowhere/out.png"], "--figure /nowhere/out.png: the folder /nowhere does not exist"),
        (["--figure", "out.jpeg"], "--figure out.jpeg: must end in .png, .svg or .pdf"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used"),
        (["--reward-funcs", "exactness"], "must be one of accuracy_reward, .* or a dotted path"),
        (["--reward-funcs", "no.such.module"], "--reward-funcs no.such.module: cannot be imported"),
        (["--reward-funcs", "json.nothing"], "cannot be imported .*run where json can be found"),
        (["--reward-funcs", "json.__doc__"], "must be plain functions"),
    ],
)
def test_refuses(models, prompts, no_model, more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(models, prompts, *more))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_refuses_no_reference(models, prompts, no_model, capsys):
    with pytest.raises(SystemExit):
        main(["preflight", str(prompts), "--teacher", str(models / "teacher")])
    assert "no reference: name one with --reference, or the student with --student" in capsys.readouterr().err


def test_refuses_prompts(models, tmp_path, no_model, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?"}\n')
    with pytest.raises(SystemExit):
        main(command(models, tmp_path / "rows.jsonl", *FLAGS))
    assert "no column `prompt`, got ['question']" in capsys.readouterr().err


def test_refuses_without_matplotlib(models, prompts, no_model, capsys, monkeypatch):
    monkeypatch.setattr("trl_gopd.cli.preflight.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(command(models, prompts, "--figure", "out.png"))
    assert "--figure: needs matplotlib; run `pip install matplotlib`" in capsys.readouterr().err
