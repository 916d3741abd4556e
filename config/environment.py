"""What a program sets in its own environment, unless its user has: import this before tqdm, which reads it once."""

import os
import sys

if not sys.stderr.isatty():
    # A log needs no bar that moves ten times a second.
    os.environ.setdefault("TQDM_MININTERVAL", "30")
