"""The live page of a server: what its scheduler tells, and how a browser gets it."""
