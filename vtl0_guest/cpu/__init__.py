"""The CPU core: x86-64 processors on Unicorn's own AMD-V. A library: registers and bytes in, exits out; no gRPC."""
