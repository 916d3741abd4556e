"""Benchmarks of this program against the naive way in the same run, with JSON on the last line.
Nothing imports this package.
"""
