"""`trl-gopd train`: distillation from the command line, with the same arguments as TRL's own scripts."""

from typing import Any


def build_parser() -> Any:
    """
    Returns a [`~trl.TrlParser`] for the arguments of script, trainer, model and data mixture. `--config FILE` reads
    them from a YAML file.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_gopd import GOPDConfig

    return TrlParser((ScriptArguments, GOPDConfig, ModelConfig, DatasetMixtureConfig), prog="trl-gopd train")


def main(arguments: list[str]) -> int:
    """Trains the student, saves it, and pushes it to the Hub if `--push_to_hub` is set."""
    script_args, training_args, model_args, dataset_args = build_parser().parse_args_and_config(arguments)
    if training_args.teacher_model_name_or_path is None and not training_args.teacher_models:
        raise SystemExit(
            "trl-gopd train: no teacher. Name one with --teacher_model_name_or_path, or several with --teacher_models."
        )
    if not dataset_args.datasets and not script_args.dataset_name:
        raise SystemExit("trl-gopd train: no data. Name a data set with --dataset_name, or `datasets:` in --config.")

    from datasets import load_dataset
    from trl import get_dataset, get_peft_config, get_quantization_config

    from trl_gopd import GOPDTrainer

    # These options apply to the student. Teacher and reference keep the dtype of their checkpoints and are not
    # quantized along with the student.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    evaluates = training_args.eval_strategy != "no"
    trainer: Any = GOPDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0
