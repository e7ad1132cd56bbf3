"""conformance: the guest that runs rows of the VSM conformance suite (tests/conformance)."""
