"""What `make wheel`, `make audit`, `make matrix` and `make matrix-python` run; no part of the installed package."""
