"""The policy language: text -> model -> rules. Pure; docs/policy.md is its manual."""
