"""A guest whose work can be checked from outside while everything around it dies (`vtlab chaos`)."""
