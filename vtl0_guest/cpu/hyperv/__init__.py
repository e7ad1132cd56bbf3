"""Hyper-V devices of a processor: synthetic interrupts, timers, clocks and pages. Pure state, without the engine."""
