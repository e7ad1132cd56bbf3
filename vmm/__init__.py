"""The machine: run loop, hypercalls, devices, memory, lifecycle. It carries messages and never makes policy."""
