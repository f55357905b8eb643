"""The small model that `make serve` and the tests use."""
