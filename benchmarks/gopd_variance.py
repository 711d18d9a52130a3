"""
How noisy the gradient of each estimator of G-OPD is on SmolLM2-135M-Instruct, at fixed states.

    python -m benchmarks.gopd_variance --json variance.json

The three models are the same weights that read different things. The student reads a problem and the order to solve
it step by step, the teacher also the worked solution (privileged context), the reference the problem alone. States are
those along completions that the student samples; at each of them the token is then drawn anew.

The measure is the trace of the covariance, over the sampled token, of the gradient with respect to a final hidden
state, divided by the squared norm of its mean; both are summed over the states before. It is given twice: enumerated,
the expectation over all 49,152 tokens in float64, and redrawn, from gradients of the functions in
`trl_gopd.gopd.objective` at tokens drawn. Standard errors are those of the jackknife over completions.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gopd_step import environment
from trl_gopd.gopd.divergence import extrapolated_divergence
from trl_gopd.gopd.objective import token_advantages
from trl_gopd.gopd.stratified import log_probs_at, stratified_divergence


LAMBDAS = (1.0, 1.25)
# How many ids count exactly. With all of them, `full`, there is no variance.
ESTIMATORS = {"sampled": 0, "stratified 1": 1, "stratified 4": 4, "stratified 16": 16, "stratified 64": 64}
# What the rest of the estimator is measured from: ours, nothing, and the mean advantage of the ids in S.
BASELINES = ("rest", "none", "mean over S")
SEED = 0
STEP_BY_STEP = "Solve the problem step by step."
HINT = "{problem}\n\nThe solution is: {solution}\n\nExplain it in your own words."
PROBLEMS = (
    ("Tom has 3 boxes of 8 pens and gives away 5 pens. How many pens are left?", "3 * 8 = 24, and 24 - 5 = 19."),
    ("A train leaves at 9:40 and arrives at 11:15. How long is the trip?", "20 + 60 + 15 = 95 minutes."),
    ("A shirt of 40 dollars is sold at 25% off. What does it cost?", "A quarter of 40 is 10, and 40 - 10 = 30."),
    ("What is the area of a garden 12 m long and 7 m wide?", "12 * 7 = 84 square metres."),
    ("Ann is twice as old as Ben, and together they are 36. How old is Ben?", "3 * Ben = 36, so Ben is 12."),
    ("A car uses 6 litres of fuel for 100 km. How much does it need for 250 km?", "2.5 * 6 = 15 litres."),
    ("How many legs do 4 spiders and 3 ants have together?", "4 * 8 = 32 and 3 * 6 = 18, so 50."),
    ("The mean of 4, 9 and a third number is 8. What is the third number?", "3 * 8 = 24, and 24 - 4 - 9 = 11."),
)


@dataclass(frozen=True)
class Setting:
    """
    Args:
        completion_length (`int`): States of every completion.
        redraws (`int`): Tokens drawn at each state.
        threads (`int`): Threads of torch.
    """

    completion_length: int = 32
    redraws: int = 16
    threads: int = 1


@dataclass(frozen=True)
class States:
    """
    Args:
        hidden (`torch.Tensor` of shape `(N, D)`): Final hidden states of the student, float32.
        head (`torch.Tensor` of shape `(V, D)`): Output head of the student.
        teacher (`torch.Tensor` of shape `(N, V)`): Logits of the teacher.
        reference (`torch.Tensor` of shape `(N, V)`): Logits of the reference.
        completions (`torch.Tensor` of shape `(N,)`): Which completion a state belongs to, from 0 on.
    """

    hidden: Tensor
    head: Tensor
    teacher: Tensor
    reference: Tensor
    completions: Tensor

    def per_completion(self, values: Tensor) -> list[float]:
        """Sums of `values` `(N,)` over the states of each completion."""
        sums = values.new_zeros(int(self.completions.max()) + 1)
        return sums.index_add(0, self.completions, values).tolist()


# What is measured


@torch.no_grad()
def build_states(setting: Setting) -> States:
    """Samples one completion a problem and has the three models read it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_gopd.demo.smollm2 import smollm2_path

    path = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")

    def prompts(texts: list[str], system: str | None = None):
        system_turn = [] if system is None else [{"role": "system", "content": system}]
        return tokenizer.apply_chat_template(
            [[*system_turn, {"role": "user", "content": text}] for text in texts],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )

    problems = [problem for problem, _ in PROBLEMS]
    own = prompts(problems, STEP_BY_STEP)
    torch.manual_seed(SEED)
    length = setting.completion_length
    completion = model.generate(
        **own, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=length, max_new_tokens=length
    )[:, -length:]

    def hidden(prompt) -> Tensor:
        states = model.model(
            input_ids=torch.cat([prompt["input_ids"], completion], 1),
            attention_mask=torch.cat([prompt["attention_mask"], torch.ones_like(completion)], 1),
        ).last_hidden_state
        return states[:, -length - 1 : -1].flatten(0, 1)

    hinted = prompts([HINT.format(problem=p, solution=s) for p, s in PROBLEMS], STEP_BY_STEP)
    head = model.lm_head.weight.detach()
    return States(
        hidden(own),
        head,
        *(hidden(prompt) @ head.t() for prompt in (hinted, prompts(problems))),
        completions=torch.arange(len(PROBLEMS)).repeat_interleave(length),
    )


# How it is measured


def gradient(estimator: str, states: States, rows: Tensor, labels: Tensor, gopd_lambda: float) -> Tensor:
    """Gradient `(n, D)` of the loss at the states `rows` for the sampled `labels`, by the code that trains."""
    hidden = states.hidden[rows].requires_grad_()
    targets = (states.teacher[rows], states.reference[rows])
    common = {"labels": labels, "gopd_lambda": gopd_lambda}

    def target_logps(chunk: slice, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(log_probs_at(logits[chunk], ids) for logits in targets)

    if estimator == "sampled":
        label = labels.unsqueeze(1)
        logps = log_probs_at(hidden @ states.head.t(), label)
        teacher, reference = target_logps(slice(None), label)
        advantages = token_advantages(
            student_logps=logps,
            teacher_logps=teacher,
            reference_logps=reference,
            mask=torch.ones_like(logps),
            gopd_lambda=gopd_lambda,
        )
        loss = -(advantages * logps).sum()
    elif estimator == "full":
        output = extrapolated_divergence(
            hidden, states.head, None, target_logits=lambda chunk: tuple(z[chunk] for z in targets), **common
        )
        loss = output.divergence.sum()
    else:
        output = stratified_divergence(
            hidden, states.head, None, target_logps=target_logps, top_k=ESTIMATORS[estimator], **common
        )
        loss = output.divergence.sum()
    return torch.autograd.grad(loss, hidden)[0]


@torch.no_grad()
def enumerated(states: States, gopd_lambda: float, chunk_size: int = 32) -> dict[str, Tensor]:
    """
    Trace of the covariance `(N,)` by estimator and baseline, and the squared norm of the mean under `"full"`.

    With w_v the rows of the head and w̄ = Σ π_v w_v, a token y outside S moves the gradient by −(A_y − b)(w_y − w̄), any
    other by 0. Sums over the ids outside S that come without a square are the total less the sum over S.
    """
    parts: dict[str, list[Tensor]] = {}
    head = states.head.double()
    for start in range(0, len(states.hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        log_s, log_t, log_r = (
            logits.double().log_softmax(-1)
            for logits in (states.hidden[rows] @ states.head.t(), states.teacher[rows], states.reference[rows])
        )
        probs = log_s.exp()
        advantages = log_t - log_s + (gopd_lambda - 1) * (log_t - log_r)
        center = probs @ head
        distances = head.square().sum(-1) - 2 * center @ head.t() + center.square().sum(-1, keepdim=True)
        weighted = probs * advantages
        mean = weighted @ head - weighted.sum(-1, keepdim=True) * center
        parts.setdefault("full", []).append(mean.square().sum(-1))
        for estimator, k in ESTIMATORS.items():
            ids = log_s.topk(k).indices
            outside = probs.scatter(-1, ids, 0.0)
            share, inside = probs.gather(-1, ids), advantages.gather(-1, ids)
            rest = [1 - logps.gather(-1, ids).exp().sum(-1, keepdim=True) for logps in (log_s, log_t, log_r)]
            baselines = {
                "rest": (rest[1] / rest[0]).log() + (gopd_lambda - 1) * (rest[1] / rest[2]).log(),
                "none": torch.zeros_like(rest[0]),
                "mean over S": (share * inside).sum(-1, keepdim=True) / share.sum(-1, keepdim=True),
            }
            parts.setdefault(f"{estimator}, coverage", []).append(share.sum(-1))
            for baseline in BASELINES if k else ("none",):  # without S there is nothing to take another b from
                b = baselines[baseline]
                square = (outside * (advantages - b).square() * distances).sum(-1)
                exact = torch.einsum("nk,nkd->nd", share * (inside - b), head[ids] - center.unsqueeze(1))
                parts.setdefault(f"{estimator}, {baseline}", []).append(square - (mean - exact).square().sum(-1))
    return {name: torch.cat(values) for name, values in parts.items()}


def redrawn(states: States, redraws: Tensor, estimator: str, gopd_lambda: float, chunk_size: int = 256) -> Tensor:
    """
    Mean squared distance `(N,)` of the gradients at the tokens `redraws` `(N, R)` to the exact one.

    Equal tokens at a state are computed once, and all of those in S are equal.
    """
    every = torch.arange(len(redraws))
    likeliest = (states.hidden @ states.head.t()).topk(max(ESTIMATORS[estimator], 1)).indices
    labels = redraws
    if estimator != "sampled":
        inside = (redraws.unsqueeze(-1) == likeliest.unsqueeze(1)).any(-1)
        labels = torch.where(inside, likeliest[:, :1], redraws)
    pairs = torch.stack([every.unsqueeze(1).expand_as(labels), labels], -1).flatten(0, 1)
    pairs, counts = pairs.unique(dim=0, return_counts=True)
    mean = gradient("full", states, every, likeliest[:, 0], gopd_lambda)
    errors = torch.zeros(len(redraws), dtype=torch.float64)
    for chunk, count in zip(pairs.split(chunk_size), counts.split(chunk_size), strict=True):
        rows, label = chunk.unbind(-1)
        error = gradient(estimator, states, rows, label, gopd_lambda) - mean[rows]
        errors.index_add_(0, rows, error.double().square().sum(-1) * count / redraws.size(1))
    return errors


def measure(states: States, setting: Setting) -> dict[str, dict]:
    """
    For every λ and estimator the sums over the states of each completion of the trace of the covariance, enumerated by
    baseline and redrawn, and the mean `coverage`; under `"full"` the squared norm of the exact gradient, `signal`.
    """
    generator = torch.Generator().manual_seed(SEED)
    probs = (states.hidden @ states.head.t()).softmax(-1)
    redraws = torch.multinomial(probs, setting.redraws, replacement=True, generator=generator)
    results = {}
    for gopd_lambda in LAMBDAS:
        exact = enumerated(states, gopd_lambda)
        rows = {"full": {"signal": states.per_completion(exact.pop("full"))}}
        for name, values in exact.items():
            estimator, part = name.split(", ")
            rows.setdefault(estimator, {})[part] = (
                float(values.mean()) if part == "coverage" else states.per_completion(values)
            )
        for estimator in ESTIMATORS:
            rows[estimator]["redrawn"] = states.per_completion(redrawn(states, redraws, estimator, gopd_lambda))
            print(f"lambda {gopd_lambda:g}, {estimator}", file=sys.stderr)
        results[f"{gopd_lambda:g}"] = rows
    return results


# What it comes to


def summarize(results: dict[str, dict]) -> dict[str, dict]:
    """For every λ and estimator the traces as ratios to the signal, and the coverage."""
    summary = {}
    for gopd_lambda, rows in results.items():
        signal = rows["full"]["signal"]
        summary[gopd_lambda] = {
            estimator: {
                part: values if part == "coverage" else ratio(values, signal)
                for part, values in rows[estimator].items()
            }
            for estimator in ESTIMATORS
        }
    return summary


def ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Ratio of two sums over completions, and its standard error by the jackknife."""
    total, base, count = sum(numerators), sum(denominators), len(numerators)
    without = [(total - n) / (base - d) for n, d in zip(numerators, denominators, strict=True)]
    center = sum(without) / count
    error = ((count - 1) / count * sum((value - center) ** 2 for value in without)) ** 0.5
    return {"value": total / base, "standard_error": error}


def table(rows: dict[str, dict]) -> str:
    """Markdown, for one λ."""
    columns = ["estimator", "π(S)", "variance", "redrawn", "with b = 0", "with b = mean over S"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def cell(value: dict[str, float] | None) -> str:
        return "" if value is None else "{value:.3f} ± {standard_error:.3f}".format(**value)

    for estimator, row in rows.items():
        names = ("rest", "redrawn", "none", "mean over S") if "rest" in row else ("none", "redrawn", "", "")
        lines.append(f"| {estimator} | {row['coverage']:.3f} | {' | '.join(cell(row.get(name)) for name in names)} |")
    return "\n".join([*lines, "| full | 1.000 | 0 |  |  |  |"])


def parse_args(argv: list[str] | None = None) -> tuple[Setting, Path | None]:
    """What is measured, and where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name, value in asdict(Setting()).items():
        help_text = f"{name.replace('_', ' ')} (default: {value})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=help_text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all sums go")
    args = vars(parser.parse_args(argv))
    file = args.pop("json")
    for name, value in args.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return Setting(**args), file


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    setting, file = parse_args(argv)
    torch.set_num_threads(setting.threads)
    report = environment(argv) | {
        "command": shlex.join(["python", "-m", "benchmarks.gopd_variance", *argv]),
        "setting": asdict(setting),
    }
    report["results"] = measure(build_states(setting), setting)
    report["summary"] = summarize(report["results"])
    print(setting)
    for gopd_lambda, rows in report["summary"].items():
        print(f"\nλ = {gopd_lambda}\n\n{table(rows)}")
    print("\nTrace of the covariance over squared norm of the mean, ± standard error.")
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
