"""System-management mode: its memory, its save area, entering and leaving it."""
