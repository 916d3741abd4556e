"""An instruction-tuning run: its data, evaluation and checkpoints. training/loop.py has the loop."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.checkpoint import open_checkpoint, save_checkpoint
from artifacts.weights import load_weights, read_weights
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import last_exchange, open_run_data
from dataset.text.conversation import Template
from dataset.text.counts import describe_counts, describe_files, warnings_about
from dataset.text.loader import ExampleStream, TextCorpus
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from evaluators.language import evaluate_sources, rows_evaluated
from generation.loading import make_responder
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch
from models.distributed import Ranks, joined_ranks
from training.console import say_places, show_evaluation
from training.estimate import dry_run_instruct
from training.loop import Run, RunResult, Trainer
from training.resume import find_resume_point, initial_weights_path, prepare_model
from training.text import TextTask

# Sample answers during training are cut off at this many tokens, to save time.
_SHOWN_ANSWER_TOKENS = 48


def run_instruct(config: PretrainInstructConfig) -> RunResult | None:
    """Train as `config` says; returns the last checkpoint and its loss, or None after a dry run.

    Raises UsageError for wrong input, before training starts, and StoppedBySignal.
    """
    with joined_ranks(config.device, config.dist_timeout_minutes) as ranks, find_resume_point(config, ranks) as resume_point:
        if ranks.size > config.global_batch_size:
            raise UsageError(
                f"{ranks.size} ranks share the {config.global_batch_size} rows of global_batch_size: start fewer, or raise it"
            )
        device = pick_device(config.device)
        arch = resolve_arch(config.arch, device)
        config = config.model_copy(update={"run_name": resume_point.folder.name})
        tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
        data = open_run_data(config, tokenizer, Template())
        # A batch may span several short stages, so only the longest stage must fill a batch.
        longest = max(stage.per_round for stage in data.curriculum.stages)
        if config.global_batch_size > longest:
            raise UsageError(
                f"global_batch_size {config.global_batch_size} is larger than the {longest} training rows of an epoch: lower it, "
                "or use more data (dataset.subset_size, dataset.test_ratio)"
            )
        if data.test is None and config.early_stopping.patience is not None:
            raise UsageError(
                f"early_stopping.patience={config.early_stopping.patience} watches the held-out loss, and dataset.test_ratio=0 "
                "holds nothing out: raise dataset.test_ratio, or set early_stopping.patience=null"
            )
        resolved = config.model_copy(update={"arch": arch})
        resume_point.check(resolved, {"data_hash": data.train.data_hash, "tokenizer_sha256": tokenizer.sha256}, ranks.say)
        model = RecursiveModel(arch, tokenizer.vocab_size, seed=config.seed)
        if config.load_checkpoint is not None and resume_point.saved is None:
            _load_initial_weights(model, initial_weights_path(Path(config.load_checkpoint), resolved, ranks), tokenizer)
        prepare_model(model, config, device, resume_point.folder, ranks)
        report = data.report()
        _say_data(config, report, ranks)
        if config.dry_run:
            dry_run_instruct(config, model, data, ranks)
            return None
        # Prefetching threads don't know which examples other ranks take.
        workers = config.dataloader_workers if ranks.size == 1 else 0
        with ExampleStream(data.train, data.curriculum, workers, start=resume_point.position) as stream:
            trainer = Trainer(config, model, TextTask(config, model, stream, data.curriculum, ranks), ranks)
            result = Run(
                trainer,
                resume_point,
                evaluate=lambda step: _evaluate(config, model, tokenizer, data.test, ranks, step),
                evaluation_rows=0 if data.test is None else rows_evaluated(data.test, config.eval_examples),
                save=functools.partial(
                    save_checkpoint,
                    config=config,
                    tokenizer=tokenizer,
                    template=Template(),
                    data_hash=data.train.data_hash,
                    data_report=report,
                ),
            ).train()
        say_places(result.checkpoint, ranks.say)
        return result


def _say_data(config: PretrainInstructConfig, report: Mapping[str, Any], ranks: Ranks) -> None:
    for name, source in config.all_sources.items():
        train, test = report["sources"][name]["train"], report["sources"][name].get("test")
        rows, test_rows = train["counts"]["kept"], test["counts"]["kept"] if test is not None else 0
        place = source.repo if source.source == "hub" else source.data_dir
        ranks.say(f"data {place}: {rows:,} training rows, {test_rows:,} test rows")
        ranks.say(f"  files: {describe_files(train['files'])}")
        if "left_out" in train:
            ranks.say(f"  not read: {describe_files(train['left_out'])}")
        for line in describe_counts(train["counts"]):
            ranks.say(f"  {line}")
        # Files of two splits may have the same names in a folder of save_to_disk.
        if test is not None and (source.has_own_validation or test["files"] != train["files"]):
            ranks.say(f"  held-out files: {describe_files(test['files'])}")
            for line in describe_counts(test["counts"]):
                ranks.say(f"    {line}")
        for warning in warnings_about(train["counts"]):
            ranks.say(f"WARNING: {warning}")
    if report["overlap"] is None:
        ranks.say("dataset.test_ratio is 0: training without evaluation")
    elif report["overlap"]["questions"]:
        asked, equal = report["overlap"]["questions"], report["overlap"]["conversations"]
        ranks.say(f"  {asked:,} test rows ask the question of a training row; {equal:,} equal a training row")


def _load_initial_weights(model: RecursiveModel, source: Path, tokenizer: Tokenizer) -> None:
    """Load the weights of `source`. Raises UsageError if they are for another tokenizer or model."""
    if (source / "checkpoint.json").is_file() and (own := open_checkpoint(source).tokenizer).sha256 != tokenizer.sha256:
        raise UsageError(f"load_checkpoint={source} was trained with another tokenizer: use its own ({source / own.file_name})")
    load_weights(model, read_weights(source), source)


def _evaluate(
    config: PretrainInstructConfig,
    model: RecursiveModel,
    tokenizer: Tokenizer,
    test_split: TextCorpus | None,
    ranks: Ranks,
    step: int,
) -> dict[str, Any] | None:
    if test_split is None:
        return None
    report = evaluate_sources(
        model,
        test_split,
        eos_id=tokenizer.eos_id,
        batch_size=config.global_batch_size,
        act_steps=config.depth,
        halt_threshold=config.generation.halt_threshold,
        limit=config.eval_examples,
        ranks=ranks,
        pad_multiple=config.pad_multiple,
    ).report()
    if not ranks.is_first:
        return report
    show_evaluation(step, report)
    if report["worse_act_steps"]:
        tqdm.write(f"  depth doesn't pay: the held-out loss rises at ACT steps {report['worse_act_steps']}")
    responder = make_responder(model, tokenizer, Template(), config)
    responder = responder.with_options(max_output_tokens=min(config.answer_limit, _SHOWN_ANSWER_TOKENS))
    shown = []
    for index in range(min(config.sample_answers, len(test_split))):
        exchange = last_exchange(test_split.conversation(index))
        # Raw text has no question. The history of a row that training truncated may be longer than
        # the context.
        if exchange is not None and responder.fits(exchange[0]):
            shown.append(exchange)
    answers = responder.answers([history for history, _ in shown])
    for (history, reference), answer in zip(shown, answers, strict=True):
        tqdm.write(f"  Q {history[-1].text[:200]!r}\n  A {answer.text[:200]!r} (reference {reference[:200]!r})")
    return report
