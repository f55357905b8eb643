"""Looks at a machine and an installation before anything is served: `python -m rheoserve_sgl doctor`."""
