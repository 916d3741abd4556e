"""What a program sets in its own environment, unless its user has: import this before torch and tqdm, which read it once."""

import os
import sys

# Threads that wait sleep: spinning, they would take the cores from whatever else runs there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    # A log needs no bar that moves ten times a second.
    os.environ.setdefault("TQDM_MININTERVAL", "30")
