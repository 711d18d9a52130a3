"""
How many tokens a second whole models decode on a CPU, packed and dense, greedily and one sequence at a time.

    python -m benchmarks.d2quant_speed --models-json FILE    # after the layers; see there

- `smollm2`: SmolLM2-135M-Instruct, rounded to the nearest code of groups of 64 columns. How good the codes are does
  not change how fast it is.
- `llama-1b`: random words in the shape of Llama-3.2-1B (hidden size 2048, 16 layers, 128,256 tokens).

Embeddings, norms and the output head are dense and shared by the contestants of one dtype. A time is that of
`generate` with `NEW` tokens after a prompt of `PROMPT`, which is included. Contestants take turns.

What rounding inputs to eight bits costs is the perplexity of SmolLM2 with and without it.
"""

import copy
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gopd_step import SEED, _spread
from trl_gopd.d2quant.convert import replace_module
from trl_gopd.d2quant.grids import QuantizedWeight
from trl_gopd.d2quant.kernels import set_activation_bits
from trl_gopd.d2quant.linear import D2QuantLinear


GROUP_SIZE = 64
PROMPT, NEW = 32, 64
MARKS = "<!-- models: begin -->\n", "<!-- models: end -->\n"
BASELINE = "dense bfloat16"
WINDOWS, WINDOW = 12, 512
# Widths, dtypes and rounds of each.
MODELS = {"smollm2": ((2, 3, 4), (torch.float32, torch.bfloat16), 5), "llama-1b": ((2, 3, 4), (torch.bfloat16,), 3)}


def smollm2() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from trl_gopd.demo.smollm2 import smollm2_path

    return AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)


def llama_1b() -> PreTrainedModel:
    """Random numbers, in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(SEED)
    numbers = torch.randn(2**20, generator=generator).mul_(0.02).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            flat = parameter.data.view(-1)
            flat.copy_(numbers.repeat(-(-len(flat) // len(numbers)))[: len(flat)])
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def packed_layer(inputs: int, outputs: int, bits: int, generator: torch.Generator) -> D2QuantLinear:
    """A layer of random words and scales."""
    layer = D2QuantLinear(inputs, outputs, bits=bits, group_size=GROUP_SIZE)
    assert layer.weight_zero_point is not None
    for words in (layer.weight, layer.weight_zero_point):
        words.data.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.weight_scale.data.uniform_(0.001, 0.01, generator=generator)
    return layer


def rounded(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    """Codes between the smallest and the largest number of each group."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP_SIZE, GROUP_SIZE)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=2.0**-20)
    zero_points = (-low / scales).round()
    codes = ((groups / scales).round() + zero_points).clamp(0, 2**bits - 1)
    return QuantizedWeight(
        codes=codes.view(rows, columns).to(torch.uint8),
        scales=scales[None, ..., 0],
        zero_points=zero_points[..., 0].to(torch.uint8),
        bits=bits,
        group_size=GROUP_SIZE,
        grid="affine",
    )


def packed(model: PreTrainedModel, bits: int, *, is_random: bool = False) -> PreTrainedModel:
    """A copy of the model with packed linears in its blocks, rounded or random, which shares all else."""
    generator = torch.Generator().manual_seed(SEED)
    linears = {name: each for name, each in model.model.layers.named_modules() if isinstance(each, nn.Linear)}
    shared = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, shared)
    for name, linear in linears.items():
        if is_random:
            layer = packed_layer(linear.in_features, linear.out_features, bits, generator)
        else:
            layer = D2QuantLinear.from_quantized(rounded(linear.weight.data, bits), dtype=linear.weight.dtype)
        replace_module(result.model.layers, name, layer)
    return result


def decoder(model: PreTrainedModel, *, is_rounded: bool = False) -> Callable[[], None]:
    """A function that generates `NEW` tokens."""
    prompt = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(SEED))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        set_activation_bits(8 if is_rounded else None)
        try:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        finally:
            set_activation_bits(None)

    return generate


def contestants_of(name: str) -> dict[str, Callable[[], None]]:
    widths, dtypes, _ = MODELS[name]
    original = smollm2() if name == "smollm2" else llama_1b()
    contestants = {}
    for dtype in dtypes:
        dense = copy.deepcopy(original).to(dtype) if len(dtypes) > 1 else original
        kind = str(dtype).removeprefix("torch.")
        contestants[f"dense {kind}"] = decoder(dense)
        for bits in widths:
            model = packed(dense, bits, is_random=name != "smollm2")
            contestants[f"{bits} bits, {kind}"] = decoder(model)
            if dtype == torch.bfloat16:
                contestants[f"{bits} bits, rounded"] = decoder(model, is_rounded=True)
    return contestants


@torch.no_grad()
def measure(name: str, threads: list[int]) -> list[dict]:
    """Tokens a second of each contestant in each round."""
    contestants, (_, _, repeats) = contestants_of(name), MODELS[name]
    results = []
    for count in threads:
        torch.set_num_threads(count)
        rates: dict[str, list[float]] = {each: [] for each in contestants}
        for turn in range(repeats + 1):
            for each in list(contestants) if turn % 2 else reversed(list(contestants)):
                start = time.perf_counter()
                contestants[each]()
                if turn:  # the first round warms up
                    rates[each].append(NEW / (time.perf_counter() - start))
        for each, values in rates.items():
            ratios = [ours / theirs for ours, theirs in zip(values, rates[BASELINE], strict=True)]
            facts = {"model": name, "threads": count, "contestant": each, "tokens_a_second": values}
            results.append(facts | {"summary": _spread(values), "times": _spread(ratios)})
        print(f"{name}, {count} threads", file=sys.stderr)
    return results


def perplexities(text: Path | None) -> list[dict]:
    """Of SmolLM2 as it is and packed, with inputs as they are and rounded."""
    from benchmarks.d2quant_accuracy import windows
    from trl_gopd.evaluation.quality import perplexity

    tokens, original = windows(text, "evaluation")[:WINDOWS], smollm2()
    rows = [{"bits": None, "perplexity": perplexity(original, tokens).value}]
    for bits in (3, 4, 8):
        model = packed(original, bits)
        row = {"bits": bits}
        for name, width in (("perplexity", None), ("perplexity_rounded", 8)):
            set_activation_bits(width)
            try:
                row[name] = perplexity(model, tokens).value
            finally:
                set_activation_bits(None)
        rows.append(row)
    return rows


def measure_all(names: list[str], threads: list[int], text: Path | None) -> dict:
    results = []
    for name in names:
        results += measure(name, threads)
        gc.collect()
    setting = {"prompt": PROMPT, "new": NEW, "group_size": GROUP_SIZE, "windows": WINDOWS, "window": WINDOW}
    return {"setting": setting, "results": results, "perplexities": perplexities(text) if "smollm2" in names else []}


def section(report: dict) -> str:
    """What stands between the marks of a page."""
    keys = list(dict.fromkeys((each["model"], each["threads"]) for each in report["results"]))
    heads = [f"{model}, {threads} thread{'s' * (threads > 1)}" for model, threads in keys]
    lines = [f"| tokens a second | {' | '.join(heads)} |", "|---" * (1 + len(keys)) + "|"]
    for name in dict.fromkeys(each["contestant"] for each in report["results"]):
        of = {(row["model"], row["threads"]): row for row in report["results"] if row["contestant"] == name}
        cells = [f"{of[k]['summary']['median']:.1f} ({of[k]['times']['median']:.2f})" if k in of else "" for k in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if report["perplexities"]:
        lines += ["", "| bits | perplexity | with rounded inputs |", "|---|---|---|"]
        for row in report["perplexities"]:
            other = f"{row['perplexity_rounded']:.2f}" if "perplexity_rounded" in row else ""
            lines.append(f"| {row['bits'] or 'full precision'} | {row['perplexity']:.2f} | {other} |")
    return "\n" + "\n".join(lines) + "\n\n"
