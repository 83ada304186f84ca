"""The runs that a person starts, each `(config, workdir) -> result`.

They are the loops of train/ and rl/, with the sections of the config that these need, in a working
directory of their own.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data.pipeline import holds_pairs
from data.shuffled_texts import infillable_sources
from errors import UserError
from experiment.branch import branch_of
from experiment.pass_rates import known_pass_rates
from experiment.run_record import record_start
from experiment.schema import Config
from experiment.setup import run_variables, sampler_setup, set_up, split_devices
from experiment.solving import print_solved, solve
from experiment.summary import phase_summary, write_summary
from experiment.workdir import command_of, open_workdir
from files import write_json, write_text
from rl.infill import infill_samples
from rl.loop import train_policy
from rl.rewards import get_rewards
from rl.servers.checks import check_fields
from train.evaluate import held_out_loss, held_out_preferences, indexer_recall, infilling
from train.loop import train_language_model
from train.preferences import Preference, get_preference
from train.reference import recorded_reference
from train.setup import Setup
from train.trackers import check_installed

# What an update of reinforcement learns from at once, in the words of fields.
UPDATE = "reinforce.prompts_per_step * group_size / minibatches"


def pretrain(config: Config, workdir: Path) -> bool:
    """Trains on text. Returns whether all steps are done, and not stopped before the last."""
    return _train_language_model(config, workdir, "pretrain", chat=False)


def finetune(config: Config, workdir: Path) -> bool:
    """Trains on conversations, or on pairs. Returns whether all steps are done."""
    check_finetune(config)
    return _train_language_model(config, workdir, "finetune", chat=True)


def _train_language_model(config: Config, workdir: Path, phase: str, *, chat: bool) -> bool:
    """Pretrains or fine-tunes in a workdir; returns whether it is finished."""
    microbatch_rows = config.train.microbatch_rows(config.data.batch_size, "data.batch_size")
    rows = {"data.batch_size / train.microbatches": microbatch_rows}
    with open_workdir(workdir, config, phase):
        setup = set_up(config, workdir, rows, trains=True)
        check_installed(config.train.sinks)
        record_start(workdir, setup.model)
        preference = preference_of(config) if phase == "finetune" else None
        finished = train_language_model(
            setup,
            config.train,
            config.data,
            workdir,
            phase=phase,
            chat=chat,
            init_from=config.init_from,
            seed=config.seed,
            branch=branch_of(config, phase, workdir),
            preference=preference,
        )
        summarise(config, workdir, phase)
        return finished


def reinforce(config: Config, workdir: Path) -> bool:
    """Trains on verifiable problems by rewards. Returns whether all steps are done."""
    check_reinforce(config)
    evaluated = [config.evaluate.reward] if config.train.eval_every else []
    get_rewards([*config.reinforce.rewards, *evaluated])
    rows = {
        "reinforce.prompts_per_step": config.reinforce.prompts_per_step,
        f"{UPDATE} / train.microbatches": config.train.microbatch_rows(update_rows(config), UPDATE),
    }
    learning, sampling = split_devices(config.reinforce)
    with open_workdir(workdir, config, "reinforce"):
        setup = set_up(config, workdir, rows, trains=True, devices=learning)
        check_installed(config.train.sinks)
        record_start(workdir, setup.model)
        finished = train_policy(
            setup,
            sampler_setup(setup, config.reinforce, sampling),
            config.train,
            config.sampling,
            config.reinforce,
            config.evaluate,
            workdir,
            template=config.data.chat_template,
            init_from=config.init_from,
            seed=config.seed,
            pass_rates=known_pass_rates(workdir, config.reinforce, config.evaluate),
        )
        summarise(config, workdir, "reinforce")
        return finished


def summarise(config: Config, workdir: Path, phase: str) -> None:
    """Writes summary.json of a training run, and prints its outcome and what reads it."""
    numbers = phase_summary(config, workdir, phase)
    write_summary(workdir, {phase: numbers})
    if jax.process_index() == 0 and numbers:
        outcome = "validation_lm", "validation_rewards/accuracies", "loss_last", "reward_last"
        shown = [f"{name} {numbers[name]:.4g}" for name in outcome if name in numbers][:1]
        steps = f"{numbers['steps']} of {config.train.steps} steps"
        print(f"{workdir}: {', '.join([steps, *shown])}")
        print(f"next: python -m launch.sample --workdir={shlex.quote(str(workdir))}", flush=True)


def check_reinforce(config: Config) -> None:
    """Raises UserError where sections, each right by itself, do not fit reinforcement together."""
    train, sampling = config.train, config.sampling
    if config.init_state != "parameters":
        raise UserError(
            f"init_state = {config.init_state!r}: launch.reinforce has an optimizer of its own; "
            "use 'parameters'"
        )
    if train.stage == "warmup":
        raise UserError(
            "train.stage = 'warmup': trains the indexer alone; reinforce with 'dense' or 'sparse'"
        )
    if (train.stage == "sparse") != (sampling.attention == "sparse"):
        raise UserError(
            f"sampling.attention = {sampling.attention!r}: must be {train.stage!r}, as train.stage "
            "is: the trainer's policy must be the sampler's"
        )
    if sampling.temperature == 0:
        raise UserError(
            "sampling.temperature = 0: all completions of a prompt would be the same and nothing "
            "could be learnt; use 1.0"
        )
    for name, whole in (("top_k", 0), ("top_p", 1.0)):
        if getattr(sampling, name) != whole and not config.reinforce.keep_sampling_mask:
            raise UserError(
                f"sampling.{name} = {getattr(sampling, name)}: without "
                "reinforce.keep_sampling_mask the loss compares whole distributions, and rollouts "
                f"are drawn from a part; set it to {whole}, or keep the mask"
            )
    if config.reinforce.packing and train.balance_weight:
        raise UserError(
            f"train.balance_weight = {train.balance_weight}: the balance loss takes a row for a "
            "sequence, and reinforce.packing puts several into one; set one of them to 0 or False"
        )
    by_rejection = sampling.drafts and sampling.draft_acceptance == "rejection"
    if config.reinforce.in_parts and by_rejection:
        raise UserError(
            "sampling.draft_acceptance = 'rejection': a completion cannot go on in another step "
            "after a rejected draft; use 'coupled', or neither reinforce.prompts_in_flight nor "
            "reinforce.rollout_tokens"
        )
    if sampling.server:
        check_fields(sampling, config.reinforce)
    train.microbatch_rows(update_rows(config), UPDATE)
    if train.eval_every and not config.evaluate.problems:
        raise UserError(
            f"train.eval_every = {train.eval_every}: evaluates held-out problems, and "
            "evaluate.problems = 0 leaves none; set one of them"
        )
    if train.eval_every and config.evaluate.split != "validation":
        raise UserError(
            f"evaluate.split = {config.evaluate.split!r}: train.eval_every = {train.eval_every} "
            "evaluates held-out problems; use 'validation', and launch.evaluate for the others"
        )


def check_finetune(config: Config) -> None:
    """Raises UserError where the loss of fine-tuning does not fit the rest of a config."""
    loss, pairs = config.finetune.loss, holds_pairs(config.data)
    if pairs and not config.finetune.learns_from_pairs:
        raise UserError(
            f"finetune.loss = {loss!r}: data.sources has pairs; learn from them by 'dpo', 'orpo' "
            "or 'simpo', or from one conversation of each, whose field alone is then named"
        )
    if not config.finetune.learns_from_pairs:
        return
    if not pairs:
        raise UserError(
            f"finetune.loss = {loss!r}: learns from pairs, and data.sources = "
            f"{config.data.sources} has none; name two fields, as jsonl:FILE#chosen,rejected does"
        )
    if config.train.stage == "warmup":
        raise UserError(
            f"finetune.loss = {loss!r}: train.stage = 'warmup' trains the indexer alone; use "
            "'dense' or 'sparse'"
        )
    if get_preference(loss).needs_reference and config.init_state != "parameters":
        raise UserError(
            f"init_state = {config.init_state!r}: finetune.loss = {loss!r} compares with the model "
            "that a run starts from, and of another's whole state that is not this run's; use "
            "'parameters'"
        )


def preference_of(config: Config) -> Preference | None:
    """Returns the loss over pairs of fine-tuning, or None where it has none.

    A line says so where it compares with a model that has learnt nothing.
    """
    if not config.finetune.learns_from_pairs:
        return None
    preference = get_preference(config.finetune.loss)
    if preference.needs_reference and not config.init_from and jax.process_index() == 0:
        print('reference   random parameters, which a run with init_from = "" starts from')
    return preference


def update_rows(config: Config) -> int:
    """Returns how many completions an update of reinforcement learns from."""
    reinforce = config.reinforce
    return reinforce.prompts_per_step * reinforce.group_size // reinforce.minibatches


def evaluate(config: Config, workdir: Path) -> dict:
    """Evaluates a run: held-out loss, pass@k of problems, infilling, and the indexer's recall.

    The problems are held out, or with evaluate.split = "train" those that reinforcement trains on.
    Writes evaluation.json, samples.jsonl with every prompt, completion and reward, problems.jsonl
    with a problem a line, and infills.jsonl with a few gaps that the model fills. A number of 0 in
    the section `evaluate` leaves that part out.

    Returns:
      What evaluation.json has.
    """
    get_rewards([config.evaluate.reward, *config.reinforce.rewards])
    trained_by = command_of(workdir) or command_of(config.init_from)
    # Reinforcement learns from no text: its section `data` says nothing of what it has seen.
    text_batches = 0 if trained_by == "reinforce" else config.evaluate.text_batches
    reads_text = text_batches or config.evaluate.infill_documents
    if text_batches and trained_by == "finetune":
        check_finetune(config)  # its sources may be others than those of the run
    rows = {"data.batch_size": config.data.batch_size} if reads_text else {}
    setup = set_up(config, workdir, rows, trains=False)
    result, infills = {}, []
    files: dict[str, Sequence[Mapping[str, Any]]] = {"samples.jsonl": [], "problems.jsonl": []}
    with jax.set_mesh(setup.mesh):
        variables = run_variables(setup, config.init_from, workdir)
        if text_batches and trained_by == "finetune" and config.finetune.learns_from_pairs:
            result |= held_out_pairs(config, setup, variables, workdir)
        elif text_batches:
            chat = trained_by == "finetune"
            result |= held_out_loss(
                setup, variables, config.train, config.data, text_batches, chat=chat
            )
        if config.evaluate.problems:
            solved = solve(config, setup, variables)
            has_own = (workdir / "checkpoints").exists()
            model = str(workdir) if has_own else config.init_from
            result |= solved.result | {"model": model}
            files |= solved.files
        if config.evaluate.infill_documents and can_infill(config, setup):
            result |= infilling(
                setup,
                variables,
                config.data,
                stage=config.train.stage,
                count=config.evaluate.infill_documents,
                resamples=config.evaluate.bootstrap,
            )
            infills = infill_samples(
                setup, variables, config.data, config.sampling, config.train.stage
            )
            if config.model.indexer.n_heads:
                result |= indexer_recall(setup, variables, config.train, config.data)
    if jax.process_index() == 0:
        print_evaluation(result)  # which are not lost where the disk is full or read-only
        for name, records in (*files.items(), ("infills.jsonl", infills)):
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(workdir / name, "".join(lines))
        write_json(workdir / "evaluation.json", result)
    return result


def held_out_pairs(
    config: Config, setup: Setup, variables: dict, workdir: Path
) -> dict[str, float]:
    """Returns the loss over held-out pairs and its metrics.

    Nothing, and a line, where the loss compares with a reference that the run does not keep.
    """
    preference = get_preference(config.finetune.loss)
    place = workdir if (workdir / "checkpoints").exists() else config.init_from
    reference = recorded_reference(setup, place) if preference.needs_reference else None
    if preference.needs_reference and reference is None:
        if jax.process_index() == 0:
            print(f"{'pairs':<12}left out: {place} keeps no reference to compare with", flush=True)
        return {}
    count = config.evaluate.text_batches
    given = setup, variables, reference, preference, config.train, config.data, count
    return held_out_preferences(*given)


def can_infill(config: Config, setup: Setup) -> bool:
    """Returns whether there is text to infill and a way to write it; says so where there is not."""
    missing = ""
    if not setup.tokenizer.has_fim:
        missing = "the tokenizer has no sentinels for it"
    elif not infillable_sources(config.data):
        missing = "data.sources has no text that data.fim_sources names"
    if missing and jax.process_index() == 0:
        print(f"{'infilling':<12}left out: {missing}", flush=True)
    return not missing


def print_evaluation(result: dict) -> None:
    """Prints the figures of evaluation.json, a line each, with their 95 % intervals."""
    unit = "" if "held_out_preference_loss" in result else "  nats a token"
    for name, value in result.items():
        if name.startswith("held_out"):
            print(f"{name:<34} {value:.3f}{unit}")
    if "problems" in result:
        print_solved(result)
    for name, value in result.items():
        if name.startswith(("middle_loss", "indexer")) or name.endswith("_reward"):
            print(f"{name:<34} {value:.3f}")
    for source, losses in result.get("infilling", {}).items():
        for name, saved in losses.items():
            if name.startswith("suffix_saves"):
                interval = f"{saved['low']:.3f} to {saved['high']:.3f}"
                print(f"{name:<34} {saved['mean']:.3f}  ({interval})  {source.partition('?')[0]}")
