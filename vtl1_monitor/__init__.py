"""VTL1: the policy, the keys and the verdicts. It never executes for VTL0."""
