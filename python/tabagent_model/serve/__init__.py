"""What the models of a process offer to others: one service, and a door for each way in."""
