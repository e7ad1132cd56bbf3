"""What every party of the laboratory must agree on: the contract, architecture numbers, errors, channels, the client."""
