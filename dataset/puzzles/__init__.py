"""Puzzles: the on-disk form that ARC, Sudoku and Maze share, its loader, and each puzzle's own rules."""
