"""Learning: loop, tasks, optimizer, schedule. The only package that changes weights."""
