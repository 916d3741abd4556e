"""Plot one run, or compare several, as a PNG: loss, bits per byte, ACT steps, learning rate, tokens
per second, memory.

    python scripts/plot_runs.py checkpoints/SlimOrca-ACT/first checkpoints/SlimOrca-ACT/second --output runs.png

Training draws run.png into the run's folder; this script compares runs, or plots a run that is
still training.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artifacts.plots import draw_runs
from config.errors import one_clear_message
from config.schema import user_path


def main(arguments: list[str] | None = None) -> None:
    """The command; exit status 2 and one message without a run, or if the plot can't be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder checkpoints/<project>/<run>")
    parser.add_argument("--output", type=user_path, default=Path("runs.png"), help="the PNG file, which is overwritten")
    options = parser.parse_args(arguments)
    with one_clear_message():
        draw_runs(options.runs, options.output)
        print(options.output)


if __name__ == "__main__":
    main()
