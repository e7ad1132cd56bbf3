"""What all parties of the laboratory agree on: the contract, architecture numbers, errors, channels, the client."""
