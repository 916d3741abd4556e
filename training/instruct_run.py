"""One instruction-tuning run from a checked config: its data, how the model is measured, answers to look at, what is kept.

What runs share is in training/run.py. Knows no Hydra.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.checkpoint import Snapshot, load_weights, open_checkpoint, read_weights, save_checkpoint
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import last_exchange, open_run_data, source_configs
from dataset.text.conversation import Template
from dataset.text.counts import describe_counts, describe_files, warnings_about
from dataset.text.loader import ExampleStream, TextCorpus
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from evaluators.language import evaluate_sources, rows_evaluated
from generation.loading import make_responder
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch
from models.distributed import Ranks, joined_ranks
from training.estimate import dry_run_instruct
from training.resume import find_resume_point, weights_to_begin_with
from training.run import Run, RunResult, make_ready
from training.text import TextTask

# Answers shown during training are for the eye; longer ones only cost time.
_SHOWN_ANSWER_TOKENS = 48


def run_instruct(config: PretrainInstructConfig) -> RunResult | None:
    """Train, from scratch or from where `config.resume` finds the run; returns the last checkpoint and its held-out loss.

    A dry run (`config.dry_run`) trains nothing and returns None.

    Raises UsageError for anything wrong with the input, before training starts, and StoppedBySignal when a signal has ended it.
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
        # Slots flow over the ends of short stages: the longest decides whether there is enough.
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
        decided = config.model_copy(update={"arch": arch})
        resume_point.check(decided, {"data_hash": data.train.data_hash, "tokenizer_sha256": tokenizer.sha256}, ranks.say)
        model = RecursiveModel(arch, tokenizer.vocab_size, seed=config.seed)
        if config.load_checkpoint is not None and resume_point.saved is None:
            _begin_with(model, weights_to_begin_with(Path(config.load_checkpoint), decided, ranks), tokenizer)
        make_ready(model, config, device, resume_point, ranks)
        report = data.report()
        _say_data(config, report, ranks)
        if config.dry_run:
            dry_run_instruct(config, model, data, ranks)
            return None
        # Threads that read ahead can't know which examples other ranks take.
        workers = config.dataloader_workers if ranks.size == 1 else 0
        with ExampleStream(data.train, data.curriculum, workers, start=resume_point.position) as stream:
            task = TextTask(config, model, stream, data.curriculum, ranks)
            job = _InstructJob(config, model, task, tokenizer, data.train.data_hash, report, data.test)
            result = Run(config, job, resume_point, ranks).train()
        ranks.say(f"checkpoint {result.checkpoint}")
        return result


def _say_data(config: PretrainInstructConfig, report: Mapping[str, Any], ranks: Ranks) -> None:
    """What the run reads, and what of it a user should know before it goes on."""
    for name, source in source_configs(config).items():
        train, test = report["sources"][name]["train"], report["sources"][name].get("test")
        rows, test_rows = train["counts"]["kept"], test["counts"]["kept"] if test is not None else 0
        place = source.repo if source.source == "hub" else source.data_dir
        ranks.say(f"data {place}: {rows:,} training rows, {test_rows:,} test rows")
        ranks.say(f"  files: {describe_files(train['files'])}")
        if "left_out" in train:
            ranks.say(f"  not read, being named as held out: {describe_files(train['left_out'])}")
        for line in describe_counts(train["counts"]):
            ranks.say(f"  {line}")
        # In a folder of save_to_disk, files of two splits have the same names.
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
        ranks.say(f"  of the test rows, {asked:,} ask what training rows ask; {equal:,} equal one as a whole")


def _begin_with(model: RecursiveModel, source: Path, tokenizer: Tokenizer) -> None:
    """Fill `model` with the weights of `source`. Raises UsageError if they don't fit, or were trained with another tokenizer."""
    if (source / "checkpoint.json").is_file() and (own := open_checkpoint(source).tokenizer).sha256 != tokenizer.sha256:
        raise UsageError(f"load_checkpoint={source} was trained with another tokenizer: use its own ({source / own.file_name})")
    load_weights(model, read_weights(source), source)


@dataclass
class _InstructJob:
    """Instruction tuning, as training/run.py needs to know it."""

    config: PretrainInstructConfig
    model: RecursiveModel
    task: TextTask
    tokenizer: Tokenizer
    data_hash: str
    data_report: Mapping[str, Any]
    test_split: TextCorpus | None

    @property
    def evaluation_rows(self) -> int:
        """Test rows of all sources within `eval_examples`."""
        return 0 if self.test_split is None else rows_evaluated(self.test_split, self.config.eval_examples)

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """Teacher-forced measures of the test split, of which each rank takes a share, and a few answers to look at."""
        config = self.config
        if self.test_split is None:
            return None
        ranks = self.task.ranks
        report = evaluate_sources(
            self.model,
            self.test_split,
            eos_id=self.tokenizer.eos_id,
            batch_size=config.global_batch_size,
            act_steps=config.depth,
            halt_threshold=config.generation.halt_threshold,
            limit=config.eval_examples,
            ranks=ranks,
            pad_multiple=config.pad_multiple,
        ).report()
        if not ranks.is_first:
            return report
        numbers = {name: value for name, value in report.items() if isinstance(value, float)}
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        if report["worse_act_steps"]:
            tqdm.write(f"  depth doesn't pay: the held-out loss rises at ACT steps {report['worse_act_steps']}")
        self._show_answers(self.test_split)
        return report

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """The checkpoint, with tokenizer and template."""
        save_checkpoint(
            folder,
            snapshot,
            config=self.config,
            tokenizer=self.tokenizer,
            template=Template(),
            data_hash=self.data_hash,
            data_report=self.data_report,
        )

    def _show_answers(self, split: TextCorpus) -> None:
        config = self.config
        responder = make_responder(self.model, self.tokenizer, Template(), config)
        responder = responder.with_options(max_output_tokens=min(config.answer_limit, _SHOWN_ANSWER_TOKENS))
        shown = []
        for index in range(min(config.sample_answers, len(split))):
            exchange = last_exchange(split.conversation(index))
            # Raw text asks nothing, and a row that training cut short may have a history longer than the context.
            if exchange is not None and responder.fits(exchange[0]):
                shown.append(exchange)
        answers = responder.answers([history for history, _ in shown])
        for (history, reference), answer in zip(shown, answers, strict=True):
            tqdm.write(f"  Q {history[-1].text[:200]!r}\n  A {answer.text[:200]!r} (reference {reference[:200]!r})")
