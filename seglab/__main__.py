"""python -m seglab COMMAND: the same as train.py and the console script `seglab`."""

from seglab.cli import main

if __name__ == "__main__":
    main()
