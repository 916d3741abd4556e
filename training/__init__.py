"""Learning: loop, slots, optimizer, schedule. The only room that changes weights."""
