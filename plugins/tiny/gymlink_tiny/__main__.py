"""`python -m gymlink_tiny FOLDER`."""

from gymlink_tiny import main

main()
