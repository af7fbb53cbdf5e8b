"""`python -m gymlink` is `gymlink`."""

from gymlink.cli import main

main()
