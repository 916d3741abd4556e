"""Puzzles: the on-disk format of ARC, Sudoku and Maze, its loader, and each puzzle's rules."""
