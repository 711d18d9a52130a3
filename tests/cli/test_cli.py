"""The command line: help, what it refuses, and a training run end to end."""

import json

import pytest

from trl_gopd.cli import COMMANDS, main


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in COMMANDS), ["demo", "distill", "-h"], ["demo", "merge", "-h"]],
)
def test_help(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 0 and "usage: trl-gopd" in capsys.readouterr().out


def test_version(capsys):
    from trl_gopd import __version__

    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


def test_no_command(capsys):
    assert main([]) == 2 and "usage" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["quantise"]) == 2
    assert (
        "there is no command 'quantise'; there are train, quantize, evaluate, preflight, demo"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "must be a whole number of at least 1, got '0'"),
        (["--lambdas", "much"], "must be a finite number of at least 0, got 'much'; try 1.25"),
        (["--lambdas", "nan"], "got 'nan'"),
        (["--estimators", "top"], "invalid choice: 'top'"),
        (["--json", "/nowhere/out.json"], "the folder /nowhere does not exist; make it or name another"),
    ],
)
@pytest.mark.parametrize("scene", ["distill", "merge"])
def test_demo_refuses(scene, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", scene, "--output-dir", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def train_arguments(models, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"prompt": f"What is {i}?"}) for i in range(8)]
    (data / "train.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "--model_name_or_path": models / "student",
        "--teacher_model_name_or_path": models / "teacher",
        "--dataset_name": data,
        "--output_dir": tmp_path / "out",
        "--max_steps": 1,
        "--max_completion_length": 8,
        "--per_device_train_batch_size": 2,
        "--report_to": "none",
        "--bf16": "false",
    }


def flat(arguments):
    return [str(part) for pair in arguments.items() for part in pair]


def test_train(models, tmp_path):
    arguments = train_arguments(models, tmp_path)
    assert main(["train", "--use_cpu", *flat(arguments)]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_train_with_several_teachers(models, tmp_path):
    arguments = train_arguments(models, tmp_path)
    arguments["--teacher_models"] = json.dumps({"one": str(arguments.pop("--teacher_model_name_or_path"))})
    arguments |= {"--gopd_lambda_by_teacher": '{"one": 1.5}', "--save_steps": 1}
    rows = [json.dumps({"prompt": f"What is {i}?", "teacher_id": "one"}) for i in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["train", "--use_cpu", *flat(arguments)]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "gopd_state.json").read_text())
    assert list(state["teachers"]) == ["one"]


@pytest.mark.parametrize(
    ("missing", "message"), [("--teacher_model_name_or_path", "no teacher"), ("--dataset_name", "no data")]
)
def test_train_refuses(models, tmp_path, missing, message):
    arguments = train_arguments(models, tmp_path)
    del arguments[missing]
    with pytest.raises(SystemExit, match=message):
        main(["train", "--use_cpu", *flat(arguments)])
    assert not (tmp_path / "out").exists()
