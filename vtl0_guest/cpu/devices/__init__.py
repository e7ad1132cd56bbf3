"""The devices that must be near the CPU: interrupt controllers, timers, serial ports, reset and debug-exit ports."""
