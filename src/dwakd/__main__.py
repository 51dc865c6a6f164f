"""python -m dwakd"""

from dwakd.cli import main

main()
