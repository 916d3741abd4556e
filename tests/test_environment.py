"""What programs set for themselves is there before tqdm reads it; a user's own setting stays (config/environment.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOORS = ("pretrain_instruct", "pretrain", "inference_instruct", "inference", "generate_instruct", "scripts/serve")
# Says what stands in the environment once tqdm is asked for, and leaves.
WATCH = """
import importlib.abc, os, runpy, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "tqdm":
            print(os.environ.get("TQDM_MININTERVAL"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
runpy.run_path(sys.argv[1])
"""


def found(door: str, **variables: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "TQDM_MININTERVAL"}
    command = [sys.executable, "-c", WATCH, str(REPOSITORY / f"{door}.py")]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("door", DOORS)
def test_logs_have_no_bar(door: str) -> None:
    assert found(door) == "30\n"


def test_a_users_own_setting_stays() -> None:
    assert found("pretrain", TQDM_MININTERVAL="1") == "1\n"
