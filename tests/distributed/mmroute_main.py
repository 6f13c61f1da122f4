"""`mmroute` as a script, for launchers that start a file."""

from mmroute.cli import main

main()
