"""`python -m optc`."""

from optc.cli.main import main

main()
