"""Learning: loop, tasks, optimizer, schedule. The only room that changes weights."""
