"""This program against the naive way, side by side in one run, JSON on the last line. No other room imports this one."""
