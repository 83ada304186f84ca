"""Evaluates a run: unbiased pass@k on held-out problems with bootstrap intervals, infilling with
the suffix shown against without, the indexer's recall.

    python -m launch.evaluate --workdir=runs/rl                                         the newest
    checkpoint of that run python -m launch.evaluate --workdir=runs/rl/eval
    --config=configs/quickstart.py:reinforce --config.init_from=runs/rl --config.evaluate.samples=64

Writes evaluation.json and samples.jsonl (every prompt, completion and reward) to the workdir.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np

from data.pipeline import infill_documents, draw_problems
from data.tasks.problem import Problem
from experiment.command_line import command
from experiment.schema import Config
from experiment.setup import Setup, run_variables, set_up, to_host
from launch.pretrain import validate
from launch.reinforce import encode_problems, sampler, texts
from model.sharding import batch_sharding, replicated
from report.summary import write_whole
from rl.evaluate import pass_at_k_table
from rl.rewards import total_reward
from train.infill import infill_rows, middle_losses, middle_nats
from train.objective import language_objective
from train.progress import Progress
from train.step import make_evaluation

ROWS = 256  # completions sampled at a time
# a file is cut into texts of about this many bytes for each token of a row: most fill a good part
# of one, few are too long
INFILL_BYTES_PER_TOKEN = 2


def run(config: Config, workdir: Path) -> dict:
    """Returns what evaluation.json holds."""
    begin = set_up(
        config, workdir, rows=config.data.batch_size // config.train.microbatches, trains=False
    )
    result, samples = {}, []
    with jax.set_mesh(begin.mesh):
        variables = run_variables(begin, workdir)
        if config.evaluate.problems:
            result, samples = reasoning(begin, variables)
        if config.evaluate.infill_documents:
            result |= infilling(begin, variables)
            if config.model.indexer.n_heads:
                result |= recall(begin, variables)
    if jax.process_index() == 0:
        write_whole(
            workdir / "samples.jsonl",
            "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples),
        )
        write_whole(workdir / "evaluation.json", json.dumps(result, indent=2) + "\n")
        for row in result.get("pass_at_k", []):
            print(f"pass@{row['k']:<4} {row['mean']:.3f}  ({row['low']:.3f} to {row['high']:.3f})")
        for name in [name for name in result if name.startswith(("middle_loss", "indexer"))]:
            print(f"{name:<34} {result[name]:.3f}")
        for source, losses in result.get("infilling", {}).items():
            for name in [name for name in losses if name.startswith("suffix_saves")]:
                print(
                    f"{name:<34} {losses[name]['mean']:.3f}  ({losses[name]['low']:.3f} to {losses[name]['high']:.3f})  {source.partition('?')[0]}"
                )
    return result


def reasoning(begin: Setup, variables: dict) -> tuple[dict, list[dict]]:
    """pass@k for k = 1, 2, 4, ... up to the samples drawn, over held-out problems."""
    e, task = begin.config.evaluate, begin.config.reinforce.task
    held_out = draw_problems(task, "validation", e.problems, seed=0)
    at_once = max(ROWS // e.samples, 1)
    at_once += -at_once % begin.mesh.size
    sample_fn = sampler(begin, e.samples)
    key = jax.random.fold_in(jax.random.key(begin.config.seed), 2)
    correct_PN, formatted, lengths, samples = [], [], [], []
    with Progress(len(held_out), "evaluate", unit="tokens") as progress:
        for first in range(0, len(held_out), at_once):
            chosen = held_out[first : first + at_once]
            padded = chosen + [chosen[-1]] * (at_once - len(chosen))  # one shape, one compilation
            completions, counts = complete(
                begin, sample_fn, variables, padded, jax.random.fold_in(key, first)
            )
            for problem, said in zip(
                chosen, np.array_split(np.asarray(completions, object), at_once), strict=False
            ):
                scored = [
                    total_reward(text, problem.answer, {"answer": 1.0, "format": 1.0})[1]
                    for text in said
                ]
                correct_PN.append([parts["answer"] for parts in scored])
                formatted += [parts["format"] for parts in scored]
                samples += [
                    {
                        "prompt": problem.question,
                        "completion": text,
                        "answer": problem.answer,
                        "reward": parts["answer"],
                        "format": parts["format"],
                    }
                    for text, parts in zip(said, scored, strict=True)
                ]
            lengths += counts
            progress.update(
                min(first + at_once, len(held_out)), {"pass@1": np.mean(correct_PN)}, sum(counts)
            )
    ks = [k for k in (2**i for i in range(20)) if k < e.samples] + [e.samples]
    table = pass_at_k_table(np.asarray(correct_PN), ks, e.bootstrap, seed=0)
    rows = [
        {"k": k, "mean": float(i.mean), "low": float(i.low), "high": float(i.high)}
        for k, i in table.items()
    ]
    return {
        "pass_at_k": rows,
        "problems": len(held_out),
        "samples": e.samples,
        "format": float(np.mean(formatted)),
        "completion_length": float(np.mean(lengths)),
    }, samples


def complete(
    begin: Setup, sample_fn, variables: dict, chosen: list[Problem], key
) -> tuple[list[str], list[int]]:
    """Completions as text, those of a problem side by side, and their lengths in tokens."""
    prompts = encode_problems(begin, chosen)
    sharding = batch_sharding(begin.mesh)
    completions = sample_fn(
        variables,
        jax.device_put(prompts.tokens_PT, sharding),
        jax.device_put(prompts.segments_PT, sharding),
        key,
    )
    tokens_BC, mask_BC = to_host(completions.tokens_BC), to_host(completions.mask_BC)
    return texts(begin, tokens_BC, mask_BC), mask_BC.sum(axis=1).tolist()


def infilling(begin: Setup, variables: dict) -> dict:
    """Of each source that FIM applies to, in "infilling", and the mean over sources."""
    config, tokenizer = begin.config, begin.tokenizer
    T, at_once, count = (
        config.data.seq_len,
        config.data.batch_size,
        config.evaluate.infill_documents,
    )
    count += -count % at_once
    sharding = batch_sharding(begin.mesh)
    # Every process has all the rows, and needs all the results.
    nats_fn = jax.jit(
        functools.partial(middle_nats, begin.model, config.train.stage, tokenizer.eos),
        out_shardings=replicated(begin.mesh),
    )
    found = {}
    for source, held_out in infill_documents(
        config.data, "validation", INFILL_BYTES_PER_TOKEN * T
    ).items():
        rows = infill_rows(
            (text for _, text in held_out), tokenizer, T, count, spm=config.data.infills_spm
        )
        found[source] = middle_losses(
            rows,
            lambda batch: nats_fn(variables, jax.device_put(batch, sharding)),
            at_once,
            config.evaluate.bootstrap,
        )
    names = [name for name in next(iter(found.values())) if name.startswith("middle_loss")]
    return {name: float(np.mean([losses[name] for losses in found.values()])) for name in names} | {
        "infilling": found
    }


def recall(begin: Setup, variables: dict) -> dict[str, float]:
    """On held-out text, with dense attention: how much of its mass falls on the keys the indexer
    would select, against a random selection of as many.
    """
    config = begin.config
    dense = dataclasses.replace(config.train, stage="warmup")
    evaluate_fn = jax.jit(make_evaluation(language_objective(begin.model, dense)))
    found = validate(begin, evaluate_fn, variables, chat=False)
    return {
        name: found[f"validation_{name}"]
        for name in ("indexer_recall", "indexer_recall_random", "indexer_kl")
    }


if __name__ == "__main__":
    command(run, config="recorded")
