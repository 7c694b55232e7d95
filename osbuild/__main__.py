"""python -m osbuild: the same as the command osbuilder."""

from osbuild.cli import main

main()
