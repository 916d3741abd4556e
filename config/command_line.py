"""What scripts with Hydra's command line share: arguments, errors in one message, the jobs of a sweep (-m).

Doesn't know what a job does.
"""

import datetime
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.compose import check_settings, explain_error, plain_overrides
from config.errors import StoppedBySignal, UsageError, message_of, one_clear_message, print_anything
from config.schema import Config, user_path

_REPOSITORY = Path(__file__).resolve().parents[1]
_HYDRA_HELP = "--hydra-help"
_FLAGS_WITH_VALUES = (
    "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--package", "-p", "--experimental-rerun",
)  # fmt: skip


def run_main(main: Callable[[], Any], kind: type[Config]) -> None:
    """Run a script's `main`, decorated by hydra.main, with the command line of this process, in `one_clear_message`.

    Prints the jobs of a sweep at its end; the exit status is 2 if one has failed.
    """
    with one_clear_message():
        arguments = sys.argv[1:]
        is_sweep = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in arguments)
        if any(len(word) > len("--h") and _HYDRA_HELP.startswith(word) and word != "--help" for word in arguments):
            arguments = [_HYDRA_HELP]  # Hydra fails here on overrides
        if not {"-sc", "--shell-completion"} & set(arguments):
            arguments = _with_overrides_plain(arguments, kind, is_sweep)
        sys.argv[1:] = arguments
        if is_sweep:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UsageError(
                    "ranks can't share a sweep (-m), because each would choose its own jobs: start torchrun once for each job"
                )
            # Jobs in other processes must be able to import this project.
            paths = [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        wants_all = os.environ.get("HYDRA_FULL_ERROR") == "1"
        # Hydra then raises errors instead of printing them with advice that doesn't apply.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        SweepFolder.of_this_process = None
        try:
            main()
        except Exception as error:
            if wants_all or isinstance(error, BrokenPipeError) or not _is_of_hydra(error):
                raise
            raise UsageError(explain_error(error)) from None
        if SweepFolder.of_this_process is not None:
            _show_jobs(SweepFolder.of_this_process)


def run_job(settings: DictConfig, kind: type[Config], train: Callable[[Config], float | None]) -> float | None:
    """Check the composed settings, and train with them; returns what `train` does, the held-out loss.

    In a sweep a job that fails is reported, and its loss counts as infinite: the other jobs run. A signal ends the sweep.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        with one_clear_message():
            return train(check_settings(settings, kind))
    print_anything()
    number, folder = int(hydra.job.num), Path(hydra.sweep.dir)
    job: dict[str, Any] = {"job": number, "overrides": list(hydra.overrides.task)}
    try:
        config = check_settings(settings, kind)
        if config.resume in (None, "auto"):
            # Jobs never share a folder: the name of the run, or of the sweep, with the number of the job.
            name = config.run_name or f"{config.arch.name}-{folder.name}"
            config = config.model_copy(update={"run_name": f"{name}-{number}"})
        job["run"] = str(Path(config.checkpoint_dir) / config.project_name / str(config.run_name))
        loss = train(config)
        if loss is None and not hydra.sweeper._target_.endswith("BasicSweeper"):
            raise UsageError("the run has measured no held-out loss to optimize: leave dry_run off, and dataset.test_ratio above 0")
        if loss is not None and not math.isfinite(loss):
            raise UsageError(f"the held-out loss is {loss}: lower lr, or set grad_clip")
        job["loss"] = loss
    except StoppedBySignal as stop:
        sys.exit(128 + stop.signal_number)
    except Exception as error:
        message = message_of(error)
        if message is None:
            traceback.print_exc()
        job["error"] = message or f"{type(error).__name__}: {error}"
    if "error" in job:
        print(f"error: job {number}: {job['error']}", file=sys.stderr)
    (folder / f"job_{number}.json").write_text(json.dumps(job) + "\n", encoding="utf-8")
    return math.inf if "error" in job else job["loss"]


class SweepFolder(Callback):
    """Remembers the folder of this process's sweep."""

    of_this_process: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra before the first job."""
        folder = Path(config.hydra.sweep.dir)
        for path in folder.glob("job_*.json"):
            path.unlink()  # of an earlier sweep in a folder that was named
        SweepFolder.of_this_process = folder


def _sweep_folder(checkpoint_dir: str, project_name: str) -> str:
    name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return str(user_path(checkpoint_dir) / project_name / "sweeps" / name)


# Cached: all jobs of a sweep share one folder, even if they differ in the keys that name it.
OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, use_cache=True, replace=True)


def _with_overrides_plain(arguments: list[str], kind: type[Config], is_sweep: bool) -> list[str]:
    """`arguments` with overrides rewritten by `plain_overrides`. Flags and their values stay."""
    plain: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in word and not word.startswith("-") and before not in _FLAGS_WITH_VALUES
        plain += plain_overrides([word], kind, is_sweep=is_sweep) if is_override else [word]
    return plain


def _is_of_hydra(error: Exception) -> bool:
    """Whether an error comes from the command line or the launcher, and not from within a job."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    return all(frame.f_code is not run_job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _show_jobs(folder: Path) -> None:
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("job_*.json")]
    jobs.sort(key=lambda job: job["job"])
    common = set[str].intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    names = [" ".join([f"job {job['job']}", *(text for text in job["overrides"] if text not in common)]) for job in jobs]
    failed = [name for name, job in zip(names, jobs, strict=True) if "error" in job]
    for name, job in zip(names, jobs, strict=True):
        became = "failed" if "error" in job else "no held-out loss" if job["loss"] is None else f"held-out loss {job['loss']:.4f}"
        print(f"{name}: {became}, {job.get('run', 'not begun')}")
    print(f"sweep {folder}: {len(jobs)} jobs, {len(failed)} failed")
    if failed:
        raise UsageError(f"{len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}")
