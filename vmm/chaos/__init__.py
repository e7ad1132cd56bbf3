"""Chaos: a guest whose work can be checked, while what it runs on is killed, stopped and cut off (`vtlab chaos`)."""
