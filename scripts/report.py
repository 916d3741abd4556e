"""Write a report of a run, or of several side by side: one HTML page that needs no network, or
Markdown.

    python scripts/report.py checkpoints/SlimOrca-ACT/first [checkpoints/SlimOrca-ACT/second] [--markdown] [--output FILE]

All its figures come from the runs' files. For a missing figure it names the command that measures
it. Training writes a report at its end; this script is for later, for a run that is still training,
and to compare runs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artifacts.report import write_report
from config.errors import one_clear_message
from config.schema import user_path


def main(arguments: list[str] | None = None) -> None:
    """The command; exit status 2 and one message without a run, or if it can't write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="folder checkpoints/<project>/<run>, or a step_<N> in it"
    )
    parser.add_argument("--markdown", action="store_true", help="Markdown without charts in place of HTML")
    parser.add_argument(
        "--output",
        type=user_path,
        help="default: report.html or report.md, in the folder of a single run; overwritten",
    )
    options = parser.parse_args(arguments)
    with one_clear_message():
        name = "report.md" if options.markdown else "report.html"
        output = options.output or (options.runs[0] / name if len(options.runs) == 1 else Path(name))
        write_report(options.runs, output, markdown=options.markdown)
        print(output)


if __name__ == "__main__":
    main()
